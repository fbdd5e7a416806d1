# SPDX-License-Identifier: MIT
"""How Triton's `infer` is run: schedules, launches counted from outside, divergence, plans and their memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace

import inputs
import pytest
import test_precision
import torch
import truth
from torch import Tensor

import pc_kernels as pck
from pc_kernels.backends.reference_infer import Arguments
from pc_kernels.backends.triton_infer_call import Call
from pc_kernels.problem import Problem

launches = pytest.importorskip(
    "pc_kernels.backends.triton_launches", reason="triton is not installed", exc_type=ImportError
)

pytestmark = pytest.mark.usefixtures("poison", "one_thread", "triton_interpreter")

SMALL = launches.Launch(16, 16, 16, 4, 2)
Layers = Callable[[list[truth.Node]], list[pck.Layer]]


@pytest.fixture(autouse=True)
def no_plans() -> Iterator[None]:
    pck.clear_plans()
    yield
    pck.clear_plans()


def _paper(model: str, gen: torch.Generator, dims: tuple[int, ...], batch: int) -> tuple[list[truth.Node], dict]:
    nodes = test_precision._float32(inputs.paper(model, gen, dims))
    x, target = inputs.normal(gen, batch, dims[0]), inputs.target(nodes[-1].energy, gen, batch, dims[-1])
    return nodes, {"x": x.float(), "target": target.float()}


def _sampled(gen: torch.Generator) -> tuple[list[truth.Node], dict]:
    nodes = [inputs.node("gaussian_full", gen, 5, 20, "tanh"), inputs.node("bernoulli", gen, 10, 18, "identity")]
    call = {"x": inputs.normal(gen, 17, 5), "target": inputs.target("bernoulli", gen, 17, 18)}
    call["noise"] = inputs.normal(gen, 17, 10)
    return test_precision._float32(nodes), {key: value.float() for key, value in call.items()}


def _tensors(result: pck.Inference) -> list[Tensor]:
    return [*result.phis, *result.deltas, *([] if result.energy is None else [result.energy]), result.status]


@pytest.mark.parametrize("model", ["M1 bf16_delta", "M3", "sampled"])
def test_schedules_and_the_order_of_tiles_change_no_bit(model: str, gen: torch.Generator, layers: Layers) -> None:
    """All steps in one launch with each phase's tiles in reverse, against a launch per phase with the tiles in order:
    no tile depends on another of its phase."""
    name, _, precision = model.partition(" ")
    nodes, call = _sampled(gen) if name == "sampled" else _paper(name, gen, (5, 20, 18, 17, 19), 17)
    results = []
    for schedule, reverse in (("two launches a step", False), ("persistent", True)):
        with launches.use_schedule(schedule, SMALL, reverse):
            result = pck.infer(
                call["x"], layers(nodes), target=call["target"], noise=call.get("noise"), steps=3, momentum=0.5,
                trace=True, precision=precision or "fp32",
            )  # fmt: skip
            results.append(_tensors(result))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


class Counted:
    """A kernel whose launches are counted by phase."""

    def __init__(self, kernel, counts: Counter):
        self._kernel, self._counts = kernel, counts

    def __getitem__(self, grid):
        def launch(*args, **options):
            self._counts[options.get("PHASE", "copy")] += 1
            return self._kernel[grid](*args, **options)

        return launch


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> Counter:
    """Every launch by phase; the copies in and out as "copy"."""
    from pc_kernels.backends import triton_plan

    found = Counter()
    for name in ("infer_kernel", "pack_kernel", "collect_kernel"):
        monkeypatch.setattr(triton_plan, name, Counted(getattr(triton_plan, name), found))
    return found


@pytest.mark.parametrize(("model", "rows"), [("M1", 0), ("M3", 2)])
def test_launches_a_step(model: str, rows: int, gen: torch.Generator, layers: Layers, counts: Counter) -> None:
    """Two of tiles, and two of rows where a softmax is wider than a tile."""
    nodes, call = _paper(model, gen, (5, 7, 18, 6, 3), 2)
    totals = []
    for steps in (3, 4):
        counts.clear()
        with launches.use_schedule("two launches a step", SMALL):
            pck.infer(call["x"], layers(nodes), target=call["target"], steps=steps)
        assert counts.pop("copy") == 2
        totals.append(counts.total())
    assert totals[1] - totals[0] == 2 + rows
    assert totals[0] == 4 + (1 if rows else 0) + 3 * 2 + (2 + 2 if rows else 0)  # node 2 is in the cone from step 2 on


def test_one_launch_for_all_steps(gen: torch.Generator, layers: Layers, counts: Counter) -> None:
    nodes, call = _paper("M2", gen, (5, 7, 6, 4, 3), 2)
    with launches.use_schedule("persistent"):
        pck.infer(call["x"], layers(nodes), target=call["target"], steps=5)
    assert sum(counts.values()) == 1 + 2


def test_products_as_counted_from_outside(
    gen: torch.Generator, layers: Layers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All widths one tile: a product is one tile's product."""
    from pc_kernels.backends import triton_infer

    done, multiply = [], triton_infer.multiply

    def counted(*args):
        done.append(1)
        return multiply(*args)

    monkeypatch.setattr(triton_infer, "multiply", counted)
    nodes, call = _paper("M1", gen, (16, 16, 16, 16, 16), 16)
    for steps, clamp in ((5, None), (3, [None, True, None, None])):
        done.clear()
        phis = None if clamp is None else [None, torch.zeros(16, 16), None, None]
        with launches.use_schedule("two launches a step", SMALL):
            work = pck.infer(call["x"], layers(nodes), target=call["target"], steps=steps, clamp=clamp, phis=phis).work
        assert len(done) == work.products == work.lower_bound


