# SPDX-License-Identifier: MIT
"""The cluster-resident kernel without a GPU: plan and body as on the GPU, CTAs as threads, against the truth.

The budget is the README's, section 4: an error of delta at most twice that of plain torch in the same precision.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import cuda_host
import inputs
import pytest
import torch
import truth
from cuda_host import clusters
from torch import Tensor

import pc_kernels as pck
from pc_kernels.backends import cuda_infer

pytestmark = pytest.mark.skipif(cuda_host.CXX is None, reason="no C++ compiler")

EPS = torch.finfo(torch.float32).eps
Layers = Callable[[Sequence[truth.Node]], list[pck.Layer]]
DIMS = (20, 48, 130, 33, 10)  # slices of no, one and two units; a tile and a bit of samples
BATCH = 19


def _check(
    nodes: list[truth.Node], x: Tensor, layers: Layers, precision: str = "bf16_delta", general: bool = False, **options
) -> clusters.Outcome:
    got = clusters.run(nodes, x, precision=precision, general=general, **options)
    assert got.why == ""
    want = truth.infer(nodes, x, **options)
    with pck.use_backend("reference"):
        plain = pck.infer(x, layers(nodes), precision=precision, **options)
    for l, (mine, theirs, right) in enumerate(zip(got.deltas, plain.deltas, want.deltas, strict=True)):
        slack = 16 * EPS * (right.norm() + want.phis[l].double().norm())
        error, budget = (mine.double() - right).norm(), 2 * (theirs.double() - right).norm() + slack
        assert error <= budget, (l, error, budget)
        assert right.norm() > 3 * error  # the budget means something
    for l, mine in enumerate(got.phis[:-1] if options.get("target") is not None else got.phis):
        error, budget = (mine.double() - want.phis[l]).norm(), (plain.phis[l].double() - want.phis[l]).norm()
        assert error <= 2 * budget + 16 * EPS * want.phis[l].norm(), (l, error, budget)
    return got


def _x(gen: torch.Generator, width: int = DIMS[0], batch: int = BATCH) -> Tensor:
    return inputs.normal(gen, batch, width, dtype=torch.float32)


def _target(nodes: list[truth.Node], gen: torch.Generator, batch: int = BATCH) -> Tensor:
    last = nodes[-1]
    return inputs.target(last.energy, gen, batch, last.weight.shape[0], dtype=torch.float32)


@pytest.mark.parametrize("momentum", [0.0, 0.7])
@pytest.mark.parametrize("model", inputs.PAPER)
def test_the_papers_models(model: str, momentum: float, gen: torch.Generator, layers: Layers) -> None:
    nodes = inputs.paper(model, gen, DIMS, torch.float32)
    for node in nodes:
        node.lr_scale = 0.01 if node.energy == "categorical_probs" else 1.0
    _check(nodes, _x(gen), layers, target=_target(nodes, gen), steps=8, momentum=momentum)


@pytest.mark.parametrize("energy", ["gaussian", "gaussian_diag", "bernoulli", "laplace", "poisson", "categorical"])
def test_every_family_inside_and_on_top(energy: str, gen: torch.Generator, layers: Layers) -> None:
    kinds = [("gaussian", 24), (energy, 40), ("gaussian", 17), (energy, 12)]
    widths = [9, *(width for _, width in kinds)]
    nodes = [
        inputs.node(name, gen, widths[i], width, "tanh", dtype=torch.float32) for i, (name, width) in enumerate(kinds)
    ]
    _check(nodes, _x(gen, 9), layers, target=_target(nodes, gen), steps=6, lr=0.05)


SMOOTH = ("identity", "tanh", "gelu", "silu", "sigmoid", "softplus", "softmax")


@pytest.mark.parametrize("activation", SMOOTH)
def test_activations(activation: str, gen: torch.Generator, layers: Layers) -> None:
    dims = (9, 24, 40, 12)
    nodes = [
        inputs.node("gaussian", gen, into, width, activation, dtype=torch.float32) for into, width in pairwise(dims)
    ]
    for node in nodes[:-1]:
        node.feed = "tanh"
    _check(nodes, _x(gen, 9), layers, target=_target(nodes, gen), steps=6)


@pytest.mark.parametrize("precision", ["bf16_delta", "bf16"])
@pytest.mark.parametrize("momentum", [0.0, 0.7])
@pytest.mark.parametrize("top", [10, 40])
def test_a_bare_run_has_code_of_its_own(
    top: int, momentum: float, precision: str, gen: torch.Generator, layers: Layers
) -> None:
    """Nothing but single entries: shorter code, the same results."""
    nodes = inputs.paper("M1", gen, (*DIMS[:-1], top), torch.float32)
    nodes[1] = inputs.node("laplace", gen, DIMS[1], DIMS[2], "gelu", dtype=torch.float32)
    nodes[0].feed = "tanh"
    x, target = _x(gen), _target(nodes, gen)
    found = [
        _check(nodes, x, layers, precision, general, target=target, steps=8, momentum=momentum, lr=0.05)
        for general in (False, True)
    ]
    assert [one.bare for one in found] == [True, False]
    for mine, other in zip(found[0].phis[:-1] + found[0].deltas, found[1].phis[:-1] + found[1].deltas, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4)


def test_class_indices(gen: torch.Generator, layers: Layers) -> None:
    nodes = inputs.paper("M3", gen, DIMS, torch.float32)
    _check(nodes, _x(gen), layers, target=torch.randint(10, (BATCH,), generator=gen), steps=6)


@pytest.mark.parametrize("model", ["M1", "M3", "M3-PC_F", "M3-probs"])
def test_masked_and_held_entries(model: str, gen: torch.Generator, layers: Layers) -> None:
    nodes = inputs.paper(model, gen, DIMS, torch.float32)
    for node in nodes:
        node.lr_scale = 0.01 if node.energy == "categorical_probs" else 1.0
    masks: list[Tensor | None] = [inputs.normal(gen, BATCH, width) > -1 for width in DIMS[1:]]
    masks[2] = None
    if nodes[-1].energy == "categorical":  # a target may not have mass where it is masked
        masks[-1] = None
    clamp: list[Tensor | None] = [inputs.normal(gen, BATCH, width) > 1 for width in DIMS[1:-1]]
    target = _target(nodes, gen)
    phis: list[Tensor | None] = [
        inputs.state(node.energy, gen, BATCH, len(node.weight), dtype=torch.float32) for node in nodes[:-1]
    ]
    options = {"target": target, "masks": masks, "clamp": [*clamp, None], "phis": [*phis, None]}
    _check(nodes, _x(gen), layers, steps=6, **options)


def test_given_states_and_a_free_output(gen: torch.Generator, layers: Layers) -> None:
    nodes = inputs.paper("M3", gen, DIMS, torch.float32)
    phis: list[Tensor | None] = [inputs.normal(gen, BATCH, width, dtype=torch.float32) for width in DIMS[1:]]
    _check(nodes, _x(gen), layers, phis=phis, steps=5)


@pytest.mark.parametrize("steps", [0, 1, 2, 3])
def test_few_steps(steps: int, gen: torch.Generator) -> None:
    """The light cone has not reached the first layers."""
    nodes = inputs.paper("M1", gen, DIMS, torch.float32)
    x, target = _x(gen), _target(nodes, gen)
    got = clusters.run(nodes, x, target=target, steps=steps)
    want = truth.infer(nodes, x, target=target, steps=steps)
    forward = clusters.run(nodes, x, target=target, steps=0)
    for l, phi in enumerate(got.phis[:-1]):
        torch.testing.assert_close(phi.double(), want.phis[l], rtol=0, atol=5e-3)
        moved = l >= len(nodes) - 1 - steps
        assert torch.equal(phi, forward.phis[l]) is not moved
        torch.testing.assert_close(got.deltas[l].double(), want.deltas[l], rtol=0, atol=5e-3)


@pytest.mark.parametrize("model", ["M1", "M3"])
def test_plain_bf16(model: str, gen: torch.Generator, layers: Layers) -> None:
    nodes = inputs.paper(model, gen, DIMS, torch.float32)
    _check(nodes, _x(gen), layers, "bf16", target=_target(nodes, gen), steps=8)


@pytest.mark.parametrize(
    ("dims", "momentum", "rounds", "parts"),
    [((784, 512, 512, 512, 10), 0.7, 1, 1), ((40, 500, 512, 512, 40), 0.0, 2, 1), ((40, 640, 640, 320, 10), 0.7, 2, 4)],
)
def test_sizes(
    dims: tuple[int, ...], momentum: float, rounds: int, parts: int, gen: torch.Generator, layers: Layers
) -> None:
    """The paper's; and where memory is short: layers in rounds, received in parts."""
    nodes = inputs.paper("M3", gen, dims, torch.float32)
    got = _check(nodes, _x(gen, dims[0], 5), layers, target=_target(nodes, gen, 5), steps=4, momentum=momentum)
    assert (got.rounds, got.parts) == (rounds, parts)


