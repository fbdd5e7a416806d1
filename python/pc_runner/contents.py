# SPDX-License-Identifier: MIT
"""All that a module's forward can read, in one look: a key that changes with it, its tensors, what a pass may change.

Looked at are the attributes of all submodules, containers and the user's own objects in them, hooks, and what the code
of forward and of the functions that it calls reads: closures, defaults, globals, attributes of classes and of Python
modules. The libraries' own code (torch, numpy, the standard library, this package) is taken to stay as it is; what only
the libraries know (a file, the clock, an iterator's place) is not seen.
"""

from __future__ import annotations

import dis
import functools
import os
import sys
import sysconfig
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import CodeType, FunctionType, MethodType, ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from pc_runner.node import PCNode

_QUIET = frozenset(vars(nn.Module())) - {"_parameters", "_buffers", "_modules", "training"}  # torch's own, mostly empty
_ROOTS = frozenset(  # code that runs without being named
    f"__{name}__"
    for name in (
        "call", "getitem", "getattr", "contains", "iter", "next", "len", "bool", "int", "float", "index", "get", "eq",
        "lt", "le", "gt", "ge", "neg", "add", "radd", "sub", "rsub", "mul", "rmul", "truediv", "rtruediv", "pow",
        "rpow", "matmul", "rmatmul",
    )
)  # fmt: skip
_ANY = frozenset({"getattr", "vars", "__dict__"})  # code that uses one of these may read every attribute
_CHANGING = (dict, list, set, deque)
_YES, _NO = (bool, 1), (bool, 0)  # in a key True would equal 1
_LONG = 64  # entries of a container, from which on a look at their types is worth while


class Same:
    """An object in a key, by identity; it lives as long as the key, so that its place in memory is not used again."""

    __slots__ = ("thing",)

    def __init__(self, thing: Any):
        self.thing = thing

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and self.thing is other.thing

    def __hash__(self) -> int:
        return id(self.thing)


@dataclass
class _Space:
    """Attributes of an object, a class or a Python module: those looked at, and in an object the tensors' places."""

    values: Mapping[str, Any]
    slots: list[Any] | None = None
    done: set[str] = field(default_factory=set)


class Contents:
    """What was found.

    tensors: parameters, buffers, and those in attributes, containers and objects, each once.
    holders: what a pass may change, with the entries where such tensors stand.
    masks: identities of the nodes' masks, which only a walk reads.
    lazy: the module's first pass is still to make its parameters.
    foreign: tensors were met where none can stand in for them (a global, a closure): they are in the key by identity.
    """

    def __init__(self, *roots: Any):
        self.tensors: list[Tensor] = []
        self.holders: list[tuple[Any, list[Any]]] = []
        self.masks: set[int] = set()
        self.lazy = self.foreign = False
        self._key: list[Any] = []
        self._places: dict[int, int] = {}
        self._seen: dict[int, tuple[int, bool, Any]] = {}
        self._functions: list[FunctionType] = []
        self._spaces: dict[int, _Space] = {}
        self._attributes = {"forward", *_ROOTS}
        for root in roots:
            self.read(root, True)
        self._follow()

    def of_inputs(self, values: Iterable[Any]) -> Contents:
        """Of values that this module's code is given."""
        found = Contents()
        found._attributes |= self._attributes
        for value in values:
            found.read(value)
        found._follow()
        return found

    @property
    def key(self) -> tuple[Any, ...]:
        return tuple(self._key)

    def read(self, value: Any, own: bool = False) -> bool:
        """Add one value to the key; True if it is, or is a tuple with, one of `tensors`.

        own: it stands in a container, or is an attribute, so that a pass can be given another one.
        """
        kind = type(value)
        if value is None or kind is str or kind is int:
            self._key.append(value)
            return False
        if kind is bool:
            self._key.append(_YES if value else _NO)
            return False
        if kind in (float, complex, bytes, range, slice, torch.device):
            self._key.append((kind, repr(value)))
            return False
        if isinstance(value, Tensor):
            return self._tensor(value, own)
        if id(value) in self._seen:
            place, holds, _ = self._seen[id(value)]
            self._key.append((Same, place))
            return holds
        self._seen[id(value)] = len(self._seen), False, value
        self._key.append(kind)
        holds = self._composite(value, own)
        if holds:
            self._seen[id(value)] = self._seen[id(value)][0], True, value
        return holds

    def _tensor(self, value: Tensor, own: bool) -> bool:
        if not own and id(value) not in self._places:
            self.foreign = True
            self._key.append((Same(value), form(value)))
            return False
        if id(value) not in self._places:
            self._places[id(value)] = len(self.tensors)
            self.tensors.append(value)
            self.lazy |= is_lazy(value)
        self._key.append((Tensor, self._places[id(value)]))
        return True

    def _composite(self, value: Any, own: bool) -> bool:
        if isinstance(value, nn.Module):
            self._space(type(value))
            self._holder(vars(value), quiet=True)
            if isinstance(value, PCNode):
                self.masks.add(id(value.mask))
        elif isinstance(value, tuple):
            self._key.append(len(value))
            return True in [self.read(entry, own) for entry in value]
        elif isinstance(value, _CHANGING):
            self._holder(value)
            if _is_open(type(value)):  # the user's own kind of container
                self._object(value)
        elif isinstance(value, FunctionType):
            self._function(value)
        elif isinstance(value, MethodType):
            self.read(value.__func__)
            self.read(value.__self__, own)
        elif isinstance(value, functools.partial):
            for part in (value.func, value.args, value.keywords):
                self.read(part, own)
        elif isinstance(value, (staticmethod, classmethod, property, functools.cached_property)):
            for name in ("__func__", "fget", "func"):
                self.read(getattr(value, name, None))
        elif isinstance(value, np.ndarray) and value.dtype != object:
            self._key.append((value.dtype.str, value.shape, value.tobytes()))
        elif isinstance(value, (type, ModuleType)):
            self._key.append(Same(value))
            self._space(value)
        elif _is_open(type(value)):
            self._object(value)
        else:
            self._key.append(Same(value))
        return False

    def _holder(self, values: Any, quiet: bool = False) -> None:
        """A container that a pass may change, or the attributes of a module."""
        key, slots = self._key, []
        self.holders.append((values, slots))
        if isinstance(values, dict) and len(values) > _LONG and _alike(values) and _alike(values.values()):
            key += [tuple(values), tuple(values.values())]
        elif isinstance(values, dict):
            for name, value in values.items():
                if quiet and name in _QUIET and not value:
                    continue
                kind = type(value)
                if type(name) is str:
                    key.append(name)
                else:
                    self.read(name)
                if value is None or kind is int or kind is str:
                    key.append(value)
                elif kind is bool:
                    key.append(_YES if value else _NO)
                elif self.read(value, True):
                    slots.append(name)
        elif isinstance(values, set):
            plain = set(map(type, values)) <= {str, int}
            key.append(frozenset(values) if plain else frozenset(map(Same, values)))
        elif len(values) > _LONG and _alike(values):
            key.append(tuple(values))
        else:
            slots += [place for place, value in enumerate(values) if self.read(value, True)]
        key.append(len(values))

    def _object(self, value: Any) -> None:
        """An object of the user's: of its attributes those count that code names."""
        self._space(type(value))
        slots: list[Any] = []
        self.holders.append((vars(value), slots))
        self._spaces[id(value)] = _Space(vars(value), slots)

    def _function(self, function: FunctionType) -> None:
        self._key.append(Same(function))
        if not _is_library(function.__code__.co_filename):
            self._functions.append(function)

    def _space(self, space: Any) -> None:
        """Attributes of a class and its bases, or of a Python module, that code may read."""
        for one in space.__mro__ if isinstance(space, type) else (space,):
            if id(one) not in self._spaces and not _is_fixed(one):
                self._spaces[id(one)] = _Space(vars(one))

    def _follow(self) -> None:
        """What code reads, and the code that it finds there, until there is no more."""
        found = True
        while found:
            while self._functions:
                self._code(self._functions.pop())
            found = False
            for space in list(self._spaces.values()):
                own = space.slots is not None
                every = own and self._attributes & _ANY
                named = space.values.keys() if every else space.values.keys() & self._attributes
                for name in sorted(named - space.done):
                    space.done.add(name)
                    found = True
                    self._key.append(name)
                    if self.read(space.values[name], own):
                        space.slots.append(name)  # type: ignore[union-attr]

    def _code(self, function: FunctionType) -> None:
        names, attributes = _names(function.__code__)
        self._attributes |= attributes
        self._attributes.update(_ANY.intersection(names))
        self.read(function.__defaults__)
        self.read(function.__kwdefaults__)
        for cell in function.__closure__ or ():
            try:
                self.read(cell.cell_contents)
            except ValueError:  # not yet filled
                self._key.append(Same)
        values = function.__globals__
        for name in names:
            if name in values:
                self._key.append(name)
                self.read(values[name])


