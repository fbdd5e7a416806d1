# SPDX-License-Identifier: MIT
"""The layout of the cluster-resident kernel: one owner for a column, nothing overlaps, it fits or says why."""

from __future__ import annotations

import cuda_host
import pytest
from cuda_host.plans import CLUSTER, NARROW, TILE, UNIT, ClusterPlan, Shape, plan_cluster
from hypothesis import example, given, settings
from hypothesis import strategies as st

pytestmark = pytest.mark.skipif(cuda_host.CXX is None, reason="no C++ compiler")

CHIP = 227 * 1024  # bytes of shared memory that sm_90 gives a CTA
PAPER = [Shape(512), Shape(512, softmax=True, keeps_fed=True), Shape(512), Shape(10, state=False, softmax=True)]
SHAPES = st.lists(st.builds(Shape, st.integers(1, 700), *3 * [st.booleans()]), min_size=1, max_size=8)


def _held(plan: ClusterPlan, l: int) -> int:
    """The most columns of node l that a CTA holds."""
    layer = plan.layers[l]
    if layer.narrow:
        return layer.padded
    return max(layer.first[c + 1] - layer.first[c] for c in range(CLUSTER))


def _regions(plan: ClusterPlan, shapes: list[Shape], rows: int = TILE) -> dict[str, tuple[int, int, int | None]]:
    """name -> (from, to, round; None: held all the time; -1: before the rounds), with sizes as the kernel has them."""
    out: dict[str, tuple[int, int, int | None]] = {}

    def add(name: str, start: int, size: int, during: int | None = None) -> None:
        out[name] = (start, start + size, during)

    add("lists", plan.lists, 6 * (4 + 2 * 2 * 63))
    if len(shapes) > 1:
        handed_on = max(plan.layers[l].padded for l in range(len(shapes) - 1))
        add("forward", plan.forward, 4 * rows * handed_on, -1)
    for l, shape in enumerate(shapes):
        layer, widest = plan.layers[l], _held(plan, l)
        add(f"phi{l}", layer.phi, 4 * rows * widest)
        add(f"mu{l}", layer.mu, 4 * rows * widest)
        if shape.state and plan.momentum:
            add(f"velocity{l}", layer.velocity, 4 * rows * widest)
        if shape.state and l + 1 < len(shapes):
            add(f"moved{l}", layer.moved, 2 * rows * widest)
        if shape.softmax:
            add(f"stats{l}", layer.stats, 3 * (CLUSTER + 1) * rows * 2 * 4)
        if shape.keeps_fed and shape.state:
            add(f"fed{l}", layer.fed, 4 * rows * widest)
        if l > 0:
            add(f"a{l}", layer.a, 4 * rows * widest)
            add(f"delta{l}", layer.delta, 2 * rows * widest)
            add(f"weight{l}", layer.weight, 2 * widest * layer.pitch)
        if l > 0 and layer.narrow:
            add(f"shares{l}", layer.shares, 4 * CLUSTER * rows * layer.padded)
        elif l > 0:
            add(f"gather{l}", layer.gather, 2 * rows * plan.layers[l - 1].padded, layer.round)
            add(f"receive{l}", layer.receive, 4 * CLUSTER * rows * layer.part, layer.round)
    return out


def _check_columns(plan: ClusterPlan, shapes: list[Shape]) -> None:
    for l, shape in enumerate(shapes):
        layer = plan.layers[l]
        assert layer.narrow == (0 < l == len(shapes) - 1 and shape.width <= NARROW)
        assert shape.width <= layer.padded < shape.width + UNIT  # padding of one unit at most
        assert layer.slice == _held(plan, l)
        if l > 0:
            below = plan.layers[l - 1]
            assert layer.pitch >= (below.slice if layer.narrow else below.padded)
            assert layer.pitch % 16 == 8  # rows of 16 bytes, eight of them in different banks
        if layer.narrow:
            continue
        owned = [set(range(layer.first[c], layer.first[c + 1])) for c in range(CLUSTER)]
        assert set(range(shape.width)) <= set().union(*owned) == set(range(layer.padded))  # none lost
        assert sum(map(len, owned)) == layer.padded  # none twice
        assert all(len(columns) % UNIT == 0 and len(columns) <= layer.slice for columns in owned)
        assert max(map(len, owned)) - min(map(len, owned)) <= UNIT  # evenly
        if l > 0:
            assert layer.part * plan.parts >= plan.layers[l - 1].slice  # every column is received in some part
            assert layer.part % UNIT == 0


def _check_memory(plan: ClusterPlan, shapes: list[Shape]) -> None:
    regions = sorted(_regions(plan, shapes).items(), key=lambda entry: entry[1][0])
    for _, (start, end, _) in regions:
        assert start % 128 == 0
        assert 0 <= start < end <= plan.bytes <= CHIP
    for i, (name, (_, end, during)) in enumerate(regions):
        for other, (start, _, then) in regions[i + 1 :]:
            assert start >= end or (None not in (during, then) and during != then), (name, other)


def _check_rounds(plan: ClusterPlan, shapes: list[Shape]) -> None:
    rounds = [plan.layers[l].round for l in range(1, len(shapes))]
    assert rounds == sorted(rounds)  # from the lowest layer up
    assert set(rounds) == set(range(plan.rounds))
    across = [l for l in range(1, len(shapes)) if not plan.layers[l].narrow]
    received = [plan.layers[l].receive for l in across]
    gathered = [plan.layers[l].gather + 2 * TILE * plan.layers[l - 1].padded for l in across]
    assert max(gathered, default=0) <= min(received, default=plan.bytes)  # may gather while the last is added up


@settings(max_examples=2000, deadline=None)
@given(shapes=SHAPES, momentum=st.booleans())
@example(shapes=PAPER, momentum=True)
def test_any_network(shapes: list[Shape], momentum: bool) -> None:
    plan, why = plan_cluster(shapes, momentum)
    if why:
        assert plan.bytes > CHIP - 1024  # it is really too large
        assert "KB" in why
        return
    assert plan.count == len(shapes)
    _check_columns(plan, shapes)
    _check_memory(plan, shapes)
    _check_rounds(plan, shapes)


@pytest.mark.parametrize("momentum", [False, True])
def test_the_papers_networks_fit(momentum: bool) -> None:
    plan, why = plan_cluster(PAPER, momentum)
    assert not why
    assert [plan.layers[l].slice * plan.layers[l].pitch for l in (1, 2, 3)] == [64 * 520, 64 * 520, 16 * 72]
    assert (plan.rounds, plan.parts) == (1, 1)  # two cluster barriers a step


def test_few_rounds_where_there_is_room() -> None:
    """A round costs two cluster barriers a step."""
    small = plan_cluster([Shape(64)] * 4)[0]
    assert (small.rounds, small.parts) == (1, 1)
    assert plan_cluster([Shape(600), Shape(640), Shape(300), Shape(40)])[0].parts <= 2


def test_a_network_that_does_not_fit_says_by_how_much() -> None:
    _, why = plan_cluster([Shape(1024)] * 4)
    assert "KB of shared memory" in why
    assert "it has 226 KB" in why


@pytest.mark.parametrize(
    ("shapes", "says"), [([], "there are 0"), ([Shape(4)] * 17, "there are 17"), ([Shape(0)], "layer 1 has no columns")]
)
def test_what_is_no_chain_for_it(shapes: list[Shape], says: str) -> None:
    assert says in plan_cluster(shapes)[1]