REFUSED = [
    ("gaussian_full", "identity", None, "gaussian_full nodes"),
    ("categorical", "identity", "euclidean", "Euclidean step"),
    ("categorical", "softmax", None, "softmax before a categorical node"),
]


@pytest.mark.parametrize(("energy", "activation", "step", "says"), REFUSED)
def test_what_it_cannot_run_it_names(
    energy: str, activation: str, step: str | None, says: str, gen: torch.Generator
) -> None:
    inner = inputs.node(energy, gen, 5, 8, activation, dtype=torch.float32, step=step)
    if energy == "gaussian_full":
        inner.feed = "identity"
    nodes = [inner, inputs.node("gaussian", gen, 8, 4, dtype=torch.float32)]
    got = clusters.run(nodes, _x(gen, 5), target=_target(nodes, gen), steps=1)
    assert says in got.why
    assert got.why.startswith("node 1: ")


# ---------------------------------------------------------------- by the public function


@pytest.fixture
def cluster_resident(cuda_kernels: None) -> Iterator[None]:
    with cuda_infer.use_schedule(cuda_infer.CLUSTER):
        yield


@pytest.mark.usefixtures("cluster_resident")
@pytest.mark.parametrize("precision", ["bf16_delta", "bf16"])
@pytest.mark.parametrize("model", ["M1", "M3", "M3-probs"])
def test_infer(model: str, precision: str, gen: torch.Generator, layers: Layers) -> None:
    nodes = inputs.paper(model, gen, DIMS, torch.float32)
    for node in nodes:
        node.lr_scale = 0.01 if node.energy == "categorical_probs" else 1.0
    x, target = _x(gen), _target(nodes, gen)
    want = truth.infer(nodes, x, target=target, steps=8)
    found = {}
    for backend in ("cuda", "reference"):
        with pck.use_backend(backend):
            found[backend] = pck.infer(x, layers(nodes), target=target, steps=8, precision=precision)
    got, plain = found["cuda"], found["reference"]
    assert got.backend == "cuda"
    assert got.steps == 8
    assert got.work.lower_bound <= got.work.products <= 2 * got.work.lower_bound
    for mine, theirs, right in zip(got.deltas, plain.deltas, want.deltas, strict=True):
        assert (mine.double() - right).norm() <= 2 * (theirs.double() - right).norm() + 32 * EPS * right.norm() + 1e-6
    assert torch.equal(got.phis[-1], target)


