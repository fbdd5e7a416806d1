# SPDX-License-Identifier: MIT
"""Trains a small M2 in float64 by PC and BP, and a small net by `ipc`, alone or under torchrun:
`distributed_worker.py OUT EPOCHS [resume]`."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from pc_runner import PCNetwork, PCNode
from pc_runner.classifier import ClassifierRun
from pc_runner.config import TrainConfig
from pc_runner.data import load_images
from pc_runner.distributed import SharedOptimizer, World, joined
from pc_runner.train import train
from torch import nn

from tests.test_readme import BLOCKS

METHODS = ("pc_fkl", "bp")


def work(out: Path, epochs: int, resume: bool = False) -> None:
    """Folders out/pc_fkl and out/bp."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        images = load_images("digits", limit=115)  # batches of 32, 32, 32, 19: one that two processes cannot halve
        images = replace(images, x_train=images.x_train.double(), x_test=images.x_test.double())
        config = TrainConfig(
            model="m2", data="digits", limit=115, hidden=(12, 11, 10), epochs=epochs, batch_size=32, steps=5,
            optimizer="SGD", theta_lr=0.05, weight_updates=2,
        )  # fmt: skip
        with joined() as world:
            for method in METHODS:
                train(ClassifierRun, replace(config, method=method), images, out / method, resume=resume, world=world)
            work_ipc(out, world)
            work_own_loop(out, world)
    finally:
        torch.set_default_dtype(before)


def work_ipc(out: Path, world: World) -> None:
    """out/ipc.pt: weights after batches of 12 and 7 in float64, by `ipc` with momentum. Each process draws its own
    first weights; the first one's are to count."""
    torch.manual_seed(world.rank)
    layers = (
        nn.Linear(6, 5),
        nn.Tanh(),
        PCNode("gaussian"),
        nn.Linear(5, 4),
        nn.Tanh(),
        PCNode("laplace"),
        nn.Linear(4, 3),
    )
    net = PCNetwork(nn.Sequential(*layers), output="categorical").double()
    optimizer = SharedOptimizer(torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9), world)
    data = torch.Generator().manual_seed(9)
    for size in (12, 7):
        x = torch.randn(size, 6, generator=data, dtype=torch.float64)
        y = torch.randint(0, 3, (size,), generator=data)
        mine = world.share(torch.arange(size))
        optimizer.weight = len(mine) * world.size / size
        net.infer(x[mine], y[mine], steps=6, algorithm="ipc", optimizer=optimizer)
    if world.first:
        out.mkdir(parents=True, exist_ok=True)
        torch.save(net.state_dict(), out / "ipc.pt")


def work_own_loop(out: Path, world: World) -> None:
    """out/own_loop.pt: gradients of a batch of 8 by the README's wrapper, of a chain and of a module that is none."""
    block = next(block for block in BLOCKS if "class Step" in block)
    readme: dict[str, Any] = {}
    exec(compile(block, "README.md", "exec"), readme)
    grads = []
    for chain in (True, False):
        torch.manual_seed(3)
        behind = [nn.Linear(5, 4)] if chain else [nn.LayerNorm(5), nn.Linear(5, 4)]
        net = PCNetwork(nn.Sequential(nn.Linear(6, 5), nn.Tanh(), PCNode("gaussian"), *behind), output="categorical")
        x, y = torch.randn(8, 6), torch.randint(0, 4, (8,))
        mine, step = world.share(torch.arange(8)), readme["Step"](net)
        step = step if world.size == 1 else nn.parallel.DistributedDataParallel(step)
        step(x[mine], y[mine]).backward()
        grads += [p.grad for p in net.parameters()]
    if world.first:
        torch.save(grads, out / "own_loop.pt")


if __name__ == "__main__":
    work(Path(sys.argv[1]), int(sys.argv[2]), "resume" in sys.argv)
