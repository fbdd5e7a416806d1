# SPDX-License-Identifier: MIT
"""Every activation: value and derivative as `infer` uses them, against torch.nn.functional in float64."""

from __future__ import annotations

import inputs
import pytest
import torch
import truth
from torch import Tensor

import pc_kernels as pck

pytestmark = pytest.mark.usefixtures("poison", "one_thread")

ELEMENTWISE = tuple(name for name in truth.ACTIVATIONS if name != "softmax")
KINKS = {"relu": [0.0, -0.0], "leaky_relu": [0.0, -0.0], "hardtanh": [-1.0, 1.0]}
DTYPES = (torch.float64, torch.float32)


def _through(name: str, a: Tensor, slope: Tensor, energy: str = "gaussian") -> tuple[Tensor, Tensor]:
    """mu = act(a), and delta = act'(a)^T slope: the target lies `slope` below mu, so that dE/dmu = slope."""
    layer = pck.Layer(torch.eye(a.shape[1], dtype=a.dtype), activation=name, energy=energy)
    mu = pck.infer(a, [layer], steps=0).phis[0]
    return mu, pck.infer(a, [layer], target=mu - slope, steps=0).deltas[0]


def _expected(name: str, a: Tensor, slope: Tensor) -> tuple[Tensor, Tensor]:
    a = a.detach().double().requires_grad_()
    mu = truth.ACTIVATIONS[name](a)
    return mu.detach(), torch.autograd.grad(mu, a, slope.double())[0]


def test_names_are_the_documented_ones() -> None:
    assert tuple(truth.ACTIVATIONS) == pck.ACTIVATIONS


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", truth.ACTIVATIONS)
def test_value_and_derivative(name: str, dtype: torch.dtype, gen: torch.Generator, infer_backend: str) -> None:
    a, slope = 2 * inputs.normal(gen, 11, 7, dtype=dtype), inputs.normal(gen, 11, 7, dtype=dtype)
    tolerance = {"rtol": 1e-12, "atol": 1e-13} if dtype == torch.float64 else {"rtol": 1e-5, "atol": 2e-6}
    for got, want in zip(_through(name, a, slope), _expected(name, a, slope), strict=True):
        assert got.dtype == dtype
        torch.testing.assert_close(got.double(), want, **tolerance)


