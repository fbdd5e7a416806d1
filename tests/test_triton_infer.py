# SPDX-License-Identifier: MIT
"""Triton's `infer` under the interpreter against autograd of F in float64: every family, activation, feed and clamp.

Tiles are 16 x 16 here, so that nodes of 18 entries take several tiles, and rows of their own where they need whole
rows; nodes of 8 fit into one.
"""

from __future__ import annotations

from collections.abc import Callable

import inputs
import pytest
import test_precision
import torch
import truth
from torch import Tensor

import pc_kernels as pck

launches = pytest.importorskip(
    "pc_kernels.backends.triton_launches", reason="triton is not installed", exc_type=ImportError
)

pytestmark = pytest.mark.usefixtures("poison", "one_thread", "triton_interpreter")

SMALL = launches.Launch(16, 16, 16, 4, 2)
Layers = Callable[[list[truth.Node]], list[pck.Layer]]


def _single(value):
    """float32, also inside lists."""
    if isinstance(value, (list, tuple)):
        return [_single(entry) for entry in value]
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value


def _near(got: Tensor, plain: Tensor, want: Tensor, phi: Tensor, what: str) -> None:
    """The README, section 4: at most twice as far from the truth as plain torch, plus 4 eps ||phi||."""
    slack = 4 * torch.finfo(torch.float32).eps * phi.norm()
    mine, theirs = (got.double() - want).norm(), (plain.double() - want).norm()
    assert got.dtype == torch.float32
    assert mine <= 2 * theirs + slack, f"{what}: off by {mine:.2e}, plain torch by {theirs:.2e}"


