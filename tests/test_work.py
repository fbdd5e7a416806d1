# SPDX-License-Identifier: MIT
"""The work counter of `infer` against the README's section 3's closed formula and against torch's FLOP counter."""

from __future__ import annotations

from collections.abc import Callable

import inputs
import pytest
import torch
import truth
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import pc_kernels as pck
from pc_kernels.backends import reference

Layers = Callable[[list[truth.Node]], list[pck.Layer]]


def _products(count: int, steps: int) -> int:
    """L forward, then at move t the cone holds min(t, L - 1) nodes: each one product back and one forward again."""
    return count + sum(2 * min(t, count - 1) for t in range(1, steps + 1))


@pytest.mark.parametrize("steps", [0, 1, 2, 3, 4, 9])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_work_is_the_lower_bound(
    count: int, steps: int, gen: torch.Generator, layers: Layers, infer_backend: str
) -> None:
    nodes = [inputs.node("gaussian", gen, 5, 5, "tanh") for _ in range(count)]
    x, target = inputs.normal(gen, 4, 5), inputs.normal(gen, 4, 5)
    work = pck.infer(x, layers(nodes), target=target, steps=steps, momentum=0.5).work
    assert (work.products, work.lower_bound) == (_products(count, steps), _products(count, steps))


def test_work_with_given_states(gen: torch.Generator, layers: Layers, infer_backend: str) -> None:
    """No light cone when the states are given: 2 (L - 1) products for every move."""
    nodes = [inputs.node("gaussian", gen, 5, 5, "tanh") for _ in range(4)]
    phis = [inputs.normal(gen, 4, 5) for _ in range(4)]
    work = pck.infer(inputs.normal(gen, 4, 5), layers(nodes), phis=phis, steps=6).work
    assert work.lower_bound <= work.products <= 4 + 6 * 2 * 3


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("steps", [0, 2, 6])
@pytest.mark.parametrize("model", ["M1", "M3"])
def test_work_as_counted_from_outside(
    model: str, steps: int, given: bool, gen: torch.Generator, layers: Layers
) -> None:
    """torch's FLOP counter on the reference: all widths equal, so products = FLOPs / (2 B D D)."""
    nodes, x = inputs.paper(model, gen, (6, 6, 6, 6, 6)), inputs.normal(gen, 4, 6)
    target = inputs.target(nodes[-1].energy, gen, 4, 6)
    phis: list[Tensor | None] = [inputs.normal(gen, 4, 6) if given else None for _ in range(3)]
    with pck.use_backend("reference"):
        work = pck.infer(x, layers(nodes), target=target, phis=[*phis, None], steps=steps).work
    with FlopCounterMode(display=False) as counter:
        reference.infer(
            x, [n.weight for n in nodes], [n.bias for n in nodes], [n.activation for n in nodes],
            [n.energy for n in nodes], [n.fed for n in nodes], ["natural" if n.natural else "euclidean" for n in nodes],
            [1.0] * 4, [None] * 4, [*phis, target], [None] * 4, [None] * 4, [None] * 4, [False] * 3 + [True],
            [0.0] * 4,
            steps, 0.1, 0.0, -1.0, "fp32", False,
        )  # fmt: skip
    assert counter.get_total_flops() == work.products * 2 * 4 * 6 * 6
