# SPDX-License-Identifier: MIT
"""`infer` in CUDA C++ by one of two schedules.

LAYERS: two launches of tiles a move over all layers, from sm_80 on: any widths, families and precisions; small calls
from a CUDA graph. CLUSTER: one launch for the forward pass and all moves, the weights of the loop in a cluster's shared
memory, from sm_90 on, for what fits there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor

from pc_kernels import checks
from pc_kernels.backends import cuda_backend, cuda_recordings
from pc_kernels.backends.reference_infer import Arguments
from pc_kernels.dispatch import BACKENDS
from pc_kernels.errors import BackendUnavailable
from pc_kernels.schedule import Cone, sources

NEVER = 2**62
LAYERS, CLUSTER = "two launches a step", "cluster-resident"
CLUSTERS_FROM, OLDER = (9, 0), (0, 0)  # compute capability
CLUSTER_SHARED = 227 << 10  # bytes a block; cluster_plan.h's, and what is in reserve
MOST_LAYERS = 16  # cluster_plan.h's kMaxLayers
CLUSTER_BATCH = 120  # 15 clusters of 8 samples run at a time on an H200; beyond, they take turns

_wanted: ContextVar[str | None] = ContextVar("pc_kernels_cuda_schedule", default=None)


@contextmanager
def use_schedule(schedule: str | None) -> Iterator[None]:
    """Run the CUDA inferences inside by "two launches a step" or "cluster-resident"; None: by the rule. Holds for this
    thread; nests."""
    if schedule is not None:
        checks.choice("schedule", schedule, (LAYERS, CLUSTER))
    token = _wanted.set(schedule)
    try:
        yield
    finally:
        _wanted.reset(token)


def _ops() -> Any:
    return torch.ops.pc_kernels_native


@cache
def _cluster_device_refusal(device: torch.device) -> str | None:
    """Why the cluster-resident kernel cannot run on this GPU."""
    properties = torch.cuda.get_device_properties(device)
    if (properties.major, properties.minor) < CLUSTERS_FROM:
        return "it needs thread block clusters, which a GPU has from compute capability 9.0 on"
    if (cuda_backend.code_for(device) or OLDER) < CLUSTERS_FROM:
        return "the build holds no code with thread block clusters for this GPU (TORCH_CUDA_ARCH_LIST)"
    has = properties.shared_memory_per_block_optin
    if has < CLUSTER_SHARED:
        return f"it is planned for {CLUSTER_SHARED >> 10} KB of shared memory a block, and this GPU has {has >> 10} KB"
    return None


def cluster_refusal(args: Arguments) -> str | None:
    """Why the cluster-resident kernel cannot run this call; None if it can."""
    if args.precision not in ("bf16", "bf16_delta"):
        return f"it has products of bf16 only, and {args.precision} is asked for"
    if args.trace:
        return "it keeps the states on the chip and leaves no trace of the energies"
    device = _cluster_device_refusal(args.x.device)
    if device is not None:
        return device
    widths = [weight.shape[0] for weight in args.weights]
    lists = (widths, args.activations, args.energies, args.feeds, args.rules, args.clamped)
    return _chain_refusal(*map(tuple, lists), args.momentum)


@lru_cache(maxsize=256)
def _chain_refusal(*described: Any) -> str | None:
    *lists, momentum = described
    return _ops().cluster_refusal(*map(list, lists), momentum) or None


def refusal(args: Arguments) -> str | None:
    """Why neither schedule can run this call."""
    if args.tol >= 0:
        return "it runs all steps: tol is not written in it"
    if len(args.weights) > MOST_LAYERS:
        return f"it takes at most {MOST_LAYERS} layers, and there are {len(args.weights)}"
    for l, (energy, activation) in enumerate(zip(args.energies, args.activations, strict=True), 1):
        if energy == "categorical" and activation == "softmax":
            return f"node {l}: softmax before a categorical node, whose softmax it has already, is not written in it"
    return None


def choose(args: Arguments) -> tuple[str, str]:
    """(schedule, why) of a call that can run. Raises BackendUnavailable if the one asked for cannot."""
    wanted, why = _wanted.get(), cluster_refusal(args)
    if wanted == CLUSTER and why is not None:
        raise BackendUnavailable(f"schedule {CLUSTER!r} cannot run infer: {why}. Use use_schedule(None)")
    if wanted is not None:
        return wanted, "asked for by use_schedule"
    if why is not None:
        return LAYERS, f"the cluster-resident kernel cannot: {why}"
    if args.x.shape[0] > CLUSTER_BATCH:
        return LAYERS, f"more than {CLUSTER_BATCH} samples, for which clusters would take turns"
    return CLUSTER, "it fits, and is the faster one on an H200"


def declines(arguments: Sequence[Any], triton_runs: bool) -> str | None:
    """Why "auto" is to leave a call to others: this backend cannot run it, or Triton's kernels are faster at it."""
    args, wanted = Arguments(*arguments), _wanted.get()
    why = refusal(args) or (cluster_refusal(args) if wanted == CLUSTER else None)
    if why is not None or wanted is not None or not triton_runs:
        return why
    schedule, why = choose(args)
    return None if schedule == CLUSTER else f"Triton's kernels are faster than its {LAYERS} on an H200 ({why})"


