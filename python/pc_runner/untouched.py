# SPDX-License-Identifier: MIT
"""A pass through a module that leaves no trace in it."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import Tensor, fx, nn

if TYPE_CHECKING:
    from pc_runner.contents import Contents


class Holder:
    """A container that a pass may change: what is in it, and where one of `Contents.tensors` is.

    own: it is the module's. Else others may change it meanwhile: of what comes in tensors alone are taken out again.
    """

    __slots__ = ("items", "keys", "own", "slots", "values")

    def __init__(self, values: Any, own: bool = True):
        self.values, self.slots, self.own = values, [], own
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
        if not self.own:
            self._weed()
        elif keys is None:
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

    def _weed(self) -> None:
        values, before = self.values, set(map(id, self.items))

        def stays(value: Any) -> bool:
            return not isinstance(value, (Tensor, fx.Proxy)) or id(value) in before

        if isinstance(values, dict):
            for name in [name for name, value in values.items() if not stays(value)]:
                del values[name]
        elif not all(map(stays, values)):
            left = [value for value in values if stays(value)]
            values.clear()
            values.update(left) if isinstance(values, set) else values.extend(left)


class _Stands:
    """What stands in for the module's own tensors in a pass."""

    def __init__(self, contents: Contents, tensors: Mapping[int, Tensor] | None):
        self.contents, self.tensors = contents, tensors
        self.copies: dict[int, Tensor] = {}
        self._storages: dict[Any, Tensor] = {}

    def put(self) -> None:
        """Into the places where they are found."""
        for holder in self.contents.holders:
            values = holder.values
            for slot in holder.slots:
                old = values[slot]
                new = self._of(old)
                if new is not old:
                    values[slot] = new

    def _of(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self._tensor(value)
        if type(value) is not tuple and not hasattr(value, "_make"):
            return value
        entries = [self._of(entry) for entry in value]
        if all(map(operator.is_, entries, value)):
            return value
        return tuple(entries) if type(value) is tuple else type(value)._make(entries)  # type: ignore[attr-defined]

    def _tensor(self, value: Tensor) -> Tensor:
        contents, now = self.contents, value
        if self.tensors is not None:
            now = self.tensors.get(id(value), value)
        if isinstance(value, nn.Parameter) or id(value) in contents.kept:
            return now
        if contents.written is not None and id(value) not in contents.written:
            return now
        if id(value) not in self.copies:
            copy = self._view(value) if now is value and id(value) in contents.aliased else now.clone()
            vars(copy).update(vars(value))
            self.copies[id(value)] = copy
        return self.copies[id(value)]

    def _view(self, value: Tensor) -> Tensor:
        """Of a copy of all of its memory, in which others have their part, too."""
        place = value.untyped_storage()._cdata, value.dtype
        if place not in self._storages:
            whole = value.detach().new_empty(0).set_(value.untyped_storage())  # type: ignore[call-overload]
            self._storages[place] = whole.clone()
        return self._storages[place].as_strided(value.shape, value.stride(), value.storage_offset())

    def learn(self, versions: Mapping[int, int]) -> None:
        """Note which tensors the pass has written to."""
        written = {at for at, copy in self.copies.items() if copy.is_inference() or copy._version}
        written |= {id(own) for own in self.contents.free if _version(own) != versions[id(own)]}
        self.contents.written = written | (self.contents.written or set())


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


@contextmanager
def left_alone(contents: Contents, tensors: Mapping[int, Tensor] | None = None, whole: bool = False) -> Iterator[None]:
    """Inside, code may change attributes, buffers and containers: all are put back at the end. Parameters are not.

    Code works on copies of what is no parameter. The first whole pass shows which of them it writes to; from then on
    these alone are copied. (What it writes to later, for the first time, is changed that once.)

    tensors: by identity, what stands for the module's own tensors inside. whole: the pass is one with real numbers.
    """
    if contents.lazy:  # its first pass makes parameters that are to stay
        yield
        return
    stands = _Stands(contents, tensors)
    versions = {id(own): _version(own) for own in contents.free} if whole else {}
    try:
        if tensors is not None or contents.written is None or contents.written:
            stands.put()
        yield
        if whole:
            stands.learn(versions)
    finally:
        for holder in contents.holders:
            holder.restore()
