# SPDX-License-Identifier: MIT
"""Training runs of the image classifiers M1, M2 and M3."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pc_runner.config import TrainConfig
from pc_runner.data import Images
from pc_runner.models.mlp import build, targets
from pc_runner.network import PCNetwork
from pc_runner.train import Row, Run


class ClassifierRun(Run):
    """A run on labelled images. `evaluate` gives accuracy: of the test images, 0 to 1."""

    config: TrainConfig
    data: Images
    figures = ("accuracy",)

    def make_net(self) -> PCNetwork:
        config, images = self.config, self.data
        net = build(
            config.model, config.method, images.x_train.shape[1], images.classes, config.hidden, config.seed,
            config.lr_scale,
        )  # fmt: skip
        self.targets = targets(net, images.y_train, images.classes)
        return net

    def __len__(self) -> int:
        return len(self.data.x_train)

    def samples(self, index: Tensor) -> tuple[Tensor, Tensor, dict[str, Any]]:
        return self.data.x_train[index], self.targets[index], {}

    def evaluate(self) -> Row:
        return {"accuracy": accuracy(self.net, self.data.x_test, self.data.y_test)}


def accuracy(net: PCNetwork, x: Tensor, y: Tensor, chunk: int = 4096) -> float:
    """The part of (N, D) inputs whose largest feed-forward output is the class y (N,); 0 for none."""
    with torch.no_grad():
        right = [(net(a).argmax(1) == b).sum() for a, b in zip(x.split(chunk), y.split(chunk), strict=True)]
    return int(sum(right)) / max(len(y), 1)
