# SPDX-License-Identifier: MIT
"""What each lane of a warp holds for a product on tensor cores, and the rounding to bfloat16; by their definitions."""

from __future__ import annotations

import ctypes

import cuda_host
import pytest
import torch

pytestmark = pytest.mark.skipif(cuda_host.CXX is None, reason="no C++ compiler")


@pytest.mark.parametrize("across", [False, True])
def test_lanes_of_a_tile(across: bool, gen: torch.Generator) -> None:
    """Small whole numbers: exact in bfloat16, their sums in float32."""
    left = torch.randint(-8, 9, (32, 24) if across else (16, 40), generator=gen).bfloat16()
    lines = torch.randint(-8, 9, (32, 8), generator=gen).bfloat16()
    out = torch.full((16, 8), float("nan"))
    pointers = [ctypes.c_void_p(cuda_host.pointer(tensor)) for tensor in (left, lines, out)]
    run = cuda_host.library("mma").multiply_tile
    run(pointers[0], left.shape[1], ctypes.c_bool(across), pointers[1], pointers[2])
    want = (left[:, :16].float().T if across else left[:, :32].float()) @ lines.float()
    assert torch.equal(out, want)


def test_rounding_to_bfloat16(gen: torch.Generator) -> None:
    bits = torch.randint(-(2**31), 2**31, (100_000,), generator=gen).to(torch.int32)
    ties = torch.arange(0, 2**22, 2**15, dtype=torch.int32) + 0x3F800000
    x = torch.cat([bits, ties, torch.tensor([0x7F800000, 0x7F7FFFFF, 1, 0], dtype=torch.int32)]).view(torch.float32)
    out = torch.empty(len(x), dtype=torch.int16)
    pointers = [ctypes.c_void_p(cuda_host.pointer(tensor)) for tensor in (x, out)]
    cuda_host.library("mma").round_bf16(pointers[0], len(x), pointers[1])
    mine, theirs = out.view(torch.bfloat16), x.bfloat16()
    assert torch.equal(mine.isnan(), theirs.isnan())
    assert torch.equal(mine[~mine.isnan()], theirs[~theirs.isnan()])