@pytest.mark.parametrize("name", KINKS)
def test_torchs_convention_at_the_kinks(name: str, infer_backend: str) -> None:
    a = torch.tensor([KINKS[name]], dtype=torch.float64)
    slope = torch.ones_like(a)
    for got, want in zip(_through(name, a, slope), _expected(name, a, slope), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("size", [30.0, 100.0, 1000.0])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", truth.ACTIVATIONS)
def test_saturation(name: str, dtype: torch.dtype, size: float, infer_backend: str) -> None:
    a = torch.tensor([[-size, size, 0.5 * size]], dtype=dtype)
    slope = torch.tensor([[1.0, -2.0, 0.5]], dtype=dtype)
    for got, want in zip(_through(name, a, slope), _expected(name, a, slope), strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-4 if dtype == torch.float32 else 1e-9)


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_literal_values_at_zero_and_one(name: str, infer_backend: str) -> None:
    """The numbers everybody knows, so that the truth itself is checked once."""
    at_zero = {"sigmoid": (0.5, 0.25), "softplus": (0.6931471805599453, 0.5), "gelu": (0.0, 0.5), "silu": (0.0, 0.5)}
    at_one = {
        "identity": (1.0, 1.0),
        "tanh": (0.7615941559557649, 0.41997434161402614),
        "relu": (1.0, 1.0),
        "leaky_relu": (1.0, 1.0),
        "gelu": (0.8413447460685429, 1.0833154705876864),
        "silu": (0.7310585786300049, 0.9276705118714869),
        "sigmoid": (0.7310585786300049, 0.19661193324148185),
        "softplus": (1.3132616875182228, 0.7310585786300049),
        "hardtanh": (1.0, 0.0),
    }
    points = [(1.0, at_one[name])] + ([(0.0, at_zero[name])] if name in at_zero else [])
    for at, (value, slope) in points:
        one = torch.ones(1, 1, dtype=torch.float64)
        mu, derivative = _through(name, at * one, one)
        assert mu.item() == pytest.approx(value, rel=1e-14)
        assert derivative.item() == pytest.approx(slope, rel=1e-13)


def test_leaky_relu_below_zero(infer_backend: str) -> None:
    one = torch.ones(1, 1, dtype=torch.float64)
    mu, derivative = _through("leaky_relu", -2 * one, one)
    assert (mu.item(), derivative.item()) == (pytest.approx(-0.02), pytest.approx(0.01))


@pytest.mark.parametrize("name", truth.ACTIVATIONS)
def test_every_activation_as_a_feed(name: str, gen: torch.Generator, infer_backend: str, layers) -> None:
    """W @ feed(phi): value (a_2) and derivative (the move of phi)."""
    nodes = [
        inputs.node("gaussian", gen, 4, 5, feed=name),
        inputs.node("gaussian", gen, 5, 3),
    ]
    x, target = inputs.normal(gen, 6, 4), inputs.normal(gen, 6, 3)
    got = pck.infer(x, layers(nodes), target=target, steps=3, lr=0.3)
    want = truth.infer(nodes, x, target=target, steps=3, lr=0.3)
    for a, b in zip(got.phis[:1] + got.deltas, want.phis[:1] + want.deltas, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES)
def test_softmax_is_over_the_last_dimension_and_stable(dtype: torch.dtype, infer_backend: str) -> None:
    a = torch.tensor([[1e4, 1e4, 0.0], [-1e4, -1e4, -1e4]], dtype=dtype)
    mu, _ = _through("softmax", a, torch.zeros_like(a))
    want = torch.tensor([[0.5, 0.5, 0.0], [1 / 3, 1 / 3, 1 / 3]], dtype=dtype)
    torch.testing.assert_close(mu, want)


def test_gaussian_over_saturated_softmax_vanishes(infer_backend: str) -> None:
    """PC_F's weakness, the README's section 2: delta = q * (r - <q, r>) is 0 where q saturates, however wrong the
    answer is."""
    layer = pck.Layer(torch.eye(3, dtype=torch.float64), activation="softmax")
    x = torch.tensor([[60.0, 0.0, 0.0]], dtype=torch.float64)
    target = torch.tensor([[0.0, 1.0, 0.0]], dtype=torch.float64)
    delta = pck.infer(x, [layer], target=target, steps=0).deltas[0]
    assert 0 < delta.abs().max() < 1e-20


@pytest.mark.parametrize("dtype", DTYPES)
def test_categorical_probs_over_softmax(dtype: torch.dtype, gen: torch.Generator, infer_backend: str) -> None:
    """delta = q * sum(phi) - phi, also for a phi that is not normalised."""
    layer = pck.Layer(torch.eye(5, dtype=dtype), activation="softmax", energy="categorical_probs")
    x = inputs.normal(gen, 4, 5, dtype=dtype)
    phi = inputs.normal(gen, 4, 5, dtype=dtype).abs() + 0.1
    got = pck.infer(x, [layer], phis=[phi], steps=0).deltas[0]
    q = x.double().softmax(-1)
    want = q * phi.double().sum(-1, keepdim=True) - phi.double()
    tight = 1e-12 if dtype == torch.float64 else 2e-6
    torch.testing.assert_close(got.double(), want, rtol=tight, atol=tight)


@pytest.mark.parametrize("dtype", DTYPES)
def test_categorical_probs_over_saturated_softmax(dtype: torch.dtype, infer_backend: str) -> None:
    """1 - phi / mu overflows here; delta must not."""
    layer = pck.Layer(torch.eye(3, dtype=dtype), activation="softmax", energy="categorical_probs")
    x = torch.tensor([[80.0, 0.0, -80.0]], dtype=dtype)
    target = torch.tensor([[0.0, 0.0, 1.0]], dtype=dtype)
    got = pck.infer(x, [layer], target=target, steps=0).deltas[0]
    torch.testing.assert_close(got, torch.tensor([[1.0, 0.0, -1.0]], dtype=dtype), rtol=1e-6, atol=1e-6)
