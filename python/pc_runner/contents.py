# SPDX-License-Identifier: MIT
"""All that a module's forward can read, in one look: a key that changes with it, its tensors, what a pass may change.

Looked at are parameters, buffers and hooks of all submodules, and what the code of forward and of the functions that it
calls names: attributes, containers and the user's own objects in them, closures, defaults, globals, attributes of
classes and of Python modules. What is installed (torch, numpy, the standard library, site-packages) is taken to stay as
it is, code and objects, but for the package of a module's own class; what only libraries know (a file, the clock, an
iterator's place) is not seen.
"""

from __future__ import annotations

import argparse
import functools
import inspect
import sys
import zlib
from array import array
from collections import Counter, OrderedDict, UserDict, UserList, deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, is_dataclass
from enum import Enum
from types import FunctionType, MethodType, ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from pc_runner.node import PCNode
from pc_runner.reading import GONE, Same, held_by, is_library, names_in, package_of, slots_of, source_of
from pc_runner.untouched import Holder

_BARE = frozenset(name for name, value in vars(nn.Module()).items() if isinstance(value, (dict, set)))
# hooks: mostly empty, and no pass adds one
_QUIET = _BARE - {"_parameters", "_buffers", "_non_persistent_buffers_set", "_modules"}
_ROOTS = frozenset(  # code that runs without being named
    f"__{name}__"
    for name in (
        "call", "getitem", "getattr", "contains", "iter", "next", "len", "bool", "int", "float", "index", "get", "eq",
        "lt", "le", "gt", "ge", "neg", "add", "radd", "sub", "rsub", "mul", "rmul", "truediv", "rtruediv", "pow",
        "rpow", "matmul", "rmatmul", "enter", "exit",
    )
)  # fmt: skip
_ANY = frozenset({"getattr", "vars", "__dict__"})  # code that uses one of these may read every attribute
_CHANGING = (dict, list, set, deque)
_RECORDS = (SimpleNamespace, argparse.Namespace, UserDict, UserList)  # Python's own, but what is in them is the user's
_PLAIN = (type(None), bool, int, float, str, tuple, Tensor, nn.Module)
_YES, _NO = (bool, 1), (bool, 0)  # in a key True would equal 1
_LONG = 64  # entries of a container, from which on a look at their types is worth while


@dataclass
class _Space:
    """Attributes of an object, a class or a Python module: those looked at, and in an object the tensors' places."""

    values: Mapping[str, Any]
    slots: list[Any] | None = None
    every: bool = False
    done: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.size = len(self.values)


