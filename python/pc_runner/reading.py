# SPDX-License-Identifier: MIT
"""What a function's code reads by name, and whose code and whose objects are looked into."""

from __future__ import annotations

import dis
import functools
import os
import sys
import sysconfig
from types import CellType, CodeType
from typing import Any, NamedTuple

import numpy as np
import torch

GONE = object()  # what stands for a name that is not there


class Same:
    """An object in a key, by identity; it lives as long as the key, so that its place in memory is not used again."""

    __slots__ = ("thing",)

    def __init__(self, thing: Any):
        self.thing = thing

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and self.thing is other.thing

    def __hash__(self) -> int:
        return id(self.thing)


def held_by(cell: CellType) -> Any:
    """What a closure's cell holds."""
    try:
        return cell.cell_contents
    except ValueError:  # not yet filled
        return GONE


class Names(NamedTuple):
    """What code, and the functions made in it, read by name: globals, attributes, modules that it imports. stores:
    whether it binds a name outside of itself."""

    values: tuple[str, ...]
    attributes: frozenset[str]
    modules: tuple[str, ...]
    stores: bool


@functools.lru_cache(4096)
def names_in(code: CodeType) -> Names:
    """Of one code object."""
    stores = False
    values: set[str] = set()
    attributes: set[str] = set()
    modules: set[str] = set()
    for step in dis.get_instructions(code):
        if step.opname == "IMPORT_NAME":
            modules.add(step.argval)
        elif step.opname == "IMPORT_FROM":
            attributes.add(step.argval)
        elif step.opname == "STORE_GLOBAL" or (step.opname == "STORE_DEREF" and step.argval in code.co_freevars):
            stores = True
        elif step.opname.startswith("LOAD_") and step.argval in code.co_names:
            (attributes if "ATTR" in step.opname or "METHOD" in step.opname else values).add(step.argval)
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            more = names_in(inner)
            values |= set(more.values)
            attributes |= more.attributes
            modules |= set(more.modules)
            stores = stores or more.stores
    return Names(tuple(sorted(values)), frozenset(attributes), tuple(sorted(modules)), stores)


@functools.lru_cache(4096)
def slots_of(kind: type) -> tuple[str, ...]:
    """The attributes that a class keeps outside of `__dict__`."""
    found = [vars(one).get("__slots__", ()) for one in kind.__mro__ if not is_library(source_of(one))]
    names = [name for slots in found for name in ([slots] if isinstance(slots, str) else slots)]
    return tuple(name for name in names if name not in ("__dict__", "__weakref__"))


_HERE = os.path.dirname(os.path.abspath(__file__))
_LIBRARIES = tuple(
    os.path.join(folder, "")
    for folder in (os.path.dirname(torch.__file__), os.path.dirname(np.__file__), _HERE)
)  # fmt: skip
_STANDARD, _INSTALLED = (
    tuple(os.path.join(sysconfig.get_path(name), "") for name in names)
    for names in (("stdlib", "platstdlib"), ("purelib", "platlib"))
)
BUILT_IN = "<built-in>"


@functools.lru_cache(4096)
def is_library(path: str) -> bool:
    """Whether a file's code is taken to stay as it is: it was installed, or came with Python."""
    return path.startswith((*_LIBRARIES, *_STANDARD, *_INSTALLED, "<frozen", BUILT_IN)) or "site-packages" in path


@functools.lru_cache(4096)
def source_of(space: Any) -> str:
    """The file of a class or Python module; "" for one made by hand."""
    module = sys.modules.get(space.__module__) if isinstance(space, type) else space
    path, spec = getattr(module, "__file__", None), getattr(module, "__spec__", None)
    if path is None and getattr(spec, "origin", None) in ("built-in", "frozen"):
        return BUILT_IN
    return path or ""


@functools.lru_cache(4096)
def package_of(kind: type) -> tuple[str, ...]:
    """Where the code lies that comes with an installed class, torch's own apart: the user's, since he made a module of
    it."""
    path = source_of(kind)
    for folder in _INSTALLED:
        if path.startswith(folder) and not path.startswith(_LIBRARIES):
            return (os.path.join(folder, path.removeprefix(folder).split(os.sep)[0]),)
    return ()
