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

import pc_kernels as pck
from cuda_host import library, pointer
from pc_kernels import pc_math

NEVER = 2**62


class ClusterNode(ctypes.Structure):
    """csrc/cuda/cluster_nodes.h's."""

    _fields_ = (
        *((name, ctypes.c_int) for name in ("activation", "energy", "feed")),
        ("natural", ctypes.c_bool),
        ("clamped", ctypes.c_bool),
        ("lr", ctypes.c_float),
        ("moves_from", ctypes.c_int64),
        *(
            (name, ctypes.c_void_p)
            for name in ("weight", "bias", "first_a", "start", "index", "log_var", "mask", "hold")
        ),
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
    why: str


class Emulated:
    """The native ops of a CUDA build, on CPU tensors."""

    @staticmethod
    def infer_cluster(
        weights, biases, activations, energies, feeds, rules, lrs, log_vars, starts, first_a, masks, holds, clamped,
        moves_from, steps, momentum, differences,
    ) -> tuple[list[Tensor], list[Tensor], Tensor]:  # fmt: skip
        count, batch = len(weights), len(first_a[0])
        nodes, kept = (ClusterNode * count)(), []

        def keep(tensor: Tensor | None, *shape: int) -> int | None:
            if tensor is None:
                return None
            kept.append(tensor.detach().expand(*shape).contiguous() if shape else tensor.detach().contiguous())
            return pointer(kept[-1])

        shapes = [(batch, weight.shape[0]) for weight in weights]
        deltas = [torch.full(shape, float("nan")) for shape in shapes]
        phis = [torch.full((0,) if held else shape, float("nan")) for shape, held in zip(shapes, clamped, strict=True)]
        for l, shape in enumerate(shapes):
            by_class = not starts[l].is_floating_point()
            nodes[l] = ClusterNode(
                activation=pc_math.ACTIVATIONS.index(activations[l]), energy=pc_math.ENERGIES.index(energies[l]),
                feed=pc_math.ACTIVATIONS.index(feeds[l]), natural=rules[l] == "natural", clamped=clamped[l], lr=lrs[l],
                moves_from=moves_from[l], weight=keep(weights[l]), bias=keep(biases[l]), first_a=keep(first_a[l]),
                start=None if by_class else keep(starts[l]), index=keep(starts[l]) if by_class else None,
                log_var=keep(log_vars[l]), mask=keep(masks[l], *shape), hold=keep(holds[l], *shape),
                mask_sample=shape[1], hold_sample=shape[1], phi=pointer(phis[l]), delta=pointer(deltas[l]),
            )  # fmt: skip
        found = _run_host(nodes, [shape[1] for shape in shapes], batch, steps, momentum, differences)
        assert found.why == ""
        return phis, deltas, torch.tensor(found.diverged)

    @staticmethod
    def cluster_refusal(widths, activations, energies, feeds, rules, clamped, momentum) -> str:
        nodes = (ClusterNode * len(widths))()
        for l in range(len(widths)):
            feed = -1 if feeds[l] == "sample" else pc_math.ACTIVATIONS.index(feeds[l])
            nodes[l] = ClusterNode(
                activation=pc_math.ACTIVATIONS.index(activations[l]), energy=pc_math.ENERGIES.index(energies[l]),
                feed=feed, natural=rules[l] == "natural", clamped=clamped[l],
            )  # fmt: skip
        return _run_host(nodes, widths, 0, 0, momentum, True).why


class Found(NamedTuple):
    rounds: int
    parts: int
    diverged: int  # the lowest node that is not finite
    why: str  # it cannot run


def _run_host(nodes, widths, batch: int, steps: int, momentum: float, differences: bool) -> Found:
    found, why = (ctypes.c_int64 * 3)(), ctypes.create_string_buffer(400)
    host, count = library("cluster"), len(widths)
    assert host.size_of_cluster_node() == ctypes.sizeof(ClusterNode)
    sizes = (ctypes.c_int64(count), ctypes.c_int64(batch), ctypes.c_int64(steps), ctypes.c_double(momentum))
    room = ctypes.c_int64(400)
    host.run_cluster(nodes, (ctypes.c_int64 * count)(*widths), *sizes, ctypes.c_bool(differences), found, why, room)
    return Found(*found, why.value.decode())


def _bf16(tensor: Tensor) -> Tensor:
    return tensor.bfloat16().double()


def _start(nodes: Sequence[truth.Node], x: Tensor, precision: str, **options) -> list[Tensor]:
    """The states at t = 0: forward values, in bf16 of rounded operands as every later product."""
    if precision == "bf16_delta":
        return truth.infer(list(nodes), x, steps=0, **options).phis
    names = ("weight", "bias", "activation", "energy", "feed", "log_var", "step", "lr_scale")
    layers = [pck.Layer(**{name: getattr(node, name) for name in names}) for node in nodes]
    with pck.use_backend("reference"):
        return pck.infer(x, layers, steps=0, precision=precision, **options).phis


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
) -> Outcome:
    """As pck.infer on float32 nodes; states and deltas are NaN where the kernel leaves them unwritten."""
    count, batch = len(nodes), len(x)
    nothing: list[Tensor | None] = [None] * count
    hidden, held = list(masks or nothing), list(clamp or nothing)
    first = _start(nodes, x, precision, target=target, phis=phis, masks=masks, clamp=clamp)
    cut = Tensor.double if precision == "bf16_delta" else _bf16
    kept: list[Tensor] = []

    def keep(tensor: Tensor | None) -> int | None:
        if tensor is None:
            return None
        kept.append(tensor.detach().contiguous())
        return pointer(kept[-1])

    v = x.double()
    described, states, deltas = (ClusterNode * count)(), [], []
    for l, node in enumerate(nodes):
        clamped = l + 1 == count and target is not None
        pre = cut(v) @ cut(node.weight).T + (0.0 if node.bias is None else node.bias.double())
        start = target if clamped else first[l].float()
        assert start is not None
        by_class = not start.is_floating_point()
        states.append(torch.full_like(pre, float("nan"), dtype=torch.float32))
        deltas.append(torch.full_like(pre, float("nan"), dtype=torch.float32))
        spread = [None if flags is None else flags.expand(batch, -1) for flags in (hidden[l], held[l])]
        anyone = phis is not None or target is None or node.energy == "categorical_probs" or count < 2
        described[l] = ClusterNode(
            activation=pc_math.ACTIVATIONS.index(node.activation), energy=pc_math.ENERGIES.index(node.energy),
            feed=-1 if node.fed == "sample" else pc_math.ACTIVATIONS.index(node.fed), natural=node.natural,
            clamped=clamped, lr=lr * node.lr_scale, moves_from=NEVER if clamped else 0 if anyone else count - 2 - l,
            weight=keep(node.weight), bias=keep(node.bias), first_a=keep(pre.float()),
            start=None if by_class else keep(start), index=keep(start) if by_class else None,
            log_var=keep(node.log_var), mask=keep(spread[0]), hold=keep(spread[1]), mask_sample=pre.shape[1],
            hold_sample=pre.shape[1], phi=pointer(states[-1]), delta=pointer(deltas[-1]),
        )  # fmt: skip
        if l + 1 < count:
            v = node.passes(first[l], hidden[l], None, False)
    widths = [node.weight.shape[0] for node in nodes]
    found = _run_host(described, widths, batch, steps, momentum, precision == "bf16_delta")
    return Outcome(states, deltas, found.rounds, found.parts, found.why)
