# SPDX-License-Identifier: MIT
"""`infer` and `weight_grads` against autograd of F in float64: states, deltas, energies, gradients per layer."""

from __future__ import annotations

from collections.abc import Callable

import inputs
import pytest
import torch
import truth
from torch import Tensor

import pc_kernels as pck

pytestmark = pytest.mark.usefixtures("poison", "one_thread")

STEPS = (0, 1, 2, 3, 7)  # four nodes: the light cone is open at 3
Layers = Callable[[list[truth.Node]], list[pck.Layer]]


def _agree(got: Tensor | None, want: Tensor | None, what: str) -> None:
    if want is None or got is None:
        assert got is want, what
        return
    assert got.dtype == torch.float64
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-11, msg=lambda text: f"{what}: {text}")


def _same(nodes: list[truth.Node], x: Tensor, layers: Layers, **options) -> pck.Inference:
    """infer == truth in phis, deltas, trace and steps, and weight_grads == truth for both reductions."""
    made = layers(nodes)
    got, want = pck.infer(x, made, trace=True, **options), truth.infer(nodes, x, **options)
    assert got.steps == want.steps
    target = options.get("target")
    for i in range(len(nodes)):
        if i + 1 < len(nodes) or target is None:
            _agree(got.phis[i], want.phis[i], f"phi of node {i + 1}")
        _agree(got.deltas[i], want.deltas[i], f"delta of node {i + 1}")
    if target is not None:
        assert torch.equal(got.phis[-1], target)
    _agree(got.energy, want.energy, "energy")
    for reduction, scale in (("mean", 1 / len(x)), ("sum", 1.0)):
        grads = pck.weight_grads(x, made, got, reduction=reduction)
        for i, (mine, right) in enumerate(zip(grads, want.grads, strict=True)):
            for key, value in right.items():
                _agree(getattr(mine, key), None if value is None else scale * value, f"{reduction} d{key} of {i + 1}")
    return got


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("model", inputs.PAPER)
def test_the_papers_models(
    model: str, steps: int, momentum: float, gen: torch.Generator, layers: Layers, infer_backend: str
) -> None:
    nodes = inputs.paper(model, gen, (5, 7, 6, 4, 3))
    if model == "M3-probs":
        nodes[1].lr_scale = 0.05
    x = inputs.normal(gen, 4, 5)
    target = inputs.target(nodes[-1].energy, gen, 4, 3)
    got = _same(nodes, x, layers, target=target, steps=steps, lr=0.1, momentum=momentum)
    start = pck.infer(x, layers(nodes), steps=0).phis
    moved = [not torch.equal(a, b) for a, b in zip(got.phis[:-1], start[:-1], strict=True)]
    assert moved == [steps >= 3, steps >= 2, steps >= 1]  # the cone: node l moves from step L - l on


def test_euclidean_m3(gen: torch.Generator, layers: Layers, infer_backend: str) -> None:
    nodes = inputs.paper("M3", gen, (5, 7, 6, 4, 3))
    nodes[1].step = "euclidean"
    x, target = inputs.normal(gen, 4, 5), inputs.target("categorical", gen, 4, 3)
    options = {"target": target, "steps": 7, "lr": 0.3}
    euclidean = _same(nodes, x, layers, **options)
    nodes[1].step = "natural"
    natural = _same(nodes, x, layers, **options)
    assert (euclidean.phis[1] - natural.phis[1]).abs().max() > 1e-4


def _hidden(name: str, gen: torch.Generator) -> tuple[list[truth.Node], Tensor, Tensor, list[Tensor | None] | None]:
    """A chain with the family at nodes 1 and 3 of 4, a Gaussian between and at the end."""
    feeds = 4 if name == "gaussian_full" else 8
    act = "softmax" if name == "categorical_probs" else "tanh"
    small = {"gain": 0.5, "lr_scale": 0.1} if name in ("categorical_probs", "poisson") else {}
    nodes = [
        inputs.node(name, gen, 5, 8, act, **small),
        inputs.node("gaussian", gen, feeds, 6, "gelu"),
        inputs.node(name, gen, 6, 8, act, **small),
        inputs.node("gaussian", gen, feeds, 3, "silu"),
    ]
    noise = [inputs.normal(gen, 4, 4) if i % 2 == 0 else None for i in range(4)] if name == "gaussian_full" else None
    return nodes, inputs.normal(gen, 4, 5), inputs.normal(gen, 4, 3), noise


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("name", truth.ENERGIES)
def test_every_family_inside(name: str, steps: int, gen: torch.Generator, layers: Layers, infer_backend: str) -> None:
    nodes, x, target, noise = _hidden(name, gen)
    _same(nodes, x, layers, target=target, steps=steps, lr=0.1, momentum=0.5, noise=noise)


