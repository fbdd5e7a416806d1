# SPDX-License-Identifier: MIT
"""A pass through a module that leaves no trace in it."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from pc_runner.contents import Contents


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
            if _identical(entries, value):
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

    saved = [(values, _copied(values)) for values, _ in contents.holders]
    try:
        for values, slots in contents.holders:
            for slot in slots:
                old = values[slot]
                new = stand_in(old)
                if new is not old:
                    values[slot] = new
        yield
    finally:
        for values, old in saved:
            _put_back(values, old)


def _copied(values: Any) -> Any:
    kind = dict if isinstance(values, dict) else set if isinstance(values, set) else list
    return kind(values)


def _identical(values: Any, others: Any) -> bool:
    return len(values) == len(others) and all(map(operator.is_, values, others))


def _put_back(values: Any, old: Any) -> None:
    if isinstance(values, dict):
        if not _identical(values, old):
            values.clear()
            values.update(old)
        elif not all(map(operator.is_, values.values(), old.values())):
            for name, value in old.items():
                if values[name] is not value:
                    values[name] = value
    elif isinstance(values, set):
        if values != old:
            values.clear()
            values.update(old)
    elif not _identical(values, old):
        values.clear()
        values.extend(old)