def _alike(values: Iterable[Any]) -> bool:
    """Whether all are str, or all int: long lists of them need no look at each."""
    return set(map(type, values)) in ({str}, {int})


def form(value: Tensor) -> tuple[Any, ...]:
    """What traced code assumes of a tensor."""
    stride = value.stride() if value.layout is torch.strided else value.layout
    return tuple(value.shape), stride, value.dtype, str(value.device)


@functools.lru_cache(4096)
def _names(code: CodeType) -> tuple[tuple[str, ...], frozenset[str]]:
    """Names that code and the functions made in it read: globals, and attributes."""
    values: set[str] = set()
    attributes: set[str] = set()
    for step in dis.get_instructions(code):
        if step.opname.startswith("LOAD_") and step.argval in code.co_names:
            (attributes if "ATTR" in step.opname or "METHOD" in step.opname else values).add(step.argval)
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            more = _names(inner)
            values |= set(more[0])
            attributes |= more[1]
    return tuple(sorted(values)), frozenset(attributes)


_HERE = os.path.dirname(os.path.abspath(__file__))
_LIBRARIES = tuple(
    os.path.join(folder, "")
    for folder in (os.path.dirname(torch.__file__), os.path.dirname(np.__file__), _HERE)
)  # fmt: skip
_STANDARD = tuple(os.path.join(sysconfig.get_path(name), "") for name in ("stdlib", "platstdlib"))
_INSTALLED = tuple(os.path.join(sysconfig.get_path(name), "") for name in ("purelib", "platlib"))


@functools.lru_cache(4096)
def _is_library(path: str) -> bool:
    """Whether a file's code is taken to stay as it is."""
    standard = path.startswith(_STANDARD) and not path.startswith(_INSTALLED) and "site-packages" not in path
    return path.startswith((*_LIBRARIES, "<frozen")) or standard


@functools.lru_cache(4096)
def _is_fixed(space: Any) -> bool:
    """Whether a class or Python module is a library's."""
    module = sys.modules.get(space.__module__) if isinstance(space, type) else space
    if getattr(module, "__name__", None) == "__main__":
        return False
    path = getattr(module, "__file__", None)
    return path is None or _is_library(path)


@functools.lru_cache(4096)
def _is_open(kind: type) -> bool:
    """Whether objects of this class are looked into: the user's own, and this package's pairs of distributions."""
    if not kind.__dictoffset__:
        return False
    return kind is SimpleNamespace or kind.__module__.startswith("pc_runner.") or not _is_fixed(kind)
