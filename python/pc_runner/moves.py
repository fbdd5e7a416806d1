# SPDX-License-Identifier: MIT
"""How states move: the settings of an inference, read and checked."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch

import pc_kernels as pck
from pc_runner.node import fail


class Adam(NamedTuple):
    """The state optimiser Adam (Kingma & Ba 2015), with `infer`'s lr; one fused call for all nodes."""

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8


@dataclass(frozen=True)
class Moves:
    """How states move. rates: one lr per move, instead of `lr`. optimizer: None for gradient descent with `momentum`,
    or `Adam`."""

    steps: int = 32
    lr: float = 0.1
    momentum: float = 0.0
    tol: float | None = None
    optimizer: Adam | None = None
    trace: bool = True
    rates: tuple[float, ...] | None = None
    precision: str = "fp32"  # of the products of an output behind a linear layer

    def at(self, step: int) -> Moves:
        """The same with the lr of one move."""
        return self if self.rates is None else replace(self, lr=self.rates[step], rates=None)


def read_moves(
    steps: Any, lr: Any, momentum: Any, tol: Any, state_optimizer: Any, trace: Any, precision: str = "fp32"
) -> Moves:
    """The settings of `infer`, checked. ValueError or TypeError names the bad one."""
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 0:
        fail("steps", "a whole number >= 0", repr(steps), "check the configuration")
    several = isinstance(lr, (list, tuple))
    rates: list[Any] = list(lr) if several else [lr]
    if several and len(rates) != steps:
        fail("lr", f"a number, or {steps} of them, one per move", f"{len(rates)} numbers", "pass as many as steps")
    for rate in rates:  # checks them
        pck.infer(torch.zeros(0, 1), [pck.Layer(torch.zeros(1, 1))], steps=0, lr=rate, momentum=momentum, tol=tol)
    if not isinstance(trace, bool):
        fail("trace", "True or False", repr(trace), "pass a bool", TypeError)
    chosen = Adam() if state_optimizer == "adam" else None if state_optimizer == "sgd" else state_optimizer
    if chosen is not None and not isinstance(chosen, Adam):
        fail("state_optimizer", "None, 'sgd', 'adam' or pc_runner.Adam(...)", repr(state_optimizer), "choose one")
    if chosen is not None and momentum:
        fail("momentum", "0 with Adam", momentum, "Adam has betas of its own: pc_runner.Adam(betas=...)")
    values = tuple(map(float, rates))
    first = values[0] if values else 0.0
    return Moves(steps, first, float(momentum), tol, chosen, trace, values if several else None, precision)