def _same(nodes: list[truth.Node], x: Tensor, layers: Layers, **options) -> pck.Inference:
    """infer == truth per layer: delta and dW by the rule of rounding, states and energies closely."""
    nodes, x = test_precision._float32(nodes), x.float()
    options = {key: _single(value) for key, value in options.items()}
    with launches.use_schedule(launch=SMALL):
        got = pck.infer(x, layers(nodes), trace=True, **options)
    want = truth.infer(nodes, x, **options)
    with truth.working_in(torch.float32):
        plain = truth.infer(nodes, x, **options)
    grads = pck.weight_grads(x, layers(nodes), got, reduction="sum")
    for i, phi in enumerate(want.phis):
        _near(got.deltas[i], plain.deltas[i], want.deltas[i], phi, f"delta of node {i + 1}")
        _near(grads[i].weight, plain.grads[i]["weight"], want.grads[i]["weight"], phi, f"dW of node {i + 1}")
        if not got.clamped[i]:
            torch.testing.assert_close(got.phis[i].double(), phi, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(got.energy.double(), want.energy, rtol=1e-5, atol=2e-6)
    assert got.backend == "triton"
    assert got.work.products == got.work.lower_bound
    return got


def _hidden(
    name: str, gen: torch.Generator, width: int, act: str | None = None, batch: int = 3
) -> tuple[list[truth.Node], dict]:
    """A chain with the family at nodes 1 and 3 of 4, a Gaussian between and at the end; and what infer takes."""
    feeds = width // 2 if name == "gaussian_full" else width
    act = act or ("softmax" if name == "categorical_probs" else "tanh")
    small = {"gain": 0.5, "lr_scale": 0.1} if name in ("categorical_probs", "poisson") else {}
    nodes = [
        inputs.node(name, gen, 5, width, act, **small),
        inputs.node("gaussian", gen, feeds, 6, "gelu"),
        inputs.node(name, gen, 6, width, act, **small),
        inputs.node("gaussian", gen, feeds, 3, "silu"),
    ]
    noise = [inputs.normal(gen, batch, feeds) if i % 2 == 0 else None for i in range(4)]
    sampled = {"noise": noise} if name == "gaussian_full" else {}
    return nodes, {"x": inputs.normal(gen, batch, 5), "target": inputs.normal(gen, batch, 3), **sampled}


@pytest.mark.parametrize(
    ("name", "width"), [*((name, 18) for name in truth.ENERGIES), ("categorical", 8), ("categorical_probs", 8)]
)
def test_every_family_inside(name: str, width: int, gen: torch.Generator, layers: Layers) -> None:
    nodes, call = _hidden(name, gen, width)
    _same(nodes, layers=layers, steps=3, lr=0.1, momentum=0.5, **call)


@pytest.mark.parametrize("width", [8, 18])
@pytest.mark.parametrize("name", ["categorical", "bernoulli"])
def test_the_euclidean_step(name: str, width: int, gen: torch.Generator, layers: Layers) -> None:
    nodes, call = _hidden(name, gen, width)
    nodes[0].step = nodes[2].step = "euclidean"
    _same(nodes, layers=layers, steps=3, lr=0.2, momentum=0.9, **call)


@pytest.mark.parametrize("name", truth.ENERGIES)
def test_every_family_as_output(name: str, gen: torch.Generator, layers: Layers) -> None:
    """One sample; a target with hard values."""
    nodes = [inputs.node("laplace", gen, 5, 17, "sigmoid"), inputs.node(name, gen, 17, 4)]
    _same(nodes, inputs.normal(gen, 1, 5), layers, target=inputs.target(name, gen, 1, 4), steps=3, lr=0.05)


@pytest.mark.parametrize("width", [5, 19])
def test_index_target(width: int, gen: torch.Generator, layers: Layers) -> None:
    nodes = inputs.paper("M2", gen, (5, 7, 6, 4, width))
    _same(nodes, inputs.normal(gen, 3, 5), layers, target=torch.tensor([2, 0, width - 1]), steps=4)


@pytest.mark.parametrize(("name", "width"), [*((name, 4) for name in truth.ENERGIES), ("categorical", 18)])
def test_every_family_free_at_the_output(name: str, width: int, gen: torch.Generator, layers: Layers) -> None:
    feed = "identity" if name == "gaussian_full" else None
    nodes = [inputs.node("gaussian", gen, 5, 7, "tanh"), inputs.node(name, gen, 7, width, gain=0.5, feed=feed)]
    phis = [inputs.normal(gen, 3, 7), inputs.state(name, gen, 3, width)]
    _same(nodes, inputs.normal(gen, 3, 5), layers, phis=phis, steps=3, lr=0.05, momentum=0.5)


@pytest.mark.parametrize("name", truth.ENERGIES)
def test_held_and_masked_entries(name: str, gen: torch.Generator, layers: Layers) -> None:
    nodes, call = _hidden(name, gen, 18 if name in ("categorical", "gaussian_full") else 8)
    width = len(nodes[0].weight)
    held, start = inputs.normal(gen, 3, width) > 0, inputs.state(name, gen, 3, width)
    hidden, seen = inputs.normal(gen, 3, width) > -0.5, inputs.normal(gen, 1, 3) > 0
    hidden[:, 0] = seen[:, 0] = True
    got = _same(
        nodes, layers=layers, steps=3, momentum=0.5, **call,
        clamp=[held, None, None, None], phis=[start, None, None, None], masks=[None, None, hidden, seen],
    )  # fmt: skip
    assert torch.equal(got.phis[0][held], start.float()[held])
    assert (got.phis[0][~held] != start.float()[~held]).any()


@pytest.mark.parametrize("name", truth.ENERGIES)
def test_a_node_held_whole_passes_its_target_on(name: str, gen: torch.Generator, layers: Layers) -> None:
    nodes, call = _hidden(name, gen, 18 if name in ("categorical", "gaussian_full") else 8)
    phis = [None, None, inputs.target(name, gen, 3, len(nodes[2].weight)), None]
    if name == "gaussian_full":
        call["noise"][2] = None
    _same(nodes, layers=layers, steps=3, clamp=[None, None, True, None], phis=phis, **call)


@pytest.mark.parametrize("name", truth.ACTIVATIONS)
def test_every_activation_and_feed(name: str, gen: torch.Generator, layers: Layers) -> None:
    nodes = [
        inputs.node("gaussian", gen, 5, 18, name, feed=name),
        inputs.node("gaussian_full", gen, 18, 6, name, feed=name),
        inputs.node("laplace", gen, 6, 7, name, feed=name),
        inputs.node("gaussian", gen, 7, 3, name),
    ]
    _same(nodes, inputs.normal(gen, 3, 5), layers, target=inputs.normal(gen, 3, 3), steps=3)


def test_a_softmax_over_probabilities_and_diagonal_variances(gen: torch.Generator, layers: Layers) -> None:
    """Rows and single entries of unequal widths in one launch."""
    nodes = [
        inputs.node("gaussian_diag", gen, 5, 18, "softmax"),
        inputs.node("categorical_probs", gen, 18, 19, "softmax", lr_scale=0.05),
        inputs.node("gaussian_diag", gen, 19, 3, "identity", feed="softmax"),
        inputs.node("poisson", gen, 3, 2),
    ]
    target = inputs.target("poisson", gen, 3, 2)
    _same(nodes, inputs.normal(gen, 3, 5), layers, target=target, steps=4, momentum=0.9)


def test_the_floor_of_free_probabilities(gen: torch.Generator, layers: Layers) -> None:
    nodes = inputs.paper("M3-probs", gen, (5, 7, 6, 4, 3))
    nodes[1].weight, nodes[1].lr_scale = 30 * nodes[1].weight, 1e-5
    got = _same(nodes, inputs.normal(gen, 4, 5), layers, target=None, steps=2)
    assert got.phis[1].min() == 1e-6


@pytest.mark.parametrize("model", ["M1", "M3", "M3-PC_F"])
def test_float32_is_as_good_as_plain_torch(model: str, gen: torch.Generator, layers: Layers) -> None:
    nodes = inputs.paper(model, gen, (20, 33, 18, 17, 10))
    target = inputs.target(nodes[-1].energy, gen, 17, 10)
    _same(nodes, inputs.normal(gen, 17, 20), layers, target=target, steps=4)


@pytest.mark.parametrize("steps", [0, 1])
def test_few_steps_and_nothing_to_do(steps: int, gen: torch.Generator, layers: Layers) -> None:
    nodes, x = inputs.paper("M3", gen, (5, 7, 6, 4, 3)), inputs.normal(gen, 2, 5)
    _same(nodes, x, layers, target=inputs.target("categorical", gen, 2, 3), steps=steps)
    still = _same(nodes, x, layers, steps=steps)  # no target: a fixed point
    assert (still.deltas[0] == 0).all()
    assert still.work.products == 4


def test_missing_biases_and_strided_memory(gen: torch.Generator, layers: Layers) -> None:
    nodes = inputs.paper("M2", gen, (5, 7, 6, 4, 3))
    nodes[0].bias = nodes[3].bias = None
    nodes[1].weight = nodes[1].weight.T.contiguous().T
    x, phis = inputs.normal(gen, 5, 8).T[::2], [inputs.normal(gen, 7, 4).T, None, None, None]
    _same(nodes, x, layers, target=inputs.target("categorical", gen, 3, 4).T, phis=phis, steps=3)


def test_an_empty_batch(gen: torch.Generator, layers: Layers) -> None:
    made = layers(test_precision._float32(inputs.paper("M2", gen, (5, 7, 6, 4, 3))))
    got = pck.infer(torch.zeros(0, 5), made, target=torch.zeros(0, dtype=torch.int64), steps=3, trace=True)
    assert [tuple(phi.shape) for phi in got.phis[:3]] == [(0, 7), (0, 6), (0, 4)]
    assert torch.equal(got.energy, torch.zeros(4, 4))


@pytest.mark.parametrize("precision", ["tf32", "bf16", "bf16_delta"])
def test_precision_modes(precision: str, gen: torch.Generator, layers: Layers) -> None:
    """Errors of the deltas per layer as large as those of the emulation by hand, which rounds what the README says."""
    nodes = test_precision._float32(inputs.paper("M1", gen, (48, 40, 40, 40, 10)))
    x = inputs.normal(gen, 16, 48, dtype=torch.float32)
    target = inputs.normal(gen, 16, 10, dtype=torch.float32).tanh()
    got = pck.infer(x, layers(nodes), target=target, steps=8, precision=precision)
    exact, hand = (test_precision._emulated(nodes, x, target, 8, name) for name in ("fp32", precision))
    for mine, theirs, right in zip(got.deltas, hand, exact, strict=True):
        size = right.norm()
        error, expected = (mine.double() - right).norm() / size, (theirs - right).norm() / size
        assert 0.5 * expected <= error <= 2 * expected
        assert (mine.double() - theirs).norm() <= 0.2 * (theirs - right).norm()  # the same roundings, but for ties


@pytest.mark.parametrize("precision", ["bf16_delta", "tf32"])
def test_reduced_precision_with_rows(precision: str, gen: torch.Generator, layers: Layers) -> None:
    """Samples, softmaxes over several tiles and inner targets keep reading the operands that the others write."""
    nodes = [
        inputs.node("gaussian_full", gen, 5, 20, "tanh"),
        inputs.node("categorical", gen, 10, 18),
        inputs.node("gaussian", gen, 18, 6, "tanh"),
        inputs.node("categorical", gen, 6, 4),
    ]
    nodes, x = test_precision._float32(nodes), inputs.normal(gen, 3, 5, dtype=torch.float32)
    target, noise = (
        inputs.target("categorical", gen, 3, 4).float(),
        [inputs.normal(gen, 3, 10).float(), None, None, None],
    )
    options = {"target": target, "noise": noise, "steps": 5}
    with launches.use_schedule(launch=SMALL):
        got = pck.infer(x, layers(nodes), precision=precision, **options)
    want = truth.infer(nodes, x, **options)
    for mine, right, fraction in zip(got.deltas, want.deltas, (0.1, 0.05, 0.02, 0.02), strict=True):
        assert (mine.double() - right).norm() <= fraction * right.norm()