@pytest.mark.usefixtures("cluster_resident")
def test_a_state_that_is_not_finite_raises(gen: torch.Generator, layers: Layers) -> None:
    nodes = inputs.paper("M1", gen, DIMS, torch.float32)
    with pck.use_backend("cuda"), pytest.raises(pck.InferenceDiverged, match="layer 1"):
        pck.infer(_x(gen), layers(nodes), target=_target(nodes, gen), steps=60, lr=1e4, precision="bf16_delta")


@pytest.mark.usefixtures("cluster_resident")
@pytest.mark.parametrize(
    ("options", "says"),
    [({"trace": True}, "no trace"), ({"tol": 1e-3}, "tol is not written"), ({}, "KB of shared memory")],
)
def test_what_it_cannot_do_it_says(options: dict, says: str, gen: torch.Generator, layers: Layers) -> None:
    width = 8 if options else 1500
    nodes = inputs.paper("M1", gen, (4, width, width, width, 3), torch.float32)
    with pck.use_backend("cuda"), pytest.raises(pck.BackendUnavailable, match=says):
        pck.infer(_x(gen, 4), layers(nodes), steps=1, precision="bf16_delta", **options)


# ---------------------------------------------------------------- barriers


def test_no_cta_reads_what_another_may_still_write(tmp_path: Path) -> None:
    """ThreadSanitizer over the CTAs: it reports the race that a missing cluster barrier would be."""
    source, program = cuda_host.HERE / "cluster_races.cpp", tmp_path / "races"
    flags = ["-O1", "-g", "-std=c++17", "-fsanitize=thread", "-pthread", f"-I{cuda_host.ROOT / 'csrc'}"]
    built = subprocess.run(
        [str(cuda_host.CXX), *flags, str(source), "-o", str(program)], capture_output=True, text=True, check=False
    )
    if "tsan" in built.stderr:
        pytest.skip("the compiler has no ThreadSanitizer")
    assert built.returncode == 0, built.stderr
    run = (
        [str(program)] if shutil.which("setarch") is None else ["setarch", "-R", str(program)]
    )  # it wants plain addresses
    done = subprocess.run(run, capture_output=True, text=True, check=False)
    if "unexpected memory mapping" in done.stderr:
        pytest.skip("ThreadSanitizer does not run on this kernel")
    assert done.returncode == 0, done.stdout + done.stderr[:3000]
    rounds = [line.split() for line in done.stdout.splitlines()]
    assert rounds == [["1", "1"]] * 4 + [["3", "4"], ["2", "2"]]
