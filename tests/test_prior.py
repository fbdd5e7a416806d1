# SPDX-License-Identifier: MIT
"""A layer's `prior`, w KL(phi || N(0, I)) of a `gaussian_full` node: against autograd, and in closed form."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import inputs
import pytest
import torch
import truth

import pc_kernels as pck

pytestmark = pytest.mark.usefixtures("poison", "one_thread")

Layers = Callable[[list[truth.Node]], list[pck.Layer]]


@pytest.fixture(params=["reference", "cpp"])
def backend(request: pytest.FixtureRequest) -> Any:
    """Those that have priors."""
    with pck.use_backend(request.param):
        yield request.param


def _nodes(gen: torch.Generator, prior: float = 0.7) -> list[truth.Node]:
    return [
        inputs.node("gaussian", gen, 5, 6, "tanh"),
        inputs.node("gaussian_full", gen, 6, 8, prior=prior),
        inputs.node("gaussian", gen, 4, 6, "hardtanh"),
        inputs.node("gaussian", gen, 6, 5, "sigmoid"),
    ]


def _close(got: Any, want: Any) -> None:
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-11)


def _mask(kind: str, gen: torch.Generator) -> dict[str, Any]:
    some = inputs.normal(gen, 4, 8) > -0.5
    some[:, 0] = True
    given = [None, inputs.normal(gen, 4, 8), None, None]
    return {
        "": {},
        "mask": {"masks": [None, some, None, None]},
        "held": {"clamp": [None, ~some, None, None], "phis": given},
        "target": {"clamp": [None, True, None, None], "phis": [None, inputs.normal(gen, 4, 4), None, None]},
        "tol": {"tol": 0.8},
        "free": {"target": None},
    }[kind]


@pytest.mark.parametrize("steps", [0, 1, 2, 3, 7])
@pytest.mark.parametrize("kind", ["", "mask", "held", "target", "tol", "free"])
def test_against_autograd(kind: str, steps: int, gen: torch.Generator, layers: Layers, backend: str) -> None:
    nodes, x = _nodes(gen), inputs.normal(gen, 4, 5)
    noise = [None, inputs.normal(gen, 4, 4), None, None] if kind != "target" else None
    options = {"target": inputs.normal(gen, 4, 5), "steps": steps, "lr": 0.07, "momentum": 0.3, "noise": noise}
    options |= _mask(kind, gen)
    got, want = pck.infer(x, layers(nodes), trace=True, **options), truth.infer(nodes, x, **options)
    assert got.backend == backend
    assert got.steps == want.steps
    for l, node in enumerate(nodes):
        held = (options.get("clamp") or [None] * 4)[l] is True or (l == 3 and options["target"] is not None)
        if not held:
            _close(got.phis[l], want.phis[l])
        _close(got.deltas[l], want.deltas[l])
        _close(pck.weight_grads(x, layers(nodes), got, "sum")[l].weight, want.grads[l]["weight"])
        assert node.weight is not None
    _close(got.energy, want.energy)
    if kind == "free" and steps:  # a forward start is no fixed point: the node with the prior moves first
        still = pck.infer(x, layers(nodes), steps=0, noise=noise).phis
        moved = [not torch.equal(a, b) for a, b in zip(got.phis, still, strict=True)]
        assert moved[:2] == ([False, True] if steps == 1 else [True, True])


def test_the_fixed_point_of_one_node(gen: torch.Generator, layers: Layers, backend: str) -> None:
    """With nothing above it, F is least at precision (e^-sh + w) / (1 + w) and mean uh e^-sh / (e^-sh + w)."""
    weight, x = 0.7, inputs.normal(gen, 4, 5)
    node = inputs.node("gaussian_full", gen, 5, 6, prior=weight)
    uh, sh = (x @ node.weight.T + node.bias).chunk(2, 1)
    got = pck.infer(x, layers([node]), steps=4000, lr=0.05).phis[0]
    precision = (-sh).exp()
    want = torch.cat([uh * precision / (precision + weight), -((precision + weight) / (1 + weight)).log()], 1)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-10)


def test_float32_is_near_float64(gen: torch.Generator, layers: Layers, backend: str) -> None:
    nodes, x, target = _nodes(gen), inputs.normal(gen, 40, 5), inputs.normal(gen, 40, 5)
    noise = inputs.normal(gen, 40, 4)
    exact = pck.infer(x, layers(nodes), target=target, noise=noise, trace=True)
    single = [inputs_float(node) for node in nodes]
    got = pck.infer(x.float(), layers(single), target=target.float(), noise=noise.float(), trace=True)
    for one, other in zip([*got.phis, got.energy], [*exact.phis, exact.energy], strict=True):
        assert one is not None
        torch.testing.assert_close(one.double(), other, rtol=2e-5, atol=2e-5)


def inputs_float(node: truth.Node) -> truth.Node:
    """The node in float32."""
    weight, bias = (None if value is None else value.float() for value in (node.weight, node.bias))
    assert weight is not None
    return truth.Node(weight, bias, node.activation, node.energy, prior=node.prior)


def test_it_counts_in_the_light_cone(gen: torch.Generator, layers: Layers, backend: str) -> None:
    """The node with the prior moves at once, and so does what is below it a move later: no product of less is done."""
    nodes, x = _nodes(gen), inputs.normal(gen, 4, 5)
    noise, target = inputs.normal(gen, 4, 4), inputs.normal(gen, 4, 5)
    for steps in range(5):
        work = pck.infer(x, layers(nodes), target=target, steps=steps, noise=noise).work
        assert work.products == work.lower_bound
    plain = pck.infer(x, layers(_nodes(gen, 0.0)), target=target, steps=1, noise=noise).work
    assert pck.infer(x, layers(nodes), target=target, steps=1, noise=noise).work.products > plain.products


def test_what_has_none_says_so(gen: torch.Generator, layers: Layers) -> None:
    weight = torch.zeros(4, 5, dtype=torch.float64)
    for energy, prior in (("gaussian", 0.1), ("gaussian_full", -0.1), ("gaussian_full", float("nan"))):
        with pytest.raises(ValueError, match=r"^prior: wanted"):
            pck.Layer(weight, energy=energy, prior=prior)
    x, noise = inputs.normal(gen, 4, 5), inputs.normal(gen, 4, 4)
    made = layers(_nodes(gen))
    told = pck.explain(x, made, noise=noise).splitlines()
    for name, says in (("cuda", "infer with a prior is not written"), ("triton", "infer with a prior is not written")):
        assert any(name in line and says in line for line in told), told
        with pck.use_backend(name), pytest.raises(pck.BackendUnavailable, match="with a prior"):
            pck.infer(x, made, noise=noise)
