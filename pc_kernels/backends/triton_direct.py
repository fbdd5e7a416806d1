# SPDX-License-Identifier: MIT
"""Launches past Triton's binder, which looks at the type, value and alignment of every argument at every launch.

Until the copy into the workspace is launched the GPU stands idle, so what that launch takes counts in full: in Triton
3.6 10 to 17 us of Python, and 5 us here (measured without a GPU). What the binder finds out differs between calls only
in the addresses, and those are nearly always alike: 64-bit numbers divisible by 16. Such calls share the kernel that
was compiled for the first of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from operator import or_
from typing import Any

from torch import Tensor


def usual(addresses: Sequence[int]) -> bool:
    """Whether the binder takes every address for a 64-bit number divisible by 16."""
    return min(addresses) >= 1 << 31 and not reduce(or_, addresses) & 15


class Direct:
    """One launch of a plan: kernel(*tensors, addresses, *numbers, **constants). tensors: the plan's own, which stay
    where they are; numbers: floats, or parameters that Triton does not specialize; constants: in the order of the
    parameters."""

    def __init__(self, kernel: Any, items: int, tensors: Sequence[Tensor], constants: dict[str, Any], warps: int):
        self._kernel, self._grid, self._tensors, self._constants = kernel, (items, 1, 1), tensors, constants
        self._warps = warps
        self._pointers = [tensor.data_ptr() for tensor in tensors]
        self._last = tuple(constants.values())  # a compiled kernel takes them, and passes over them
        self._run: Any = None

    def __call__(self, addresses: tuple[int, ...], *numbers: float) -> None:
        alike = usual(addresses)
        if alike and self._run is not None:
            self._run(*self._pointers, addresses, *numbers, *self._last)
            return
        launch = self._kernel[self._grid]
        compiled = launch(*self._tensors, addresses, *numbers, **self._constants, num_warps=self._warps)
        if alike and compiled is not None:  # the interpreter compiles nothing
            self._run = compiled[self._grid]
