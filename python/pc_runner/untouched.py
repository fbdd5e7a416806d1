# SPDX-License-Identifier: MIT
"""A pass through a module that leaves no trace in it."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

if TYPE_CHECKING:
    from pc_runner.contents import Contents


class Holder:
    """A container that a pass may change: what is in it, and where one of `Contents.tensors` is."""

    __slots__ = ("items", "keys", "slots", "values")

    def __init__(self, values: Any):
        self.values, self.slots = values, []
        self.keys = tuple(values) if isinstance(values, dict) else None
        self.items = tuple(values.values() if isinstance(values, dict) else values)
        if isinstance(values, set):
            self.items = frozenset(values)  # type: ignore[assignment]

    def intact(self) -> bool:
        """Whether the very same things are in it."""
        values, keys = self.values, self.keys
        if len(values) != len(self.items):
            return False
        if keys is not None:
            return all(map(operator.is_, values, keys)) and all(map(operator.is_, values.values(), self.items))
        return values == self.items if isinstance(values, set) else all(map(operator.is_, values, self.items))

    def restore(self) -> None:
        """Put back what was in it."""
        values, keys = self.values, self.keys
        if self.intact():
            return
        if keys is None:
            values.clear()
            values.update(self.items) if isinstance(values, set) else values.extend(self.items)
        elif len(values) == len(keys) and all(map(operator.is_, values, keys)):
            for name, value in zip(keys, self.items, strict=True):
                if values[name] is not value:
                    values[name] = value
        else:
            values.clear()
            for name, value in zip(keys, self.items, strict=True):
                values[name] = value


@contextmanager
def left_alone(contents: Contents, tensors: Mapping[int, Tensor] | None = None) -> Iterator[None]:
    """Inside, code may change attributes, buffers and containers: all are put back at the end. Parameters are not.

    tensors: by identity, what stands for the module's own tensors inside; of all but parameters a copy is used.
    """
    if contents.lazy:  # its first pass makes parameters that are to stay
        yield
        return
    stands: dict[int, Tensor] = {}

    def stand_in(value: Any) -> Any:
        if isinstance(value, tuple):
            entries = [stand_in(entry) for entry in value]
            if all(map(operator.is_, entries, value)):
                return value
            return type(value)(*entries) if hasattr(value, "_fields") else type(value)(entries)
        if not isinstance(value, Tensor):
            return value
        now = value if tensors is None else tensors.get(id(value), value)
        if isinstance(value, nn.Parameter) or id(value) in contents.masks:
            return now
        if id(value) not in stands:
            stands[id(value)] = now.clone()
        return stands[id(value)]

    try:
        for holder in contents.holders:
            values = holder.values
            for slot in holder.slots:
                old = values[slot]
                if tensors is None and type(old) is nn.Parameter:
                    continue
                new = stand_in(old)
                if new is not old:
                    values[slot] = new
        yield
    finally:
        for holder in contents.holders:
            holder.restore()
