# SPDX-License-Identifier: MIT
"""What people do today, written as they write it: predictive-coding inference by autograd, in a loop of optimiser
steps."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.cases import Case, Inputs


def energy(case: Case, inputs: Inputs, phis: list[Tensor]) -> Tensor:
    """F with the output clamped, from plain torch ops."""
    total = inputs.x.new_zeros(())
    below = inputs.x
    last = len(inputs.modules) - 1
    for l, module in enumerate(inputs.modules):
        a = module(below)
        if l == last and case.output == "categorical":
            return total + torch.nn.functional.cross_entropy(a, inputs.target, reduction="sum")
        mu = torch.tanh(a)
        state = inputs.target if l == last else phis[l]
        total = total + 0.5 * (state - mu).square().sum()
        below = state
    return total


def _forward_states(inputs: Inputs) -> list[Tensor]:
    states, below = [], inputs.x
    with torch.no_grad():
        for module in inputs.modules[:-1]:
            below = torch.tanh(module(below))
            states.append(below.clone().requires_grad_())
    return states


def eager_autograd(case: Case, inputs: Inputs, weight_gradients: bool) -> list[Tensor]:
    """The final phis. weight_gradients: as most libraries do, backward reaches the weights at every step, too."""
    for module in inputs.modules:
        module.requires_grad_(weight_gradients)
    phis = _forward_states(inputs)
    optimizer = torch.optim.SGD(phis, lr=case.lr)
    for _ in range(case.steps):
        optimizer.zero_grad()
        energy(case, inputs, phis).backward()
        optimizer.step()
    return phis


def deltas_and_grads(case: Case, inputs: Inputs, phis: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """delta_l = dF/da_l and dW_l (summed over the batch) at given states, by autograd of F."""
    pre: list[Tensor] = []
    hooks: list[Callable[[], None]] = []
    for module in inputs.modules:
        module.requires_grad_(True)
        handle = module.register_forward_hook(lambda m, i, out: (out.retain_grad(), pre.append(out))[-1])
        hooks.append(handle.remove)
        module.weight.grad = None
    energy(case, inputs, [phi.detach() for phi in phis]).backward()
    for remove in hooks:
        remove()
    return [a.grad for a in pre if a.grad is not None], [m.weight.grad.clone() for m in inputs.modules]  # type: ignore[union-attr]
