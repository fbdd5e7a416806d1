# SPDX-License-Identifier: MIT
"""The Triton mathematics against float64: numerics in units of the last place, activations, feeds, row functions.

Interpreted without a GPU, compiled with one. The energies are tested through the ops (test_triton_layer_ops.py).
"""

from __future__ import annotations

from collections.abc import Callable

import inputs
import pytest
import torch
import truth
from torch import Tensor

triton = pytest.importorskip("triton", minversion="3.6")
import triton.language as tl  # noqa: E402

from pc_kernels.backends import triton_math as math  # noqa: E402
from pc_kernels.backends import triton_numerics as numerics  # noqa: E402

pytestmark = pytest.mark.usefixtures("poison", "triton_interpreter")

EXP, EXPM1, LOG, LOG1P, TANH, SIGMOID, SOFTPLUS, NORMAL, BFLOAT16 = range(9)
ELEMENTWISE = tuple(name for name in truth.ACTIVATIONS if name != "softmax")


@triton.jit
def number_kernel(x, y, n, WHICH: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    value = tl.load(x + i, mask=i < n, other=0.0)
    out = value
    if WHICH == 0:
        out = numerics.exp(value)
    if WHICH == 1:
        out = numerics.expm1(value)
    if WHICH == 2:
        out = numerics.log(value)
    if WHICH == 3:
        out = numerics.log1p(value)
    if WHICH == 4:
        out = numerics.tanh(value)
    if WHICH == 5:
        out = numerics.sigmoid(value)
    if WHICH == 6:
        out = numerics.softplus(value)
    if WHICH == 7:
        out = numerics.normal_cdf(value)[0]
    if WHICH == 8:
        out = numerics.round_to_bfloat16(value)
    tl.store(y + i, out, mask=i < n)


@triton.jit
def activation_kernel(a, grad, mu, delta, n, code, PRESENT: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x = tl.load(a + i, mask=i < n, other=0.0)
    value = math.activate(x, code, PRESENT)
    tl.store(mu + i, value, mask=i < n)
    slope = tl.load(grad + i, mask=i < n, other=0.0)
    tl.store(delta + i, math.activation_vjp(x, value, slope, code, PRESENT), mask=i < n)


@triton.jit
def row_kernel(x, grad, keep, p, pulled, width, SOFTMAX: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    column = tl.arange(0, BLOCK)[None, :]
    at = tl.arange(0, ROWS)[:, None] * width + column
    valid = (column < width) & (at >= 0)
    visible = valid & (tl.load(keep + at, mask=valid, other=0) != 0)
    first, second = tl.load(x + at, mask=valid, other=0.0), tl.load(grad + at, mask=valid, other=0.0)
    if SOFTMAX:
        value, _, _ = math.softmax_row(first, visible)
        out = math.softmax_vjp(value, second)
    else:
        value = first
        out = math.softmax_delta(second, first, visible)
    tl.store(p + at, value, mask=valid)
    tl.store(pulled + at, out, mask=valid)


@triton.jit
def sample_kernel(u, s, noise, grad, z, to_s, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    mean, log_var = tl.load(u + i, mask=i < n, other=0.0), tl.load(s + i, mask=i < n, other=0.0)
    eps, slope = tl.load(noise + i, mask=i < n, other=0.0), tl.load(grad + i, mask=i < n, other=0.0)
    tl.store(z + i, math.sample_feed(mean, log_var, eps), mask=i < n)
    tl.store(to_s + i, math.sample_vjp_s(log_var, eps, slope), mask=i < n)


def _numbers(which: int, x: Tensor) -> Tensor:
    out = torch.empty_like(x)
    number_kernel[(1,)](x, out, len(x), which, triton.next_power_of_2(len(x)))
    return out


def _spread(low: float, high: float, gen: torch.Generator, n: int = 4000) -> Tensor:
    where = torch.rand(n, generator=gen, dtype=torch.float64, device="cpu")
    return (low + (high - low) * where).to(torch.get_default_device(), torch.float32)


def _normal_cdf(x: Tensor) -> Tensor:
    return 0.5 * torch.special.erfc(-x * 0.5**0.5)


CASES: list[tuple[int, Callable[[Tensor], Tensor], tuple[float, float], float]] = [
    (EXP, torch.exp, (-87.0, 88.0), 2.0),
    (EXP, torch.exp, (-1.0, 1.0), 2.0),
    (EXPM1, torch.expm1, (-30.0, 88.0), 2.0),
    (EXPM1, torch.expm1, (-1e-3, 1e-3), 2.0),
    (LOG, torch.log, (1e-30, 1e-20), 2.0),
    (LOG, torch.log, (0.5, 2.0), 2.0),
    (LOG1P, torch.log1p, (-0.999, 3.0), 2.0),
    (LOG1P, torch.log1p, (-1e-6, 1e-6), 2.0),
    (TANH, torch.tanh, (-12.0, 12.0), 4.0),
    (TANH, torch.tanh, (-1e-3, 1e-3), 4.0),
    (SIGMOID, torch.sigmoid, (-85.0, 85.0), 4.0),
    (SOFTPLUS, lambda x: torch.logaddexp(x, torch.zeros_like(x)), (-85.0, 85.0), 4.0),
    (NORMAL, _normal_cdf, (-12.5, 6.0), 10.0),
]


@pytest.mark.parametrize(("which", "function", "span", "ulps"), CASES)
def test_numbers(which: int, function: Callable, span: tuple[float, float], ulps: float, gen: torch.Generator) -> None:
    x = _spread(*span, gen)
    want = function(x.double())
    error = (_numbers(which, x).double() - want).abs() / want.abs().clamp_min(1e-37)
    assert error.max() <= ulps * 2**-23, x[error.argmax()].item()


@pytest.mark.parametrize(
    ("which", "x", "want"),
    [
        (EXP, [torch.inf, -torch.inf, 200.0, -200.0, 0.0], [torch.inf, 0.0, torch.inf, 0.0, 1.0]),
        (EXPM1, [torch.inf, -torch.inf, 0.0], [torch.inf, -1.0, 0.0]),
        (LOG, [torch.inf, 0.0, -1.0, 1.0], [torch.inf, -torch.inf, torch.nan, 0.0]),
        (LOG1P, [torch.inf, -1.0, -2.0, 0.0], [torch.inf, -torch.inf, torch.nan, 0.0]),
        (TANH, [torch.inf, -torch.inf, 0.0], [1.0, -1.0, 0.0]),
        (NORMAL, [torch.inf, -torch.inf, 0.0], [1.0, 0.0, 0.5]),
    ],
)
def test_edges(which: int, x: list[float], want: list[float]) -> None:
    got = _numbers(which, torch.tensor([*x, torch.nan]))
    torch.testing.assert_close(got, torch.tensor([*want, torch.nan]), rtol=0.0, atol=1e-7, equal_nan=True)


def test_rounding_to_bfloat16_is_torchs(gen: torch.Generator) -> None:
    x = inputs.normal(gen, 4000, dtype=torch.float32)
    ties = torch.tensor([1.00390625, 1.01171875, -1.00390625, 3.4e38, torch.inf, torch.nan, 0.0, 1e-40])
    x = torch.cat([x, ties])
    torch.testing.assert_close(_numbers(BFLOAT16, x), x.bfloat16().float(), rtol=0.0, atol=0.0, equal_nan=True)


def _activated(name: str, a: Tensor, grad: Tensor, present: int) -> tuple[Tensor, Tensor]:
    mu, delta = torch.empty_like(a), torch.empty_like(a)
    code = math.ACTIVATION_CODES[name]
    activation_kernel[(1,)](a, grad, mu, delta, len(a), code, present, triton.next_power_of_2(len(a)))
    return mu, delta


def _expected(name: str, a: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    a = a.double().requires_grad_()
    mu = truth.ACTIVATIONS[name](a)
    return mu.detach(), torch.autograd.grad(mu, a, grad.double())[0]


@pytest.mark.parametrize("alone", [True, False])
@pytest.mark.parametrize("name", ELEMENTWISE)
def test_activations(name: str, alone: bool, gen: torch.Generator) -> None:
    a, grad = 3 * inputs.normal(gen, 500, dtype=torch.float32), inputs.normal(gen, 500, dtype=torch.float32)
    codes = [math.ACTIVATION_CODES[name]] if alone else math.ACTIVATION_CODES.values()
    for got, want in zip(_activated(name, a, grad, math.present(codes)), _expected(name, a, grad), strict=True):
        torch.testing.assert_close(got.double(), want, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_activations_at_kinks_and_far_out(name: str) -> None:
    points = [0.0, -1.0, 1.0, -30.0, 30.0, -100.0, 100.0, -1000.0, 1000.0]
    a = torch.tensor(points)
    for got, want in zip(
        _activated(name, a, torch.ones_like(a), 1023), _expected(name, a, torch.ones_like(a)), strict=True
    ):
        torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=1e-15)  # the truth's own 1 - sigmoid(30)


def test_gelu_keeps_relative_accuracy_in_the_tail() -> None:
    a = torch.linspace(-12.5, -3, 200)
    got, _ = _activated("gelu", a, torch.ones_like(a), 1023)
    want = a.double() * _normal_cdf(a.double())
    torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("width", [1, 3, 17, 130])
def test_softmax_and_its_derivative(width: int, gen: torch.Generator) -> None:
    x, grad = (3 * inputs.normal(gen, 4, width, dtype=torch.float32) for _ in range(2))
    keep = inputs.normal(gen, 4, width) > 0
    keep[:, 0] = True
    p, pulled = torch.empty_like(x), torch.empty_like(x)
    row_kernel[(1,)](x, grad, keep.view(torch.uint8), p, pulled, width, True, 4, triton.next_power_of_2(width))
    leaf = x.double().requires_grad_()
    want = truth.softmax(leaf, keep)
    torch.testing.assert_close(p.double(), want.detach(), rtol=2e-6, atol=1e-9)
    assert not p[~keep].any()
    (back,) = torch.autograd.grad(want, leaf, grad.double())
    torch.testing.assert_close(pulled.double(), back, rtol=1e-5, atol=1e-6)


def test_softmax_delta(gen: torch.Generator) -> None:
    """mu sum(phi) - phi, also where mu underflows and 1 - phi/mu overflows."""
    mu = torch.tensor([[80.0, 0.0, -80.0], [0.1, 0.2, 0.3]]).softmax(-1)
    phi = torch.tensor([[0.0, 0.0, 1.0], [0.2, 0.5, 0.1]])
    keep, out = torch.ones(2, 3, dtype=torch.uint8), torch.empty(2, 3)
    row_kernel[(1,)](mu, phi, keep, torch.empty(2, 3), out, 3, False, 2, 4)
    want = mu.double() * phi.double().sum(-1, keepdim=True) - phi.double()
    torch.testing.assert_close(out.double(), want, rtol=1e-6, atol=1e-7)


def test_sample_and_its_derivative(gen: torch.Generator) -> None:
    u, s, noise, grad = (inputs.normal(gen, 50, dtype=torch.float32) for _ in range(4))
    z, to_s = torch.empty_like(u), torch.empty_like(u)
    sample_kernel[(1,)](u, s, noise, grad, z, to_s, 50, 64)
    leaf = s.double().requires_grad_()
    want = u.double() + (0.5 * leaf).exp() * noise.double()
    torch.testing.assert_close(z.double(), want.detach(), rtol=2e-6, atol=1e-6)
    torch.testing.assert_close(to_s.double(), torch.autograd.grad(want, leaf, grad.double())[0], rtol=2e-6, atol=1e-7)


def test_the_names_are_the_tables() -> None:
    assert tuple(math.ENERGY_CODES) == truth.ENERGIES
    assert tuple(math.ACTIVATION_CODES) == tuple(truth.ACTIVATIONS)
