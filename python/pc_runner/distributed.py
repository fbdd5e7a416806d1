# SPDX-License-Identifier: MIT
"""Several processes on one batch: samples are independent in the E-step, only the M-step's gradients are averaged.

DistributedDataParallel does so for one backward pass per batch (`parallel`). `ipc` has one per move, inside `infer`:
its optimiser averages by itself (`SharedOptimizer`).

Started by `torchrun`, which sets the environment that `torch.distributed` reads; a lone process takes no part.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pc_runner.inference import Result
from pc_runner.network import PCNetwork
from pc_runner.node import fail


class World(NamedTuple):
    """Which of how many processes this is."""

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Whether this one writes files and prints."""
        return self.rank == 0

    def share(self, index: Tensor) -> Tensor:
        """This process's part of a batch's indices; whatever the number of processes, together they are the batch."""
        return index[self.rank :: self.size]

    def mean(self, value: float, count: int, total: int) -> float:
        """The joint batch's mean from each process's mean over its `count` of the `total` samples."""
        if self.size == 1:
            return value
        weighted = torch.tensor(value * count / total if count else 0.0, dtype=torch.float64)
        dist.all_reduce(weighted)
        return float(weighted)

    def any(self, flag: bool) -> bool:
        """Whether any process says so. Every process must ask."""
        if self.size == 1:
            return flag
        raised = torch.tensor(int(flag))
        dist.all_reduce(raised, op=dist.ReduceOp.MAX)
        return bool(raised)


@contextmanager
def joined() -> Iterator[World]:
    """The processes that torchrun started, connected (gloo: this trains on the CPU); World(0, 1) without torchrun."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield World()
        return
    dist.init_process_group("gloo")
    try:
        yield World(dist.get_rank(), size)
    finally:
        dist.destroy_process_group()


class Learner(nn.Module):
    """An inference as a forward pass, its M-step as a loss: what DistributedDataParallel averages the gradients of."""

    def __init__(self, net: PCNetwork):
        super().__init__()
        self.net = net
        self.result: Result | None = None

    def forward(self, x: Tensor, y: Tensor, weight: float, settings: dict[str, Any]) -> Tensor:
        """The loss of this process's samples times `weight`, its share of the batch over that of an equal split.

        Raises ValueError for "ipc", which has no loss afterwards.
        """
        if settings.get("algorithm") == "ipc":
            remedy = "call infer(..., optimizer=SharedOptimizer(...)) instead"
            fail("algorithm", "one with a loss after infer", "'ipc', whose weights move during infer", remedy)
        self.result = self.net.infer(x, y, **settings)
        return self.net.loss(self.result) * weight


def parallel(net: PCNetwork, world: World) -> nn.Module:
    """A `Learner` whose gradients are averaged over all processes; each process starts from the first one's weights."""
    learner = Learner(net)
    return learner if world.size == 1 else DistributedDataParallel(learner)


class SharedOptimizer:
    """An optimiser whose steps several processes take together, for `infer(..., algorithm="ipc", optimizer=...)`.

    weight: this process's share of the batch over that of an equal split, len(mine) * world.size / len(batch); with it
    every step is that of one process on the joint batch. Every process starts from the first one's weights.
    """

    shared = True  # every process must take every step

    def __init__(self, optimizer: torch.optim.Optimizer, world: World):
        self.weight = 1.0
        self._optimizer, self._world = optimizer, world
        if world.size > 1:
            for parameter in self._parameters():
                dist.broadcast(parameter.detach(), src=0)

    def _parameters(self) -> list[Tensor]:
        return [parameter for group in self._optimizer.param_groups for parameter in group["params"]]

    def zero_grad(self) -> None:
        """As torch's."""
        self._optimizer.zero_grad()

    def step(self) -> None:
        """Average the gradients over all processes, in one exchange per dtype; then the optimiser's own step."""
        grads = [parameter.grad for parameter in self._parameters() if parameter.grad is not None]
        for dtype in dict.fromkeys(grad.dtype for grad in grads) if self._world.size > 1 else ():
            alike = [grad for grad in grads if grad.dtype == dtype]
            flat = torch.cat([grad.flatten() for grad in alike]).mul_(self.weight / self._world.size)
            dist.all_reduce(flat)
            for grad, part in zip(alike, flat.split([grad.numel() for grad in alike]), strict=True):
                grad.copy_(part.view_as(grad))
        self._optimizer.step()
