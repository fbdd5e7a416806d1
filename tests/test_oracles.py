# SPDX-License-Identifier: MIT
"""Oracles of the README's section 5 that need no autograd: linear equilibria, exact fixed points, descent,
independent samples."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import inputs
import pytest
import torch
import truth
from torch import Tensor

import pc_kernels as pck

pytestmark = pytest.mark.usefixtures("poison", "one_thread")

Layers = Callable[[list[truth.Node]], list[pck.Layer]]
DIMS = (5, 6, 4, 5, 3)


def _linear(gen: torch.Generator) -> list[Tensor]:
    return [inputs.normal(gen, into, out).T / into**0.5 for into, out in pairwise(DIMS)]


def _equilibrium(weights: list[Tensor], x: Tensor, y: Tensor) -> list[Tensor]:
    """Solves dF/dphi_l = 0: (1 + W'_{l+1} W_{l+1}) phi_l - W_l phi_{l-1} - W'_{l+1} phi_{l+1} = 0, l = 1..L-1."""
    sizes = [len(w) for w in weights[:-1]]
    starts = [sum(sizes[:i]) for i in range(len(sizes) + 1)]
    system, right = torch.zeros(starts[-1], starts[-1], dtype=x.dtype), torch.zeros(starts[-1], len(x), dtype=x.dtype)
    for i, size in enumerate(sizes):
        rows, above = slice(starts[i], starts[i + 1]), weights[i + 1]
        system[rows, rows] = torch.eye(size, dtype=x.dtype) + above.T @ above
        if i:
            system[rows, starts[i - 1] : starts[i]] = -weights[i]
            system[starts[i - 1] : starts[i], rows] = -weights[i].T
    right[: sizes[0]] = weights[0] @ x.T
    right[starts[-2] :] += weights[-1].T @ y.T
    return list(torch.linalg.solve(system, right).T.split(sizes, 1))


@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_equilibrium_of_a_deep_linear_network(momentum: float, gen: torch.Generator, infer_backend: str) -> None:
    weights, x, y = _linear(gen), inputs.normal(gen, 3, 5), inputs.normal(gen, 3, 3)
    options = {"steps": 3000, "lr": 0.2, "momentum": momentum, "tol": 1e-13, "trace": True}
    got = pck.infer(x, [pck.Layer(w) for w in weights], target=y, **options)
    assert 0 < got.steps < 3000
    for phi, want in zip(got.phis, _equilibrium(weights, x, y), strict=False):
        torch.testing.assert_close(phi, want, rtol=1e-11, atol=1e-12)
    assert got.energy is not None
    through = torch.eye(3, dtype=torch.float64)
    covariance = torch.eye(3, dtype=torch.float64)
    for w in reversed(weights[1:]):
        through = through @ w
        covariance += through @ through.T
    residual = y - x @ (through @ weights[0]).T
    want = 0.5 * (residual @ torch.linalg.inv(covariance) * residual).sum(1).mean()
    torch.testing.assert_close(got.energy[-1].sum(), want, rtol=1e-11, atol=0.0)


def test_gradients_at_the_linear_equilibrium(gen: torch.Generator, infer_backend: str) -> None:
    """At equilibrium delta_l = W'_{l+1} delta_{l+1}, and the last one is -S^-1 r."""
    weights, x, y = _linear(gen), inputs.normal(gen, 3, 5), inputs.normal(gen, 3, 3)
    layers = [pck.Layer(w) for w in weights]
    got = pck.infer(x, layers, target=y, phis=[*_equilibrium(weights, x, y), None], steps=0)
    for i in range(3):
        torch.testing.assert_close(got.deltas[i], got.deltas[i + 1] @ weights[i + 1], rtol=1e-10, atol=1e-12)
    values = [x, *got.phis[:-1]]
    for grad, delta, value in zip(pck.weight_grads(x, layers, got, reduction="sum"), got.deltas, values, strict=True):
        torch.testing.assert_close(grad.weight, delta.T @ value, rtol=1e-12, atol=1e-13)
        assert grad.bias is None
        assert grad.log_var is None


def _mixed(
    name: str, gen: torch.Generator, dtype: torch.dtype, rule: str | None = None
) -> tuple[list[truth.Node], dict]:
    act = "softmax" if name == "categorical_probs" else "tanh"
    feeds = 3 if name == "gaussian_full" else 6
    extra = {"step": rule, "lr_scale": 0.05 if name == "categorical_probs" else 1.0}
    nodes = [
        inputs.node(name, gen, 5, 6, act, dtype=dtype, **extra),
        inputs.node("gaussian", gen, feeds, 4, "gelu", dtype=dtype),
        inputs.node(name, gen, 4, 6, act, dtype=dtype, **extra),
        inputs.node("gaussian", gen, feeds, 3, dtype=dtype),
    ]
    noise = inputs.normal(gen, 7, 3, dtype=dtype) if name == "gaussian_full" else None
    return nodes, {"noise": [noise, None, noise, None] if noise is not None else None}


RULES = [(name, None) for name in truth.ENERGIES] + [("categorical", "euclidean"), ("bernoulli", "euclidean")]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("name", "rule"), RULES)
def test_unclamped_forward_states_are_an_exact_fixed_point(
    name: str, rule: str | None, dtype: torch.dtype, gen: torch.Generator, layers: Layers, infer_backend: str
) -> None:
    """Also when the states are given, so that no light cone can hide an error."""
    nodes, options = _mixed(name, gen, dtype, rule)
    x, made = inputs.normal(gen, 7, 5, dtype=dtype), layers(nodes)
    start = pck.infer(x, made, steps=0, **options)
    for phis in (None, [phi.clone() for phi in start.phis]):
        moved = pck.infer(x, made, steps=5, lr=0.3, momentum=0.9, phis=phis, **options)
        for a, b in zip(moved.phis, start.phis, strict=True):
            assert torch.equal(a, b)
        for delta in moved.deltas:
            assert torch.equal(delta, torch.zeros_like(delta))


