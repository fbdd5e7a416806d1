# SPDX-License-Identifier: MIT
"""The cluster-resident kernel's dataflow on the CPU: its own plan and body, a thread for each CTA."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import truth
from torch import Tensor

from cuda_host import library, pointer
from pc_kernels import pc_math

NEVER = 2**62


class ChainNode(ctypes.Structure):
    """csrc/cuda/cluster_nodes.h's."""

    _fields_ = (
        *((name, ctypes.c_int) for name in ("activation", "energy", "feed")),
        ("natural", ctypes.c_bool),
        ("clamped", ctypes.c_bool),
        ("lr", ctypes.c_float),
        ("moves_from", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("weight", "bias", "start", "index", "log_var", "mask", "hold")),
        ("mask_sample", ctypes.c_int64),
        ("hold_sample", ctypes.c_int64),
        ("phi", ctypes.c_void_p),
        ("delta", ctypes.c_void_p),
    )


@dataclass
class Outcome:
    phis: list[Tensor]
    deltas: list[Tensor]
    rounds: int
    parts: int
    bare: bool
    why: str


class Emulated:
    """The native ops of a CUDA build, on CPU tensors."""

    @staticmethod
    def infer_cluster(
        weights, biases, activations, energies, feeds, rules, lrs, log_vars, x, starts, masks, holds, clamped,
        moves_from, steps, momentum, differences,
    ) -> tuple[list[Tensor], list[Tensor], Tensor]:  # fmt: skip
        count, batch = len(weights), len(x)
        nodes, kept = (ChainNode * count)(), []

        def keep(tensor: Tensor | None, *shape: int) -> int | None:
            if tensor is None:
                return None
            kept.append(tensor.detach().expand(*shape).contiguous() if shape else tensor.detach().contiguous())
            return pointer(kept[-1])

        shapes = [(batch, weight.shape[0]) for weight in weights]
        deltas = [torch.full(shape, float("nan")) for shape in shapes]
        phis = [torch.full((0,) if held else shape, float("nan")) for shape, held in zip(shapes, clamped, strict=True)]
        for l, shape in enumerate(shapes):
            start = starts[l]
            by_class = start is not None and not start.is_floating_point()
            nodes[l] = ChainNode(
                activation=pc_math.ACTIVATIONS.index(activations[l]), energy=pc_math.ENERGIES.index(energies[l]),
                feed=pc_math.ACTIVATIONS.index(feeds[l]), natural=rules[l] == "natural", clamped=clamped[l], lr=lrs[l],
                moves_from=moves_from[l], weight=keep(weights[l]), bias=keep(biases[l]),
                start=None if by_class else keep(start), index=keep(start) if by_class else None,
                log_var=keep(log_vars[l]), mask=keep(masks[l], *shape), hold=keep(holds[l], *shape),
                mask_sample=shape[1], hold_sample=shape[1], phi=pointer(phis[l]), delta=pointer(deltas[l]),
            )  # fmt: skip
        found = _run_host(nodes, [shape[1] for shape in shapes], x.contiguous(), steps, momentum, differences)
        assert found.why == ""
        return phis, deltas, torch.tensor(found.diverged)

    @staticmethod
    def cluster_refusal(widths, activations, energies, feeds, rules, clamped, momentum) -> str:
        nodes = (ChainNode * len(widths))()
        for l in range(len(widths)):
            feed = -1 if feeds[l] == "sample" else pc_math.ACTIVATIONS.index(feeds[l])
            nodes[l] = ChainNode(
                activation=pc_math.ACTIVATIONS.index(activations[l]), energy=pc_math.ENERGIES.index(energies[l]),
                feed=feed, natural=rules[l] == "natural", clamped=clamped[l],
            )  # fmt: skip
        return _run_host(nodes, widths, torch.empty(0, 1), 0, momentum, True).why


class Found(NamedTuple):
    rounds: int
    parts: int
    diverged: int  # the lowest node that is not finite
    bare: int  # whether it took the shorter code of a bare run
    why: str  # it cannot run


def _run_host(nodes, widths, x: Tensor, steps: int, momentum: float, differences: bool, general: bool = False) -> Found:
    found, why = (ctypes.c_int64 * 4)(), ctypes.create_string_buffer(400)
    host, count = library("cluster"), len(widths)
    assert host.size_of_chain_node() == ctypes.sizeof(ChainNode)
    shapes = (ctypes.c_int64(count), ctypes.c_void_p(pointer(x)), ctypes.c_int64(x.shape[1]), ctypes.c_int64(len(x)))
    how = (ctypes.c_int64(steps), ctypes.c_double(momentum), ctypes.c_bool(differences), ctypes.c_bool(general))
    host.run_cluster(nodes, (ctypes.c_int64 * count)(*widths), *shapes, *how, found, why, ctypes.c_int64(400))
    return Found(*found, why.value.decode())


def run(
    nodes: Sequence[truth.Node],
    x: Tensor,
    *,
    target: Tensor | None = None,
    steps: int,
    lr: float = 0.1,
    momentum: float = 0.0,
    phis: Sequence[Tensor | None] | None = None,
    masks: Sequence[Tensor | None] | None = None,
    clamp: Sequence[Tensor | None] | None = None,
    precision: str = "bf16_delta",
    general: bool = False,
) -> Outcome:
    """As pck.infer on float32 nodes; states and deltas are NaN where the kernel leaves them unwritten.

    general: never by the shorter code of a bare run.
    """
    count, batch = len(nodes), len(x)
    nothing: list[Tensor | None] = [None] * count
    hidden, held = list(masks or nothing), list(clamp or nothing)
    given = list(phis or nothing)
    kept: list[Tensor] = []

    def keep(tensor: Tensor | None) -> int | None:
        if tensor is None:
            return None
        kept.append(tensor.detach().contiguous())
        return pointer(kept[-1])

    described, states, deltas = (ChainNode * count)(), [], []
    for l, node in enumerate(nodes):
        clamped = l + 1 == count and target is not None
        start = target if clamped else given[l]
        by_class = start is not None and not start.is_floating_point()
        states.append(torch.full((batch, len(node.weight)), float("nan")))
        deltas.append(torch.full_like(states[-1], float("nan")))
        spread = [None if flags is None else flags.expand(batch, -1) for flags in (hidden[l], held[l])]
        anyone = phis is not None or target is None or node.energy == "categorical_probs" or count < 2
        described[l] = ChainNode(
            activation=pc_math.ACTIVATIONS.index(node.activation), energy=pc_math.ENERGIES.index(node.energy),
            feed=-1 if node.fed == "sample" else pc_math.ACTIVATIONS.index(node.fed), natural=node.natural,
            clamped=clamped, lr=lr * node.lr_scale, moves_from=NEVER if clamped else 0 if anyone else count - 2 - l,
            weight=keep(node.weight), bias=keep(node.bias), start=None if by_class else keep(start),
            index=keep(start) if by_class else None,
            log_var=keep(node.log_var), mask=keep(spread[0]), hold=keep(spread[1]), mask_sample=len(node.weight),
            hold_sample=len(node.weight), phi=pointer(states[-1]), delta=pointer(deltas[-1]),
        )  # fmt: skip
    widths = [node.weight.shape[0] for node in nodes]
    found = _run_host(described, widths, x.contiguous(), steps, momentum, precision == "bf16_delta", general)
    return Outcome(states, deltas, found.rounds, found.parts, bool(found.bare), found.why)