@pytest.mark.parametrize("rule", ["natural", "euclidean"])
@pytest.mark.parametrize("name", ["categorical", "bernoulli"])
def test_both_rules_with_momentum(
    name: str, rule: str, gen: torch.Generator, layers: Layers, infer_backend: str
) -> None:
    nodes, x, target, _ = _hidden(name, gen)
    nodes[0].step = nodes[2].step = rule
    _same(nodes, x, layers, target=target, steps=7, lr=0.2, momentum=0.9)


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("name", truth.ENERGIES)
def test_every_family_as_output(
    name: str, steps: int, gen: torch.Generator, layers: Layers, infer_backend: str
) -> None:
    nodes = [inputs.node("gaussian", gen, 5, 7, "tanh"), inputs.node("laplace", gen, 7, 6, "sigmoid")]
    nodes.append(inputs.node(name, gen, 6, 4))
    x, target = inputs.normal(gen, 4, 5), inputs.target(name, gen, 4, 4)
    _same(nodes, x, layers, target=target, steps=steps, lr=0.05)


@pytest.mark.parametrize("name", truth.ENERGIES)
def test_every_family_free_at_the_output(name: str, gen: torch.Generator, layers: Layers, infer_backend: str) -> None:
    """No target: the states come from `phis`, and the output relaxes with the rest."""
    feed = "identity" if name == "gaussian_full" else None
    nodes = [inputs.node("gaussian", gen, 5, 7, "tanh"), inputs.node(name, gen, 7, 4, gain=0.5, feed=feed)]
    x, phis = inputs.normal(gen, 4, 5), [inputs.normal(gen, 4, 7), inputs.state(name, gen, 4, 4)]
    _same(nodes, x, layers, phis=phis, steps=5, lr=0.05, momentum=0.5)


@pytest.mark.parametrize("clamped", [False, True])
def test_the_floor_of_free_probabilities(
    clamped: bool, gen: torch.Generator, layers: Layers, infer_backend: str
) -> None:
    """A saturated softmax starts at 1e-6, not at its mu: an error that the node below feels from the first move on."""
    nodes = inputs.paper("M3-probs", gen, (5, 7, 6, 4, 3))
    nodes[1].weight, nodes[1].lr_scale = 30 * nodes[1].weight, 1e-5
    x, target = inputs.normal(gen, 4, 5), inputs.target("categorical", gen, 4, 3) if clamped else None
    start = pck.infer(x, layers(nodes), steps=0).phis
    assert start[1].min() == 1e-6
    for steps in (0, 1, 2, 3):
        got = _same(nodes, x, layers, target=target, steps=steps)
        assert got.phis[1].min() >= 1e-6
        assert torch.equal(got.phis[0], start[0]) == (steps == 0)


def test_index_target(gen: torch.Generator, layers: Layers, infer_backend: str) -> None:
    nodes = inputs.paper("M2", gen, (5, 7, 6, 4, 3))
    _same(nodes, inputs.normal(gen, 4, 5), layers, target=torch.tensor([2, 0, 1, 2]), steps=5)


def test_some_states_given(gen: torch.Generator, layers: Layers, infer_backend: str) -> None:
    """A None entry starts forward, from the states given below it."""
    nodes = inputs.paper("M3", gen, (5, 7, 6, 4, 3))
    x, target = inputs.normal(gen, 4, 5), inputs.target("categorical", gen, 4, 3)
    full: list[Tensor | None] = [inputs.normal(gen, 4, width) for width in (7, 6, 4)]
    for given in ([*full, None], [None, full[1], None, None], [full[0], None, None, None]):
        before = [None if phi is None else phi.clone() for phi in given]
        _same(nodes, x, layers, target=target, phis=given, steps=3)
        assert all(a is None or torch.equal(a, b) for a, b in zip(given, before, strict=True))


def test_no_target_no_states(gen: torch.Generator, layers: Layers, infer_backend: str) -> None:
    _same(inputs.paper("M3", gen, (5, 7, 6, 4, 3)), inputs.normal(gen, 4, 5), layers, steps=4)


@pytest.mark.parametrize("name", truth.ENERGIES)
def test_held_entries(name: str, gen: torch.Generator, layers: Layers, infer_backend: str) -> None:
    nodes, x, target, noise = _hidden(name, gen)
    held = inputs.normal(gen, 4, 8) > 0
    start = inputs.state(name, gen, 4, 8)
    clamp, phis = [held, None, None, None], [start, None, None, None]
    got = _same(nodes, x, layers, target=target, clamp=clamp, phis=phis, steps=5, momentum=0.5, noise=noise)
    assert torch.equal(got.phis[0][held], start[held])
    assert (got.phis[0][~held] != start[~held]).any()


