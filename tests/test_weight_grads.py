# SPDX-License-Identifier: MIT
"""The gradients of the M-step, dW_l = delta_l^T v_{l-1} and db_l, on every backend, against sums in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import pc_kernels as pck
from pc_kernels.backends import native

pytestmark = pytest.mark.usefixtures("poison")

OP = torch.ops.pc_kernels.weight_grads
WIDTHS = ((7, 5), (65, 130), (1, 64), (130, 1))  # (D_l, V_{l-1}), of unrelated layers
BATCHES = (0, 1, 2, 31, 255, 256, 257, 600)  # the C++ backend sums blocks of 256 samples


def arguments(size: int, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor], list[bool], float]:
    deltas = [torch.randn(size, width, dtype=dtype) for width, _ in WIDTHS]
    values = [torch.randn(size, inputs, dtype=dtype) for _, inputs in WIDTHS]
    return deltas, values, [True, False, True, True], 1 / max(size, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", BATCHES)
def test_sums_over_the_batch(size: int, dtype: torch.dtype, infer_backend: str) -> None:
    deltas, values, biased, scale = arguments(size, dtype)
    weights, biases = OP(deltas, values, biased, scale)
    eps = torch.finfo(dtype).eps
    for delta, v, there, weight, bias in zip(deltas, values, biased, weights, biases, strict=True):
        products = delta.double().unsqueeze(2) * v.double().unsqueeze(1)  # (B, D, V)
        slack = eps * (products.abs().sum(0) + 1e-300) * 8 * scale
        assert weight.dtype == dtype
        assert ((weight.double() - scale * products.sum(0)).abs() <= slack).all()
        if there:
            slack = eps * delta.double().abs().sum(0) * 8 * scale
            assert ((bias.double() - scale * delta.double().sum(0)).abs() <= slack).all()
        else:
            assert bias.numel() == 0


def test_rows_of_other_strides(infer_backend: str) -> None:
    deltas, values, biased, scale = arguments(40, torch.float32)
    strided = [delta.T.contiguous().T for delta in deltas], [v.repeat(1, 2)[:, : v.shape[1]] for v in values]
    for straight, other in zip(OP(deltas, values, biased, scale), OP(*strided, biased, scale), strict=True):
        for a, b in zip(straight, other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_the_same_bits_for_any_number_of_threads() -> None:
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            weights, biases = OP(*arguments_of_seed(), [True, False, True, True], 0.125)
            found.append([*weights, *biases])
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def arguments_of_seed() -> tuple[list[Tensor], list[Tensor]]:
    torch.manual_seed(3)
    return arguments(300, torch.float32)[:2]


def test_opcheck(infer_backend: str) -> None:
    torch.library.opcheck(OP.default, arguments(5, torch.float32))


BAD = [
    ("values", lambda d, v: (d, v[:-1], [True] * 4, 1.0)),
    ("biased", lambda d, v: (d, v, [True] * 3, 1.0)),
    ("values", lambda d, v: (d, [v[0][:-1], *v[1:]], [True] * 4, 1.0)),
    ("values", lambda d, v: (d, [v[0].double(), *v[1:]], [True] * 4, 1.0)),
]


@pytest.mark.skipif(native.unavailable_reason() is not None, reason=str(native.unavailable_reason()))
@pytest.mark.parametrize(("name", "wrong"), BAD)
def test_the_compiled_op_checks_what_it_reads(name: str, wrong) -> None:
    deltas, values = arguments(5, torch.float32)[:2]
    with pck.use_backend("cpp"), pytest.raises((ValueError, TypeError), match=f"^{name}: wanted"):
        OP(*wrong(deltas, values))
