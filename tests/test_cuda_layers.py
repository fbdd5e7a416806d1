# SPDX-License-Identifier: MIT
"""Schedule (a) of `infer` in CUDA C++ without a GPU: plan and body as on the GPU, by the public function, against the
truth. The launches' blocks run one after the other, in order and in reverse."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

import cuda_host
import inputs
import pytest
import test_precision
import torch
import truth
from cuda_host import layers as host
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import pc_kernels as pck
from pc_kernels.backends import cuda_backend, cuda_infer
from pc_kernels.problem import Problem

pytestmark = pytest.mark.skipif(cuda_host.CXX is None, reason="no C++ compiler")

EPS = torch.finfo(torch.float32).eps
Layers = Callable[[Sequence[truth.Node]], list[pck.Layer]]
DIMS = (20, 48, 70, 33, 10)  # a tile, more and less than one; a tile of samples and a bit
BATCH = 35


@pytest.fixture(autouse=True)
def two_launches_a_step(cuda_kernels: None) -> Iterator[None]:
    with cuda_infer.use_schedule(cuda_infer.LAYERS):
        yield


def _single(value):
    """float32 throughout, as pck.infer takes it."""
    if isinstance(value, list):
        return [_single(entry) for entry in value]
    return value.float() if isinstance(value, Tensor) and value.dtype == torch.float64 else value


def _near(mine: Tensor, plain: Tensor, right: Tensor, phi: Tensor, what: str) -> None:
    """At most twice the error of the same precision in plain torch, and the last bits of phi."""
    scale = phi.double().norm() if phi.is_floating_point() else phi.numel() ** 0.5
    error, budget = (mine.double() - right).norm(), 2 * (plain.double() - right).norm() + 8 * EPS * scale
    assert error <= budget, f"{what}: off by {error:.2e}, budget {budget:.2e}"


def _check(nodes: list[truth.Node], x: Tensor, layers: Layers, precision: str = "fp32", **options) -> pck.Inference:
    """infer on the backend == truth per node: deltas, states, dW and the traced energies."""
    nodes, x, options = test_precision._float32(nodes), x.float(), {key: _single(v) for key, v in options.items()}
    found = {}
    for backend in ("cuda", "reference"):
        with pck.use_backend(backend):
            found[backend] = pck.infer(x, layers(nodes), precision=precision, trace=True, **options)
    got, plain = found["cuda"], found["reference"]
    want = truth.infer(nodes, x, **options)
    grads = {name: pck.weight_grads(x, layers(nodes), of, reduction="sum") for name, of in found.items()}
    assert got.backend == "cuda"
    for l, phi in enumerate(want.phis):
        assert torch.isfinite(got.deltas[l]).all()
        _near(got.deltas[l], plain.deltas[l], want.deltas[l], phi, f"delta of node {l + 1}")
        right = want.grads[l]["weight"]
        _near(grads["cuda"][l].weight, grads["reference"][l].weight, right, phi, f"dW of node {l + 1}")
        if not got.clamped[l]:
            _near(got.phis[l], plain.phis[l], phi, phi, f"phi of node {l + 1}")
    assert got.energy is not None
    assert plain.energy is not None
    torch.testing.assert_close(got.energy, plain.energy, rtol=2e-2 if "bf16" in precision else 2e-3, atol=1e-5)
    return got


@pytest.mark.parametrize("momentum", [0.0, 0.7])
@pytest.mark.parametrize("precision", host.PRECISIONS)
@pytest.mark.parametrize("model", ["M1", "M3", "M3-PC_F", "M3-probs"])
def test_the_papers_models(model: str, precision: str, momentum: float, gen: torch.Generator, layers: Layers) -> None:
    nodes = inputs.paper(model, gen, DIMS)
    for node in nodes:
        node.lr_scale = 0.01 if node.energy == "categorical_probs" else 1.0
    target = inputs.target(nodes[-1].energy, gen, BATCH, DIMS[-1])
    got = _check(
        nodes, inputs.normal(gen, BATCH, DIMS[0]), layers, precision, target=target, steps=6, momentum=momentum
    )
    assert got.work.lower_bound <= got.work.products <= 2 * got.work.lower_bound


def _around(name: str, gen: torch.Generator, act: str | None = None) -> tuple[list[truth.Node], dict]:
    """The family at nodes 1 and 3 of 4, Gaussians between; and what infer takes."""
    width = 18
    feeds = width // 2 if name == "gaussian_full" else width
    act = act or ("softmax" if name == "categorical_probs" else "tanh")
    small = {"gain": 0.5, "lr_scale": 0.1} if name in ("categorical_probs", "poisson") else {}
    nodes = [
        inputs.node(name, gen, 5, width, act, **small),
        inputs.node("gaussian", gen, feeds, 6, "gelu"),
        inputs.node(name, gen, 6, width, act, **small),
        inputs.node("gaussian", gen, feeds, 3, "silu"),
    ]
    noise = [inputs.normal(gen, 3, feeds) if i % 2 == 0 else None for i in range(4)]
    sampled = {"noise": noise} if name == "gaussian_full" else {}
    return nodes, {"x": inputs.normal(gen, 3, 5), "target": inputs.normal(gen, 3, 3), "steps": 3, **sampled}


@pytest.mark.parametrize("precision", ["fp32", "bf16_delta"])
@pytest.mark.parametrize("name", truth.ENERGIES)
def test_every_family_inside(name: str, precision: str, gen: torch.Generator, layers: Layers) -> None:
    nodes, call = _around(name, gen)
    _check(nodes, layers=layers, precision=precision, lr=0.1, momentum=0.5, **call)


@pytest.mark.parametrize("name", ["categorical", "bernoulli"])
def test_the_euclidean_step(name: str, gen: torch.Generator, layers: Layers) -> None:
    nodes, call = _around(name, gen)
    nodes[0].step = nodes[2].step = "euclidean"
    _check(nodes, layers=layers, lr=0.2, momentum=0.9, **call)


@pytest.mark.parametrize("name", truth.ENERGIES)
def test_every_family_as_output(name: str, gen: torch.Generator, layers: Layers) -> None:
    """One sample; a target with hard values."""
    nodes = [inputs.node("laplace", gen, 5, 17, "sigmoid"), inputs.node(name, gen, 17, 4)]
    _check(nodes, inputs.normal(gen, 1, 5), layers, target=inputs.target(name, gen, 1, 4), steps=3, lr=0.05)


@pytest.mark.parametrize("name", truth.ENERGIES)
def test_every_family_free_at_the_output(name: str, gen: torch.Generator, layers: Layers) -> None:
    feed = "identity" if name == "gaussian_full" else None
    nodes = [inputs.node("gaussian", gen, 5, 7, "tanh"), inputs.node(name, gen, 7, 4, gain=0.5, feed=feed)]
    phis = [inputs.normal(gen, 3, 7), inputs.state(name, gen, 3, 4)]
    _check(nodes, inputs.normal(gen, 3, 5), layers, phis=phis, steps=3, lr=0.05, momentum=0.5)


def test_class_indices(gen: torch.Generator, layers: Layers) -> None:
    nodes = inputs.paper("M2", gen, (5, 7, 6, 4, 19))
    _check(nodes, inputs.normal(gen, 3, 5), layers, target=torch.tensor([2, 0, 18]), steps=4)


@pytest.mark.parametrize("name", truth.ENERGIES)
def test_held_and_masked_entries(name: str, gen: torch.Generator, layers: Layers) -> None:
    nodes, call = _around(name, gen)
    width = len(nodes[0].weight)
    held, start = inputs.normal(gen, 3, width) > 0, inputs.state(name, gen, 3, width)
    hidden, seen = inputs.normal(gen, 3, width) > -0.5, inputs.normal(gen, 1, 3) > 0
    hidden[:, 0] = seen[:, 0] = True
    flags = {"clamp": [held, None, None, None], "phis": [start, None, None, None], "masks": [None, None, hidden, seen]}
    got = _check(nodes, layers=layers, momentum=0.5, **call, **flags)
    assert torch.equal(got.phis[0][held], start.float()[held])


@pytest.mark.parametrize("name", truth.ENERGIES)
def test_a_node_held_whole_passes_its_target_on(name: str, gen: torch.Generator, layers: Layers) -> None:
    nodes, call = _around(name, gen)
    phis = [None, None, inputs.target(name, gen, 3, len(nodes[2].weight)), None]
    if name == "gaussian_full":
        call["noise"][2] = None
    _check(nodes, layers=layers, clamp=[None, None, True, None], phis=phis, **call)


@pytest.mark.parametrize("name", truth.ACTIVATIONS)
def test_every_activation_and_feed(name: str, gen: torch.Generator, layers: Layers) -> None:
    nodes = [
        inputs.node("gaussian", gen, 5, 18, name, feed=name),
        inputs.node("gaussian_full", gen, 18, 6, name, feed=name),
        inputs.node("laplace", gen, 6, 7, name, feed=name),
        inputs.node("gaussian", gen, 7, 3, name),
    ]
    _check(nodes, inputs.normal(gen, 3, 5), layers, target=inputs.normal(gen, 3, 3), steps=3)


@pytest.mark.parametrize("steps", [0, 1])
def test_few_steps_and_nothing_to_do(steps: int, gen: torch.Generator, layers: Layers) -> None:
    nodes, x = inputs.paper("M3", gen, (5, 7, 6, 4, 3)), inputs.normal(gen, 2, 5)
    nodes[1].bias = None
    _check(nodes, x, layers, target=inputs.target("categorical", gen, 2, 3), steps=steps)
    with pck.use_backend("cuda"):  # no target: a fixed point, but for the last bit of torch's tanh, where it starts
        still = pck.infer(x.float(), layers(test_precision._float32(nodes)), steps=steps)
    assert all(delta.abs().max() < 4 * EPS for delta in still.deltas)


@pytest.mark.parametrize("precision", host.PRECISIONS)
def test_blocks_of_a_launch_do_not_depend_on_each_other(precision: str, gen: torch.Generator, layers: Layers) -> None:
    """The same bits with the blocks of every launch in reverse."""
    nodes = test_precision._float32(inputs.paper("M3", gen, DIMS))
    x, target = inputs.normal(gen, BATCH, DIMS[0]).float(), inputs.target("categorical", gen, BATCH, 10).float()
    runs = []
    for reverse in (False, True):
        token = host.REVERSE.set(reverse)
        with pck.use_backend("cuda"):
            runs.append(pck.infer(x, layers(nodes), target=target, steps=4, precision=precision))
        host.REVERSE.reset(token)
    assert all(torch.equal(a, b) for a, b in zip(runs[0].deltas, runs[1].deltas, strict=True))


def test_a_state_that_is_not_finite_raises(gen: torch.Generator, layers: Layers) -> None:
    nodes = test_precision._float32(inputs.paper("M1", gen, DIMS))
    x, target = inputs.normal(gen, 4, DIMS[0]).float(), inputs.normal(gen, 4, 10).float()
    with pck.use_backend("cuda"), pytest.raises(pck.InferenceDiverged, match="layer 1"):
        pck.infer(x, layers(nodes), target=target, steps=60, lr=1e4)


# ---------------------------------------------------------------- which schedule


def _arguments(
    batch: int, width: int, precision: str, layers: Layers, gen: torch.Generator, trace: bool = False
) -> tuple:
    nodes = test_precision._float32(inputs.paper("M1", gen, (4, width, width, width, 3)))
    problem = Problem(torch.zeros(batch, 4), layers(nodes), None, None, None, None, None)
    return (*problem.arguments(), 1, 0.1, 0.0, -1.0, precision, trace)


def _explained(*described, **options) -> str:
    return cuda_backend.explain_infer(*_arguments(*described, **options))


@pytest.mark.parametrize(
    ("batch", "width", "precision", "trace", "says"),
    [
        (4, 8, "bf16_delta", False, "cluster-resident kernel"),
        (4, 8, "fp32", False, "two launches a step.*products of bf16 only"),
        (4, 1500, "bf16", False, "two launches a step.*KB of shared memory"),
        (500, 8, "bf16", False, "two launches a step.*more than 120 samples"),
        (4, 8, "bf16", True, "two launches a step.*no trace"),
    ],
)
def test_the_choice_says_why(
    batch: int, width: int, precision: str, trace: bool, says: str, gen: torch.Generator, layers: Layers
) -> None:
    with cuda_infer.use_schedule(None):
        assert re.search(says, _explained(batch, width, precision, layers, gen, trace))


@pytest.mark.parametrize(
    ("batch", "precision", "triton", "says"),
    [
        (4, "bf16_delta", True, None),
        (500, "bf16_delta", True, "Triton's kernels are faster.*more than 120 samples"),
        (500, "bf16_delta", False, None),
        (4, "fp32", True, "Triton's kernels are faster.*bf16 only"),
        (4, "fp32", False, None),
    ],
)
def test_auto_takes_it_where_it_is_the_fastest(
    batch: int, precision: str, triton: bool, says: str | None, gen: torch.Generator, layers: Layers
) -> None:
    arguments = _arguments(batch, 8, precision, layers, gen)
    with cuda_infer.use_schedule(None):
        why = cuda_infer.declines(arguments, triton)
        assert (why is None) if says is None else re.search(says, why or "")
    with cuda_infer.use_schedule(cuda_infer.CLUSTER):  # asked for: what cannot have it goes elsewhere
        assert (cuda_infer.declines(arguments, triton) is None) is (precision != "fp32")


def test_more_layers_than_it_takes(gen: torch.Generator, layers: Layers) -> None:
    """`auto` passes it over; asked for by name it says why."""
    nodes = test_precision._float32([inputs.node("gaussian", gen, 3, 3, "tanh") for _ in range(host.MAX_LAYERS + 1)])
    problem = Problem(torch.zeros(2, 3), layers(nodes), None, None, None, None, None)
    assert "at most 16 layers" in (
        cuda_infer.declines((*problem.arguments(), 1, 0.1, 0.0, -1.0, "fp32", False), False) or ""
    )
    with pck.use_backend("cuda"), pytest.raises(pck.BackendUnavailable, match="at most 16 layers, and there are 17"):
        pck.infer(torch.zeros(2, 3), layers(nodes), steps=1)


def test_a_schedule_asked_for_is_taken_or_refused(gen: torch.Generator, layers: Layers) -> None:
    assert "two launches a step" in _explained(4, 8, "bf16", layers, gen)
    with cuda_infer.use_schedule(cuda_infer.CLUSTER), pytest.raises(pck.BackendUnavailable, match="bf16 only"):
        _explained(4, 8, "fp32", layers, gen)
    with pytest.raises(ValueError, match="schedule: wanted a known name"), cuda_infer.use_schedule("fast"):
        pass


# ---------------------------------------------------------------- the plan

NODES = st.tuples(
    st.sampled_from([("tanh", "gaussian", "identity"), ("identity", "categorical", "softmax"),
                     ("tanh", "gaussian_full", "sample"), ("softmax", "laplace", "relu")]),
    st.integers(1, 90),
)  # fmt: skip


@settings(max_examples=1000, deadline=None)
@given(
    chain=st.lists(NODES, min_size=1, max_size=8), inputs_of_x=st.integers(1, 200), batch=st.integers(1, 200),
    momentum=st.booleans(),
    precision=st.sampled_from(host.PRECISIONS),
)  # fmt: skip
def test_any_network_has_a_plan(chain: list, inputs_of_x: int, batch: int, momentum: bool, precision: str) -> None:
    """Arrays large enough for whole tiles, aligned, none over another."""
    nodes = [
        host.node(activation=act, energy=energy, feed="identity" if l + 1 == len(chain) else feed, clamped=False)
        for l, ((act, energy, feed), _) in enumerate(chain)
    ]
    widths = [2 * width if kind[1] == "gaussian_full" else width for kind, width in chain]
    passes = [width for _, width in chain]
    run, why = host.plan(nodes, inputs_of_x, widths, batch, 0.5 if momentum else 0.0, precision)
    assert why == ""
    rows, size = -(-batch // 32) * 32, 2 if "bf16" in precision else 4
    regions = [(run.inputs, run.inputs + 4 * rows * run.plan[0].inputs_ld)]
    for l, (width, passed) in enumerate(zip(widths, passes, strict=True)):
        p, below = run.plan[l], run.plan[l - 1].passes_ld if l else -(-inputs_of_x // 64) * 64
        assert p.inputs_ld == below
        assert (p.passes, p.inputs) == (0 if l + 1 == len(chain) else passed, passes[l - 1] if l else inputs_of_x)
        assert p.ld % 64 == p.passes_ld % 64 == 0
        assert p.ld >= width
        assert l + 1 == len(chain) or p.passes_ld >= passed
        assert (p.velocity >= 0) is momentum
        wide, fed = 4 * rows * p.ld, rows * p.passes_ld
        sizes = [(p.phi, wide), (p.a, wide), (p.mu, wide), (p.velocity, wide), (p.grad, wide), (p.back, 4 * fed)]
        sizes += [(p.fed, 4 * fed), (p.v, size * fed), (p.delta, size * rows * p.ld), (p.weight, size * p.ld * below)]
        if p.exact != p.weight:
            sizes.append((p.exact, 4 * p.ld * below))
        else:
            assert size == 4
        regions += [(start, start + count) for start, count in sizes if start >= 0]
    regions.sort()
    assert all(start % 256 == 0 for start, _ in regions)
    assert all(end <= start for (_, end), (start, _) in pairwise(regions))
    assert regions[-1][1] <= run.bytes