class Contents:
    """What was found.

    tensors: parameters, buffers, and those in attributes, containers and objects, each once.
    holders: containers and attributes that a pass may change.
    free: those of the tensors that are no parameters.
    kept: identities of tensors that stay in their places in a pass: the nodes' masks, views of parameters.
    aliased: identities of those that share memory with another.
    written: identities of those that a pass writes to; None: not known yet.
    lazy: the module's first pass is still to make its parameters.
    stores: its code binds names outside of itself.
    foreign: tensors were met where none can stand in for them (a global, a closure): they are in the key by identity.
    objects: how many objects of the user's own kinds were met.
    """

    def __init__(self, *roots: Any):
        self.tensors: list[Tensor] = []
        self.holders: list[Holder] = []
        self.kept: set[int] = set()
        self.aliased: set[int] = set()
        self.written: set[int] | None = None
        self.lazy = self.foreign = self.stores = False
        self.objects = 0
        self._key: list[Any] = []
        self._places: dict[int, int] = {}
        self._seen: dict[int, tuple[int, bool, Any]] = {}
        self._functions: list[FunctionType] = []
        self._spaces: dict[int, _Space] = {}
        self._reads: list[tuple[Any, str, Any]] = []  # a space, a name, what was there
        self._code_of: list[tuple[FunctionType, Any, Any, Any]] = []
        self._cells: list[tuple[Any, Any]] = []
        self._empty: list[Any] = []  # containers that were empty, and were not looked at further
        self._kinds: list[tuple[Any, type]] = []
        self._sure = True  # no more can change than `unchanged` looks at
        self._attributes = {"forward", "backward", *_ROOTS}
        modules = [module for root in roots if isinstance(root, nn.Module) for module in root.modules()]
        self._own = tuple({path for module in modules for path in package_of(type(module))})
        for root in roots:
            self.read(root, True)
        self._follow()
        self.free = [tensor for tensor in self.tensors if not isinstance(tensor, nn.Parameter)]
        self._find_aliases()

    def of_inputs(self, values: Iterable[Any]) -> Contents:
        """Of values that this module's code is given."""
        found = Contents()
        found._attributes |= self._attributes
        found._own = self._own
        for value in values:
            found.read(value)
        found._follow()
        return found

    def unchanged(self) -> bool:
        """Whether all is still what was found: a look at identities, much quicker than another look at everything."""
        return (
            self._sure
            and not any(self._empty)
            and all(type(value) is kind for value, kind in self._kinds)
            and all(holder.intact() for holder in self.holders)
            and all(space.get(name, GONE) is value for space, name, value in self._reads)
            and all(held_by(cell) is value for cell, value in self._cells)
            and all(
                f.__code__ is code and f.__defaults__ is given and f.__kwdefaults__ is named
                for f, code, given, named in self._code_of
            )
            and all(len(space.values) == space.size for space in self._spaces.values())
        )

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
        if kind in (float, complex, bytes, bytearray, array, range, slice, torch.device):
            self._key.append((kind, repr(value)))
            self._sure = self._sure and kind not in (bytearray, array)
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
        if not own:
            self.foreign, self._sure = True, False  # its shape may change, and its values may be read
            self._key.append((Same(value), form(value), 0 if value.is_inference() else value._version))
            return False
        if id(value) not in self._places:
            self._places[id(value)] = len(self.tensors)
            self.tensors.append(value)
            if is_lazy(value):
                self.lazy, self._sure = True, False
        self._key.append((Tensor, self._places[id(value)]))
        return True

    def _composite(self, value: Any, own: bool) -> bool:
        if isinstance(value, nn.Module):
            self._module(value)
        elif isinstance(value, tuple):
            self._key.append(len(value))
            return True in [self.read(entry, own) for entry in value]
        elif isinstance(value, _CHANGING):
            self._holder(value, own)
            if self._open(type(value)):  # the user's own kind of container
                self._object(value, own)
        elif isinstance(value, (int, float, str, np.generic)):
            self._key.append(repr(value))
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
            self._key.append((value.dtype.str, value.shape, zlib.crc32(np.ascontiguousarray(value).data)))
            self._sure = False
        elif isinstance(value, (type, ModuleType)):
            self._key.append(Same(value))
            self._space(value)
        else:
            self._key.append(Same(value))
            self.read(inspect.getattr_static(value, "__wrapped__", None) if callable(value) else None)
            if self._open(type(value)):
                self._object(value, own)
        return False

    def _module(self, module: nn.Module) -> None:
        """Its own things, and of other attributes the plain ones if library code reads them; the rest: `_follow`."""
        values, kind = vars(module), type(module)
        self._space(kind)
        self._kinds.append((module, kind))
        holder = Holder(values)
        self.holders.append(holder)
        space = self._spaces[id(values)] = _Space(values, holder.slots)
        bases = [self._fixed(one) for one in kind.__mro__ if one not in (nn.Module, object)]
        quiet, always = (_BARE, values.keys()) if all(bases) else (_QUIET, _BARE | {"training"})
        always_kinds = _PLAIN if any(bases) else Tensor
        for name, value in values.items():
            if name in quiet and not value:
                self._empty.append(value)
            elif name in always or isinstance(value, always_kinds):
                self._attribute(space, name)
        if isinstance(module, PCNode):
            self.kept.add(id(module.mask))

    def _attribute(self, space: _Space, name: str) -> None:
        own = space.slots is not None
        space.done.add(name)
        self._key.append(name)
        self._reads.append((space.values, name, space.values[name]))
        if self.read(space.values[name], own):
            space.slots.append(name)  # type: ignore[union-attr]

    def _holder(self, values: Any, own: bool) -> None:
        """A container, which a pass may change if it is the module's own."""
        key, holder = self._key, Holder(values, own)
        slots = holder.slots
        self.holders.append(holder)
        key.append(len(values))
        if isinstance(values, dict) and len(values) > _LONG and _alike(values) and _alike(values.values()):
            key += [tuple(values), tuple(values.values())]
        elif isinstance(values, dict):
            for name, value in values.items():
                kind = type(value)
                if type(name) is str:
                    key.append(name)
                else:
                    self.read(name)
                if value is None or kind is int or kind is str:
                    key.append(value)
                elif kind is bool:
                    key.append(_YES if value else _NO)
                elif self.read(value, own) and type(values) in (dict, OrderedDict):
                    slots.append(name)
        elif isinstance(values, set):
            plain = set(map(type, values)) <= {str, int}
            key.append(frozenset(values) if plain else frozenset(map(Same, values)))
        elif len(values) > _LONG and _alike(values):
            key.append(tuple(values))
        else:
            places = [place for place, value in enumerate(values) if self.read(value, own)]
            slots += places if type(values) in (list, deque) else []

    def _object(self, value: Any, own: bool) -> None:
        """An object of the user's: of its attributes those count that code names; of plain data, all."""
        self.objects += 1
        self._kinds.append((value, type(value)))
        self._space(type(value))
        for name in slots_of(type(value)):
            self._sure = False
            self.read(getattr(value, name, None))
        if hasattr(value, "__dict__"):
            holder = Holder(vars(value), own)
            self.holders.append(holder)
            plain = isinstance(value, _RECORDS) or is_dataclass(value)
            self._spaces[id(value)] = _Space(vars(value), holder.slots if own else None, plain)

    def _function(self, function: FunctionType) -> None:
        self._key.append(Same(function))
        self.read(getattr(function, "__wrapped__", None))  # a library's decorator around the user's code
        if not self._library(function.__code__.co_filename):
            self._functions.append(function)

    def _library(self, path: str) -> bool:
        return is_library(path) and not path.startswith(self._own)

    def _fixed(self, space: Any) -> bool:
        """Whether a class or Python module is a library's."""
        return self._library(source_of(space))

    def _open(self, kind: type) -> bool:
        """Whether objects of this class are looked into: the user's own, and this package's pairs of distributions."""
        if issubclass(kind, Enum) or not (kind.__dictoffset__ or slots_of(kind)):
            return False
        return kind in _RECORDS or kind.__module__ == "pc_runner.distributions" or not self._fixed(kind)

    def _find_aliases(self) -> None:
        """Which tensors share memory; views of parameters stay where they are."""
        dense = [t for t in self.tensors if t.layout is torch.strided and not is_lazy(t)]
        memory = {id(t): t.untyped_storage()._cdata for t in dense}
        counts = Counter(memory.values())
        of_parameters = {memory[id(t)] for t in self.tensors if isinstance(t, nn.Parameter) and id(t) in memory}
        for tensor in self.free:
            place = memory.get(id(tensor))
            if place is None:
                continue
            if place in of_parameters:
                self.kept.add(id(tensor))
            elif counts[place] > 1:
                self.aliased.add(id(tensor))

    def _space(self, space: Any) -> None:
        """Attributes of a class and its bases, or of a Python module, that code may read."""
        for one in space.__mro__ if isinstance(space, type) else (space,):
            if id(one) not in self._spaces and not self._fixed(one):
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
                every = space.every or (own and self._attributes & _ANY)
                named = space.values.keys() if every else space.values.keys() & self._attributes
                for name in sorted(named - space.done):
                    found = True
                    self._attribute(space, name)

    def _code(self, function: FunctionType) -> None:
        names, attributes, modules, stores = names_in(function.__code__)
        self.stores = self.stores or stores
        self._attributes |= attributes
        self._attributes.update(_ANY.intersection(names))
        self.read(function.__defaults__)
        self.read(function.__kwdefaults__)
        self._code_of.append((function, function.__code__, function.__defaults__, function.__kwdefaults__))
        for cell in function.__closure__ or ():
            value = held_by(cell)
            self._cells.append((cell, value))
            self.read(value, isinstance(value, _CHANGING))  # as a rule a hook's, to keep what passes by
        for space, wanted in ((function.__globals__, names), (sys.modules, modules)):
            for name in wanted:
                self._reads.append((space, name, space.get(name, GONE)))
                if name in space:
                    self._key.append(name)
                    self.read(space[name])


class Looks:
    """The last look at a module; another one where something has changed."""

    def __init__(self) -> None:
        self._last: tuple[nn.Module, Contents] | None = None

    def at(self, module: nn.Module) -> Contents:
        if self._last is None or self._last[0] is not module:
            self._last = module, Contents(module)
        elif not self._last[1].unchanged():
            before, now = self._last[1], Contents(module)
            if list(map(id, before.tensors)) == list(map(id, now.tensors)):
                now.written = before.written
            self._last = module, now
        return self._last[1]


def _alike(values: Iterable[Any]) -> bool:
    """Whether all are str, or all int: long lists of them need no look at each."""
    return set(map(type, values)) in ({str}, {int})


def form(value: Tensor) -> tuple[Any, ...]:
    """What traced code assumes of a tensor."""
    stride = value.stride() if value.layout is torch.strided else value.layout
    return tuple(value.shape), stride, value.dtype, str(value.device)