@pytest.mark.parametrize("name", truth.ENERGIES)
def test_a_node_held_whole_passes_its_target_on(
    name: str, gen: torch.Generator, layers: Layers, infer_backend: str
) -> None:
    nodes, x, target, _ = _hidden(name, gen)
    data = inputs.target(name, gen, 4, 8)
    clamp, phis = [None, None, True, None], [None, None, data, None]
    noise = [inputs.normal(gen, 4, 4), None, None, None] if name == "gaussian_full" else None
    _same(nodes, x, layers, target=target, clamp=clamp, phis=phis, steps=5, noise=noise)


@pytest.mark.parametrize("name", truth.ENERGIES)
def test_masks(name: str, gen: torch.Generator, layers: Layers, infer_backend: str) -> None:
    """Missing parts of a hidden node and of the output; a masked class feeds nothing."""
    nodes, x, target, noise = _hidden(name, gen)
    hidden, seen = inputs.normal(gen, 4, 8) > -0.5, inputs.normal(gen, 4, 3) > 0
    hidden[:, 0] = seen[:, 0] = True
    _same(nodes, x, layers, target=target, masks=[None, None, hidden, seen], steps=5, momentum=0.5, noise=noise)
    phis = [None, None, inputs.state(name, gen, 4, 8), None]
    got = _same(nodes, x, layers, target=target, masks=[None, None, hidden, None], phis=phis, steps=3, noise=noise)
    assert torch.equal(got.phis[2][~hidden], phis[2][~hidden])


@pytest.mark.parametrize("model", ["M1", "M3", "M3-probs"])
def test_lr_scale(model: str, gen: torch.Generator, layers: Layers, infer_backend: str) -> None:
    nodes = inputs.paper(model, gen, (5, 7, 6, 4, 3))
    for i, node in enumerate(nodes):
        node.lr_scale = 0.2 * i
    x, target = inputs.normal(gen, 4, 5), inputs.target(nodes[-1].energy, gen, 4, 3)
    got = _same(nodes, x, layers, target=target, steps=7, momentum=0.5)
    assert torch.equal(got.phis[0], pck.infer(x, layers(nodes), steps=0).phis[0])


def test_a_full_gaussian_fed_whole(gen: torch.Generator, layers: Layers, infer_backend: str) -> None:
    """feed="identity": means and log variances are both passed on, no noise is needed."""
    nodes = [inputs.node("gaussian_full", gen, 5, 8, "tanh", feed="identity"), inputs.node("gaussian", gen, 8, 3)]
    _same(nodes, inputs.normal(gen, 4, 5), layers, target=inputs.normal(gen, 4, 3), steps=5)


def test_noise_is_returned_and_used(gen: torch.Generator, layers: Layers, infer_backend: str) -> None:
    """One sampled node: its noise may be given alone, or as its entry in the list."""
    nodes = [inputs.node("gaussian_full", gen, 5, 8, "tanh"), inputs.node("gaussian", gen, 4, 3, "tanh")]
    x, target, noise = inputs.normal(gen, 4, 5), inputs.normal(gen, 4, 3), inputs.normal(gen, 4, 4)
    alone = _same(nodes, x, layers, target=target, noise=noise, steps=4)
    listed = _same(nodes, x, layers, target=target, noise=[noise, None], steps=4)
    other = _same(nodes, x, layers, target=target, noise=-noise, steps=4)
    assert torch.equal(alone.phis[0], listed.phis[0])
    assert (alone.phis[0] - other.phis[0]).abs().max() > 1e-3
    flat = alone.noise if isinstance(alone.noise, (list, tuple)) else [alone.noise]
    assert any(entry is not None and torch.equal(entry, noise) for entry in flat)


TOLERANCES = {
    "gaussian": (0.2, 0.05),
    "categorical": (0.2, 4e-3),
    "bernoulli": (0.2, 4e-3),
    "categorical_probs": (0.4, 0.02),
}


@pytest.mark.parametrize("name", TOLERANCES)
def test_tol_freezes_sample_by_sample(name: str, gen: torch.Generator, layers: Layers, infer_backend: str) -> None:
    """Samples come to rest at different moves; `steps` counts the slowest. The norm is of the Euclidean gradient."""
    nodes, x, target, _ = _hidden(name, gen)
    lr, tol = TOLERANCES[name]
    scale = torch.tensor([0.0, 0.1, 0.3, 1.0], dtype=torch.float64)[:, None]
    end = truth.infer(nodes, x, steps=0).phis[-1]
    target = end + scale * (target - end)
    options = {"steps": 60, "lr": lr, "tol": tol}
    alone = [truth.infer(nodes, x[i : i + 1], target=target[i : i + 1], **options).steps for i in range(4)]
    assert len(set(alone)) > 2, alone
    assert max(alone) < 60
    got = _same(nodes, x, layers, target=target, **options)
    assert got.steps == max(alone)
    assert got.energy.shape == (61, 4)


