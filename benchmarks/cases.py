# SPDX-License-Identifier: MIT
"""The cases as data. Networks are fully connected, tanh hidden nodes with Gaussian energies (and at most one that holds
logits), torch.nn.Linear's initialisation."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

import pc_kernels as pck


@dataclass(frozen=True)
class Case:
    """One network at one batch size. `output`: "gaussian" (tanh, target one-hot: M1) or "categorical" (softmax: M2).

    softmax: the hidden node, counted from 1, that is categorical (M3: 2); 0: none.
    """

    name: str
    widths: tuple[int, ...]
    batch: int
    output: str = "gaussian"
    steps: int = 32
    lr: float = 0.1
    softmax: int = 0

    @property
    def flops(self) -> int:
        """Floating-point operations of the products that the lower bound leaves (schedule.py), two per multiply-add."""
        pairs = list(zip(self.widths, self.widths[1:], strict=False))
        forward = sum(a * b for a, b in pairs)
        loops = 0
        top = len(pairs) - 1
        for l, (a, b) in enumerate(pairs[1:], start=1):
            distance = top - l  # the layer's backward product starts at move distance + 1, its forward one after it
            loops += 2 * max(self.steps - distance, 0) * a * b
        return 2 * self.batch * (forward + loops)


@dataclass(frozen=True)
class Inputs:
    """A case made concrete."""

    x: Tensor
    target: Tensor
    layers: list[pck.Layer]
    modules: list[torch.nn.Linear]


def make(case: Case, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Inputs:
    """The same numbers every time, whatever the dtype and device."""
    torch.manual_seed(0)
    modules = [torch.nn.Linear(a, b) for a, b in zip(case.widths, case.widths[1:], strict=False)]
    x = torch.rand(case.batch, case.widths[0])
    labels = torch.randint(0, case.widths[-1], (case.batch,)).to(device)
    categorical = case.output == "categorical"
    target = labels if categorical else torch.nn.functional.one_hot(labels, case.widths[-1]).to(dtype)
    layers = []
    for l, module in enumerate(modules):
        logits = (categorical and l == len(modules) - 1) or l + 1 == case.softmax
        activation, energy = ("identity", "categorical") if logits else ("tanh", "gaussian")
        module.to(device, dtype)
        layers.append(pck.Layer(module.weight.detach(), module.bias.detach(), activation, energy))
    return Inputs(x.to(device, dtype), target, layers, modules)


M1 = (784, 512, 512, 512, 10)
CIFAR = (3072, 512, 512, 512, 10)
CASES = (
    Case("M1 784-512x3-10 B=64", M1, 64),
    Case("M1 784-512x3-10 B=256", M1, 256),
    Case("M1 784-512x3-10 B=1024", M1, 1024),
    Case("M2 3072-512x3-10 B=64", CIFAR, 64, "categorical"),
    Case("M2 3072-512x3-10 B=256", CIFAR, 256, "categorical"),
    Case("small 64-128-128-10 B=64", (64, 128, 128, 10), 64, "categorical"),
    Case("small 784-128x3-10 B=128", (784, 128, 128, 128, 10), 128, "categorical"),
)
