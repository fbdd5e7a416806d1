# SPDX-License-Identifier: MIT
"""What a function's code reads by name, and whose code and whose objects are looked into."""

from __future__ import annotations

import dis
import functools
import os
import sys
import sysconfig
from enum import Enum
from types import CellType, CodeType, SimpleNamespace
from typing import Any

import numpy as np
import torch

GONE = object()  # what stands for a name that is not there


def held_by(cell: CellType) -> Any:
    """What a closure's cell holds."""
    try:
        return cell.cell_contents
    except ValueError:  # not yet filled
        return GONE


@functools.lru_cache(4096)
def names_in(code: CodeType) -> tuple[tuple[str, ...], frozenset[str], tuple[str, ...]]:
    """Names that code and the functions made in it read: globals, attributes, and modules that it imports."""
    values: set[str] = set()
    attributes: set[str] = set()
    modules: set[str] = set()
    for step in dis.get_instructions(code):
        if step.opname == "IMPORT_NAME":
            modules.add(step.argval)
        elif step.opname == "IMPORT_FROM":
            attributes.add(step.argval)
        elif step.opname.startswith("LOAD_") and step.argval in code.co_names:
            (attributes if "ATTR" in step.opname or "METHOD" in step.opname else values).add(step.argval)
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            more = names_in(inner)
            values |= set(more[0])
            attributes |= more[1]
            modules |= set(more[2])
    return tuple(sorted(values)), frozenset(attributes), tuple(sorted(modules))


@functools.lru_cache(4096)
def slots_of(kind: type) -> tuple[str, ...]:
    """The attributes that a class keeps outside of `__dict__`."""
    found = [vars(one).get("__slots__", ()) for one in kind.__mro__ if not is_fixed(one)]
    names = [name for slots in found for name in ([slots] if isinstance(slots, str) else slots)]
    return tuple(name for name in names if name not in ("__dict__", "__weakref__"))


_HERE = os.path.dirname(os.path.abspath(__file__))
_LIBRARIES = tuple(
    os.path.join(folder, "")
    for folder in (os.path.dirname(torch.__file__), os.path.dirname(np.__file__), _HERE)
)  # fmt: skip
_STANDARD = tuple(os.path.join(sysconfig.get_path(name), "") for name in ("stdlib", "platstdlib"))
_INSTALLED = tuple(os.path.join(sysconfig.get_path(name), "") for name in ("purelib", "platlib"))


@functools.lru_cache(4096)
def is_library(path: str) -> bool:
    """Whether a file's code is taken to stay as it is."""
    standard = path.startswith(_STANDARD) and not path.startswith(_INSTALLED) and "site-packages" not in path
    return path.startswith((*_LIBRARIES, "<frozen")) or standard


@functools.lru_cache(4096)
def is_fixed(space: Any) -> bool:
    """Whether a class or Python module is a library's."""
    module = sys.modules.get(space.__module__) if isinstance(space, type) else space
    if getattr(module, "__name__", None) == "__main__":
        return False
    path = getattr(module, "__file__", None)
    return path is None or is_library(path)


@functools.lru_cache(4096)
def is_open(kind: type) -> bool:
    """Whether objects of this class are looked into: the user's own, and this package's pairs of distributions."""
    if issubclass(kind, Enum) or not (kind.__dictoffset__ or slots_of(kind)):
        return False
    return kind is SimpleNamespace or kind.__module__.startswith("pc_runner.") or not is_fixed(kind)