@pytest.mark.parametrize("trace", [True, False])
def test_divergence_names_layer_and_step(trace: bool, gen: torch.Generator, layers: Layers) -> None:
    """As the reference finds it; and a plan that diverged serves the next call as if new."""
    nodes, call = _paper("M2", gen, (5, 7, 6, 4, 3), 3)
    wild = {"target": call["target"], "steps": 7, "lr": 1e13, "momentum": 0.5, "trace": trace}
    made = layers(nodes)
    with pck.use_backend("reference"), pytest.raises(pck.InferenceDiverged) as expected:
        pck.infer(call["x"], made, **wild)
    with pytest.raises(pck.InferenceDiverged) as found:
        pck.infer(call["x"], made, **wild)
    assert (found.value.layer, found.value.step) == (expected.value.layer, expected.value.step)
    tame = {**wild, "lr": 0.1}
    again = pck.infer(call["x"], made, **tame)
    pck.clear_plans()
    assert all(
        torch.equal(a, b) for a, b in zip(_tensors(again), _tensors(pck.infer(call["x"], made, **tame)), strict=True)
    )


def test_a_start_that_is_not_finite(gen: torch.Generator, layers: Layers) -> None:
    """Nothing moves, and it is found all the same."""
    nodes, call = _paper("M1", gen, (5, 7, 6, 4, 3), 3)
    call["x"][1, 2] = torch.inf
    nodes[0].activation = "identity"
    with pytest.raises(pck.InferenceDiverged) as found:
        pck.infer(call["x"], layers(nodes), steps=2)
    assert found.value.layer == 1


def test_plans_are_reused_and_bounded(gen: torch.Generator, layers: Layers, monkeypatch: pytest.MonkeyPatch) -> None:
    """lr and data are not part of a plan; shapes are; the least recently used plans go first."""
    from pc_kernels.backends import triton_plan

    monkeypatch.setattr(triton_plan, "MAX_PLANS", 2)
    nodes, call = _paper("M1", gen, (5, 7, 6, 4, 3), 4)
    made = layers(nodes)

    def run(batch: int, **options):
        return pck.infer(call["x"][:batch], made, target=call["target"][:batch], steps=1, **options)

    run(4, lr=0.1), run(4, lr=0.2, momentum=0.0)
    (kept,) = triton_plan._plans.values()
    run(3), run(4)
    assert list(triton_plan._plans.values())[-1] is kept
    run(2)
    assert [key[0].batch for key in triton_plan._plans] == [4, 2]
    monkeypatch.setattr(triton_plan, "MAX_BYTES", 1)
    run(1)
    assert [key[0].batch for key in triton_plan._plans] == [1]
    pck.clear_plans()
    assert not triton_plan._plans


