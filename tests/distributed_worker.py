# SPDX-License-Identifier: MIT
"""Trains a small M2 in float64 by PC and BP, alone or under torchrun: `distributed_worker.py OUT EPOCHS [resume]`."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import torch
from pc_runner.classifier import ClassifierRun
from pc_runner.config import TrainConfig
from pc_runner.data import load_images
from pc_runner.distributed import joined
from pc_runner.train import train

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
    finally:
        torch.set_default_dtype(before)


if __name__ == "__main__":
    work(Path(sys.argv[1]), int(sys.argv[2]), "resume" in sys.argv)
