# SPDX-License-Identifier: MIT
"""Several processes on one batch: samples are independent in the E-step, only the M-step's gradients are averaged.

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
        """The loss of this process's samples times `weight`, its share of the batch over that of an equal split."""
        self.result = self.net.infer(x, y, **settings)
        return self.net.loss(self.result) * weight


def parallel(net: PCNetwork, world: World) -> nn.Module:
    """A `Learner` whose gradients are averaged over all processes; each process starts from the first one's weights."""
    learner = Learner(net)
    return learner if world.size == 1 else DistributedDataParallel(learner)
