# SPDX-License-Identifier: MIT
"""`infer` on the cluster-resident kernel: the first pre-activations in plain torch, every move in one launch.

The kernel repeats products, so it wants them all done once before: a_l at t = 0 and the states that go with it, exact
in `bf16_delta`. After that nothing leaves the chip until the last move.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from pc_kernels import checks
from pc_kernels.backends.reference_infer import Arguments, round_bf16
from pc_kernels.dispatch import BACKENDS
from pc_kernels.errors import BackendUnavailable
from pc_kernels.node_math import feed_value
from pc_kernels.pc_math import ACTIVATION_TABLE, ENERGY_TABLE
from pc_kernels.schedule import Cone, sources

NEVER = 2**62


def _ops() -> Any:
    return torch.ops.pc_kernels_native


def refusal(args: Arguments) -> str | None:
    """Why the kernel cannot run this call; None if it can."""
    if args.trace:
        return "it keeps the states on the chip and leaves no trace of the energies"
    if args.tol >= 0:
        return "it runs all steps: tol is not written in it"
    widths = [weight.shape[0] for weight in args.weights]
    lists = (widths, args.activations, args.energies, args.feeds, args.rules, args.clamped)
    return _chain_refusal(*map(tuple, lists), args.momentum)


@lru_cache(maxsize=256)
def _chain_refusal(*described: Any) -> str | None:
    *lists, momentum = described
    return _ops().cluster_refusal(*map(list, lists), momentum) or None


def explained(*arguments: Any) -> str:
    """One line about how `infer` would run with these arguments."""
    why = refusal(Arguments(*arguments))
    if why is not None:
        return f"cuda: the cluster-resident kernel cannot run this: {why}"
    return "cuda: cluster-resident kernel, 16 samples a cluster, one launch for all steps; not yet run on hardware"


def first_moves(args: Arguments) -> tuple[list[int], int]:
    """Per node the move (from 0) in which it first moves, NEVER if it does not; and the products of all moves."""
    free, source = sources(args.energies, args.clamped, [phi is not None for phi in args.phis], args.priors)
    first, products = _first_moves(free, source, args.steps)
    return list(first), products


@lru_cache(maxsize=256)
def _first_moves(free: tuple[bool, ...], source: tuple[bool, ...], steps: int) -> tuple[tuple[int, ...], int]:
    cone, first, products = Cone(free, source), [NEVER] * len(free), len(free)
    for t in range(steps):
        move = cone.advance()
        first = [min(at, t) if moves else at for at, moves in zip(first, move.moves, strict=True)]
        products += 2 * sum(move.moves[:-1])  # the kernel takes feedback from every layer above, without an error too
    return tuple(first), products


def infer(*arguments: Any) -> tuple[list[Tensor], list[Tensor], Tensor, Tensor]:
    """T moves of a chain: (phis, deltas, no trace, status). BackendUnavailable where the kernel cannot run it."""
    args = Arguments(*arguments)
    why = refusal(args)
    if why is not None:
        raise BackendUnavailable(f"backend 'cuda' cannot run infer: {why}. Use use_backend('auto') to let one that can")
    states, pre = _start(args)
    first, products = first_moves(args)
    phis, deltas, diverged = _ops().infer_cluster(
        args.weights, args.biases, args.activations, args.energies, args.feeds, args.rules,
        [args.lr * scale for scale in args.lr_scales], args.log_vars, states, pre, args.masks, args.holds,
        args.clamped, first, args.steps, args.momentum, args.precision == "bf16_delta",
    )  # fmt: skip
    return phis, deltas, args.x.new_empty(0, len(states)), _status(args.steps, products, diverged)


def _status(steps: int, products: int, diverged: Tensor) -> Tensor:
    """The op's status. Numbers from the host take one copy; a captured graph would repeat it from memory that is gone,
    so there each is written by a launch."""
    numbers = (steps, products, BACKENDS.index("cuda"), 0, -1)
    if checks.reads_values(diverged):
        status = torch.tensor(numbers, dtype=torch.int64, device="cpu").to(diverged.device, non_blocking=True)
    else:
        status = torch.stack([torch.full_like(diverged, number) for number in numbers])
    status[3] = diverged
    return status


def _start(args: Arguments) -> tuple[list[Tensor], list[Tensor]]:
    """States (a clamped node: its target) and pre-activations at t = 0, by a forward pass."""
    states: list[Any] = []
    pre, v = [], args.x
    for l, weight in enumerate(args.weights):
        rounded = args.precision == "bf16"
        left, right = (round_bf16(v), round_bf16(weight)) if rounded else (v, weight)
        pre.append(torch.nn.functional.linear(left, right, args.biases[l]))
        given, family = args.phis[l], ENERGY_TABLE[args.energies[l]]
        if args.clamped[l]:  # the output: `refusal` has seen to it
            states.append(args.phis[l])
            break
        phi = ACTIVATION_TABLE[args.activations[l]].value(pre[l]) if given is None else given
        states.append(family.project(phi))
        mask = args.masks[l] if family.name == "categorical" else None
        v = feed_value(args.feeds[l], states[l], None, mask) if l + 1 < len(args.weights) else v
    return states, pre