@pytest.mark.parametrize("name", truth.ENERGIES)
def test_states_move_once_the_output_is_clamped(
    name: str, gen: torch.Generator, layers: Layers, infer_backend: str
) -> None:
    """The counterpart of the fixed point: every free node feels a target."""
    nodes, options = _mixed(name, gen, torch.float64)
    x, y = inputs.normal(gen, 7, 5), inputs.normal(gen, 7, 3)
    start = pck.infer(x, layers(nodes), steps=0, **options)
    moved = pck.infer(x, layers(nodes), target=y, steps=5, **options)
    for a, b in zip(moved.phis[:-1], start.phis[:-1], strict=True):
        assert (a != b).any(1).all()


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize(("name", "rule"), RULES)
def test_energy_never_increases(
    name: str, rule: str | None, given: bool, gen: torch.Generator, layers: Layers, infer_backend: str
) -> None:
    nodes, options = _mixed(name, gen, torch.float64, rule)
    x, y = inputs.normal(gen, 7, 5), inputs.normal(gen, 7, 3)
    phis: list[Tensor | None] = [inputs.state(n.energy, gen, 7, len(n.weight)) if given else None for n in nodes]
    got = pck.infer(x, layers(nodes), target=y, phis=[*phis[:-1], None], steps=80, lr=5e-3, trace=True, **options)
    assert got.energy is not None
    total = got.energy.sum(1)
    assert (total.diff() <= 0).all()
    assert total[-1] < 0.99 * total[0] if name != "gaussian_diag" else total[-1] < total[0] - 0.01


@pytest.mark.parametrize("tol", [None, 0.05])
@pytest.mark.parametrize("name", truth.ENERGIES)
def test_a_sample_does_not_see_its_batch(
    name: str, tol: float | None, gen: torch.Generator, layers: Layers, infer_backend: str
) -> None:
    nodes, options = _mixed(name, gen, torch.float64)
    x, y, made = inputs.normal(gen, 7, 5), inputs.normal(gen, 7, 3), layers(nodes)
    together = pck.infer(x, made, target=y, steps=12, lr=0.1, tol=tol, **options)
    for rows in (slice(2, 3), slice(3, 7)):
        part = options | {"noise": options["noise"] and [n if n is None else n[rows] for n in options["noise"]]}
        alone = pck.infer(x[rows], made, target=y[rows], steps=12, lr=0.1, tol=tol, **part)
        for a, b in zip(alone.phis + alone.deltas, together.phis + together.deltas, strict=True):
            torch.testing.assert_close(a, b[rows], rtol=1e-12, atol=1e-13)


def test_backprop_is_the_first_cone(gen: torch.Generator, layers: Layers, infer_backend: str) -> None:
    """Z-IL (Gaussian, lr 1): after L - l moves delta_l is the backpropagated gradient."""
    nodes = inputs.paper("M1", gen, (5, 7, 6, 4, 3))
    x, y = inputs.normal(gen, 4, 5), inputs.normal(gen, 4, 3)
    pre, value = [], x
    for node in nodes:
        pre.append((value @ node.weight.T + node.bias).requires_grad_())
        value = pre[-1].tanh()
    wanted = torch.autograd.grad(0.5 * ((value - y) ** 2).sum(), pre)
    for i in range(4):
        got = pck.infer(x, layers(nodes), target=y, steps=3 - i, lr=1.0)
        torch.testing.assert_close(got.deltas[i], wanted[i], rtol=1e-11, atol=1e-12)


def test_natural_step_is_mirror_descent(gen: torch.Generator, infer_backend: str) -> None:
    """the README's section 2: p <- p^(1 - lr) q^lr exp(-lr g) / Z for a categorical node; here g = W' delta of a
    Gaussian above."""
    below, above = inputs.normal(gen, 6, 5), inputs.normal(gen, 3, 6)
    x, y, phi = inputs.normal(gen, 4, 5), inputs.normal(gen, 4, 3), inputs.normal(gen, 4, 6)
    chain = [pck.Layer(below, energy="categorical"), pck.Layer(above)]
    got = pck.infer(x, chain, target=y, phis=[phi, None], steps=1, lr=0.3).phis[0].softmax(1)
    p, q = phi.softmax(1), (x @ below.T).softmax(1)
    want = p**0.7 * q**0.3 * torch.exp(-0.3 * (p @ above.T - y) @ above)
    torch.testing.assert_close(got, want / want.sum(1, keepdim=True), rtol=1e-12, atol=1e-14)
