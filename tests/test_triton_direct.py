# SPDX-License-Identifier: MIT
"""Launches past Triton's binder: the same arguments in the same order, and only where the binder would agree."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pc_kernels.backends.triton_direct import Direct, usual

HIGH = 1 << 40  # where a GPU's memory lies


class Compiled:
    """What a launch of a kernel returns: launches itself, and takes the constants among the arguments."""

    def __init__(self, launches: list[Any]):
        self._launches = launches

    def __getitem__(self, grid: tuple[int, int, int]) -> Any:
        return lambda *arguments: self._launches.append((grid, arguments))


class Kernel:
    """As `triton.jit` makes one; without a compiler it returns None, as in the interpreter."""

    def __init__(self, compiles: bool = True):
        self.bound: list[Any] = []
        self.direct: list[Any] = []
        self._compiles = compiles

    def __getitem__(self, grid: tuple[int, int, int]) -> Any:
        def launch(*arguments: Any, num_warps: int, **constants: Any) -> Compiled | None:
            assert num_warps == 4
            self.bound.append((grid, (*arguments, *constants.values())))
            return Compiled(self.direct) if self._compiles else None

        return launch


def _launch(kernel: Kernel) -> tuple[Direct, list[torch.Tensor]]:
    tensors = [torch.zeros(4), torch.zeros(4)]
    return Direct(kernel, 7, tensors, {"FIRST": True, "BLOCK": 1024}, 4), tensors


def test_the_second_launch_is_direct_and_the_same() -> None:
    kernel = Kernel()
    launch, tensors = _launch(kernel)
    launch((HIGH, HIGH + 32), 0.1, 0.5, 3)
    launch((HIGH + 48, HIGH), 0.2, 0.5, 3)
    assert kernel.bound == [((7, 1, 1), (*tensors, (HIGH, HIGH + 32), 0.1, 0.5, 3, True, 1024))]
    pointers = [tensor.data_ptr() for tensor in tensors]
    assert kernel.direct == [((7, 1, 1), (*pointers, (HIGH + 48, HIGH), 0.2, 0.5, 3, True, 1024))]


@pytest.mark.parametrize("odd", [HIGH + 8, HIGH + 1, 0, 1 << 20])
def test_other_addresses_go_through_the_binder(odd: int) -> None:
    """Before and after, and what is compiled for them serves no others."""
    kernel = Kernel()
    launch, _ = _launch(kernel)
    for addresses in ((HIGH, odd), (HIGH, HIGH), (odd, HIGH), (HIGH, HIGH)):
        launch(addresses, 0.1, 0.0, 3)
    assert [len(kernel.bound), len(kernel.direct)] == [3, 1]


def test_the_interpreter_compiles_nothing() -> None:
    kernel = Kernel(compiles=False)
    launch, _ = _launch(kernel)
    for _ in range(3):
        launch((HIGH,), 0.1, 0.0, 3)
    assert [len(kernel.bound), len(kernel.direct)] == [3, 0]


def test_usual_is_what_the_binder_specializes_on() -> None:
    """Triton's own answer about an integer: its type, and D where 16 divides it."""
    pytest.importorskip("triton", reason="triton is not installed")
    from triton._C.libtriton import native_specialize_impl
    from triton.backends.compiler import BaseBackend

    for address in (0, 1, 16, 1 << 20, (1 << 31) - 16, 1 << 31, HIGH, HIGH + 8, (1 << 47) - 16):
        told = native_specialize_impl(BaseBackend, address, False, True, True)
        assert usual((HIGH, address)) == (tuple(told) == ("i64", "D")), (address, told)