def test_equal_descriptions_are_one(gen: torch.Generator, layers: Layers) -> None:
    """And the same hash, also where they are two objects."""
    from pc_kernels.backends import triton_plan

    def described(**changed) -> Call:
        nodes, call = _paper("M1", gen, (5, 7, 6, 4, 3), 4)
        problem = Problem(call["x"], layers(nodes), call["target"], None, None, None, None)
        args = Arguments(*problem.arguments(), 3, 0.1, 0.0, -1.0, "fp32", False)
        return triton_plan.describe(args._replace(**changed))

    one = described()
    assert one is described(lr=0.7)
    assert one != described(momentum=0.5)
    assert one != described(trace=True)
    copy = replace(one)
    assert copy is not one
    assert copy == one
    assert hash(copy) == hash(one)
    assert hash(replace(one, steps=4)) != hash(one)


def test_results_do_not_change_with_the_next_call(gen: torch.Generator, layers: Layers) -> None:
    nodes, call = _paper("M2", gen, (5, 7, 6, 4, 3), 3)
    made = layers(nodes)
    first = pck.infer(call["x"], made, target=call["target"], steps=2, trace=True)
    before = [tensor.clone() for tensor in _tensors(first)]
    pck.infer(2 * call["x"], made, target=call["target"], steps=2, trace=True)
    assert all(torch.equal(a, b) for a, b in zip(before, _tensors(first), strict=True))


def test_more_tensors_than_a_launch_takes(gen: torch.Generator, layers: Layers) -> None:
    """33 layers have 67 tensors to bring in and 65 to take out."""
    nodes = [inputs.node("gaussian", gen, 3, 3, "tanh") for _ in range(33)]
    nodes, x = test_precision._float32(nodes), inputs.normal(gen, 2, 3).float()
    target = inputs.normal(gen, 2, 3).float()
    got, want = pck.infer(x, layers(nodes), target=target, steps=2), truth.infer(nodes, x, target=target, steps=2)
    for mine, right in zip([*got.phis, got.deltas[-1]], [*want.phis, want.deltas[-1]], strict=True):
        torch.testing.assert_close(mine.double(), right, rtol=1e-5, atol=1e-6)


def test_explain_tells_schedule_and_memory(gen: torch.Generator, layers: Layers) -> None:
    nodes, call = _paper("M1", gen, (5, 7, 6, 4, 3), 3)
    made = layers(nodes)
    line = pck.explain(call["x"], made, target=call["target"]).splitlines()[-1]
    assert line.startswith("triton: two launches a step (measured on an H200 with the paper's M1)")
    assert line.endswith(" MiB")
    with launches.use_schedule("persistent"):
        asked = pck.explain(call["x"], made, target=call["target"]).splitlines()[-1]
    assert asked.startswith("triton: persistent (asked for by use_schedule)")


def test_what_it_does_not_do_it_says(gen: torch.Generator, layers: Layers) -> None:
    nodes, call = _paper("M1", gen, (5, 7, 6, 4, 3), 3)
    with pytest.raises(pck.BackendUnavailable, match="tol"):
        pck.infer(call["x"], layers(nodes), target=call["target"], tol=1e-3)
    double = [truth.replace(n, weight=n.weight.double(), bias=n.bias.double()) for n in nodes]
    with pytest.raises(pck.BackendUnavailable, match="float64"):
        pck.infer(call["x"].double(), layers(double), steps=1)
    wide = pck.Layer(torch.zeros(8193, 5), energy="categorical")
    with pytest.raises(pck.BackendUnavailable, match="8193"):
        pck.infer(call["x"], [wide, pck.Layer(torch.zeros(2, 8193))], steps=1)
    long = [pck.Layer(torch.zeros(1025, 5), energy="categorical"), pck.Layer(torch.zeros(2, 1025))]
    with launches.use_schedule("persistent"), pytest.raises(ValueError, match="schedule: wanted rows of at most 1024"):
        pck.infer(call["x"], long, steps=1)


def test_an_unknown_schedule_is_named() -> None:
    with pytest.raises(ValueError, match="schedule: wanted a known name"), launches.use_schedule("three"):
        pass