def test_tol_zero_steps_when_already_there(gen: torch.Generator, layers: Layers, infer_backend: str) -> None:
    got = _same(inputs.paper("M1", gen, (5, 7, 6, 4, 3)), inputs.normal(gen, 4, 5), layers, steps=9, tol=1e-9)
    assert got.steps == 0


def test_biases_may_be_missing_and_memory_strided(gen: torch.Generator, layers: Layers, infer_backend: str) -> None:
    nodes = inputs.paper("M2", gen, (5, 7, 6, 4, 3))
    nodes[0].bias = nodes[3].bias = None
    nodes[1].weight = nodes[1].weight.T.contiguous().T
    wide, target = inputs.normal(gen, 5, 8), inputs.target("categorical", gen, 3, 4).T
    x = wide.T[::2]
    assert not x.is_contiguous()
    phis = [inputs.normal(gen, 7, 4).T, None, None, None]
    _same(nodes, x, layers, target=target, phis=phis, steps=4)


def test_weights_that_require_grad_are_not_recorded(gen: torch.Generator, layers: Layers, infer_backend: str) -> None:
    nodes = inputs.paper("M3", gen, (5, 7, 6, 4, 3))
    made = layers(nodes)
    for layer in made:
        layer.weight.requires_grad_()
    x, target = inputs.normal(gen, 4, 5).requires_grad_(), inputs.target("categorical", gen, 4, 3)
    got = pck.infer(x, made, target=target, steps=3, trace=True)
    grads = pck.weight_grads(x, made, got)
    found = [*got.phis, *got.deltas, got.energy, *[g for layer in grads for g in layer if g is not None]]
    assert not any(tensor.requires_grad for tensor in found)
    assert all(layer.weight.grad is None for layer in made)


def test_an_empty_batch(gen: torch.Generator, layers: Layers, infer_backend: str) -> None:
    nodes = inputs.paper("M2", gen, (5, 7, 6, 4, 3))
    made, x = layers(nodes), inputs.normal(gen, 0, 5)
    got = pck.infer(x, made, target=torch.zeros(0, dtype=torch.int64), steps=3, trace=True)
    assert [phi.shape for phi in got.phis[:3]] == [(0, 7), (0, 6), (0, 4)]
    assert [delta.shape for delta in got.deltas] == [(0, 7), (0, 6), (0, 4), (0, 3)]
    assert torch.equal(got.energy, torch.zeros(4, 4, dtype=torch.float64))
    for layer, grad in zip(made, pck.weight_grads(x, made, got), strict=True):
        assert torch.equal(grad.weight, torch.zeros_like(layer.weight))
        assert torch.equal(grad.bias, torch.zeros_like(layer.bias))


def test_an_empty_batch_of_samples(infer_backend: str) -> None:
    sampled = [pck.Layer(torch.ones(4, 3), None, "tanh", "gaussian_full"), pck.Layer(torch.ones(2, 2))]
    got = pck.infer(torch.ones(0, 3), sampled, target=torch.ones(0, 2), noise=torch.ones(0, 2), steps=2)
    assert [delta.shape for delta in got.deltas] == [(0, 4), (0, 2)]


def test_autocast_does_not_reach_inside(gen: torch.Generator, infer_backend: str) -> None:
    """States and gradients are float32, products as precise as asked for."""
    weights = [inputs.normal(gen, 64, 32).float() / 6, inputs.normal(gen, 10, 64).float() / 8]
    layers = [
        pck.Layer(weights[0], activation="tanh", energy="gaussian_diag", log_var=torch.zeros(64)),
        pck.Layer(weights[1]),
    ]
    x, target = inputs.normal(gen, 16, 32).float(), inputs.normal(gen, 16, 10).float()
    found = []
    for enabled in (False, True):
        with torch.autocast(x.device.type, torch.bfloat16, enabled=enabled):
            result = pck.infer(x, layers, target=target, steps=4)
            grads = pck.weight_grads(x, layers, result)
        found.append([*result.phis, *result.deltas, *(g for layer in grads for g in layer if g is not None)])
    for plain, inside in zip(*found, strict=True):
        assert inside.dtype == torch.float32
        torch.testing.assert_close(inside, plain, rtol=1e-6, atol=1e-7)


def test_without_trace(gen: torch.Generator, layers: Layers, infer_backend: str) -> None:
    nodes = inputs.paper("M3", gen, (5, 7, 6, 4, 3))
    x, made = inputs.normal(gen, 4, 5), layers(nodes)
    target = inputs.target("categorical", gen, 4, 3)
    silent, traced = (pck.infer(x, made, target=target, steps=5, trace=trace) for trace in (False, True))
    assert silent.energy is None
    assert silent.backend == infer_backend
    assert all(torch.equal(a, b) for a, b in zip(silent.phis + silent.deltas, traced.phis + traced.deltas, strict=True))