def explained(*arguments: Any) -> str:
    """One line about how `infer` would run with these arguments."""
    args = Arguments(*arguments)
    why = refusal(args)
    if why is not None:
        return f"cuda: infer cannot run this: {why}"
    schedule, why = choose(args)
    if schedule == CLUSTER:
        return f"cuda: {schedule} kernel, 8 samples a cluster, one launch for all steps ({why})"
    graph = ", a CUDA graph from the second call on" if cuda_recordings.serves(args) else ""
    return f"cuda: {schedule}, tiles of 32 samples x 32 entries{graph} ({why})"


def first_moves(args: Arguments) -> tuple[list[int], int]:
    """Per node the move (from 0) in which it first moves, NEVER if it does not; and the products of all moves."""
    free, source = sources(args.energies, args.clamped, [phi is not None for phi in args.phis], args.priors)
    first, products = _first_moves(tuple(free), tuple(source), args.steps)
    return list(first), products


@lru_cache(maxsize=256)
def _first_moves(free: tuple[bool, ...], source: tuple[bool, ...], steps: int) -> tuple[tuple[int, ...], int]:
    cone, first, products = Cone(free, source), [NEVER] * len(free), len(free)
    for t in range(steps):
        move = cone.advance()
        first = [min(at, t) if moves else at for at, moves in zip(first, move.moves, strict=True)]
        products += 2 * sum(move.moves[:-1])  # the kernels take feedback from every layer above, without an error too
    return tuple(first), products


def infer(*arguments: Any) -> tuple[list[Tensor], list[Tensor], Tensor, Tensor]:
    """T moves of a chain: (phis, deltas, trace, status). BackendUnavailable where no schedule can run it."""
    args = Arguments(*arguments)
    why = refusal(args)
    if why is not None:
        raise BackendUnavailable(f"backend 'cuda' cannot run infer: {why}. Use use_backend('auto') to let one that can")
    schedule, _ = choose(args)
    first, products = first_moves(args)
    rates = [args.lr * scale for scale in args.lr_scales]
    chain = (args.weights, args.biases, args.activations, args.energies, args.feeds, args.rules, rates, args.log_vars)
    if schedule == CLUSTER:
        phis, deltas, diverged = _ops().infer_cluster(
            *chain, args.x, args.phis, args.masks, args.holds, args.clamped, first, args.steps, args.momentum,
            args.precision == "bf16_delta",
        )  # fmt: skip
        trace = args.x.new_empty(0, len(phis))
    else:
        phis, deltas, energies, diverged = _infer_layers(
            args, *chain, args.x, args.phis, args.masks, args.holds, args.noise, args.clamped, first, args.steps,
            args.momentum, args.precision, args.trace,
        )  # fmt: skip
        trace = energies.sum(2) / max(args.x.shape[0], 1)
    return phis, deltas, trace, _status(args.steps, products, diverged)


def _infer_layers(args: Arguments, *arguments: Any) -> tuple[Any, ...]:
    op = _ops().infer_layers
    return cuda_recordings.run(op, arguments, args.x.device) if cuda_recordings.serves(args) else op(*arguments)


def _status(steps: int, products: int, diverged: Tensor) -> Tensor:
    """The op's status. Numbers from the host take one copy; a captured graph would repeat it from memory that is gone,
    so there each is written by a launch."""
    numbers = (steps, products, BACKENDS.index("cuda"), 0, -1)
    if checks.reads_values(diverged):
        status = torch.tensor(numbers, dtype=torch.int64).to(diverged.device, non_blocking=True)
    else:
        status = torch.stack([torch.full_like(diverged, number) for number in numbers])
    status[3] = diverged
    return status
