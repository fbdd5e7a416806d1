# SPDX-License-Identifier: MIT
"""What people do today, written as they write it: predictive-coding inference by autograd in a loop of optimiser steps,
and the closed form in torch's ops."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.cases import Case, Inputs


def energy(case: Case, inputs: Inputs, phis: list[Tensor]) -> Tensor:
    """F with the output clamped, from plain torch ops.

    A hidden node of logits takes the natural step: its terms have that step's gradients, their value is not F's.
    """
    total = inputs.x.new_zeros(())
    below = inputs.x
    last = len(inputs.modules) - 1
    for l, module in enumerate(inputs.modules):
        a = module(below)
        if l == last and case.output == "categorical":
            return total + torch.nn.functional.cross_entropy(a, inputs.target, reduction="sum")
        if l + 1 == case.softmax:
            p, phi = torch.softmax(phis[l], -1).detach(), phis[l]
            total = total - (p * torch.log_softmax(a, -1)).sum() + 0.5 * (phi - a.detach()).square().sum()
            below = p + (phi - phi.detach())  # the feed's derivative is left out
            continue
        mu = torch.tanh(a)
        state = inputs.target if l == last else phis[l]
        total = total + 0.5 * (state - mu).square().sum()
        below = state
    return total


def _forward_states(case: Case, inputs: Inputs) -> list[Tensor]:
    states, below = [], inputs.x
    with torch.no_grad():
        for l, module in enumerate(inputs.modules[:-1]):
            a = module(below)
            state, below = (a, torch.softmax(a, -1)) if l + 1 == case.softmax else (torch.tanh(a),) * 2
            states.append(state.clone().requires_grad_())
    return states


def eager_autograd(case: Case, inputs: Inputs, weight_gradients: bool) -> list[Tensor]:
    """The final phis. weight_gradients: as most libraries do, backward reaches the weights at every step, too."""
    for module in inputs.modules:
        module.requires_grad_(weight_gradients)
    phis = _forward_states(case, inputs)
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


class ClosedForm:
    """The T moves from torch's products and elementwise ops alone: layer 1 hoisted, all memory made once.

    operands: dtype of the products' operands; sums and states stay float32. `run` may be captured in a CUDA graph.
    """

    def __init__(self, case: Case, inputs: Inputs, operands: torch.dtype = torch.float32):
        self.case, self.operands = case, operands
        self.x, self.target = inputs.x, inputs.target
        self.hot = torch.nn.functional.one_hot(self.target, case.widths[-1]).to(self.x) if self._logits(-1) else None
        self.weights = [module.weight.detach().to(operands) for module in inputs.modules]
        self.biases = [module.bias.detach() for module in inputs.modules]
        self.size = len(self.weights)
        shapes = [(case.batch, width) for width in case.widths[1:]]
        self.mus = [self.x.new_empty(shape) for shape in shapes]
        self.deltas = [self.x.new_empty(shape) for shape in shapes]
        self.phis = [self.x.new_empty(shape) for shape in shapes[:-1]]

    def _logits(self, l: int) -> bool:
        last = l in (-1, len(self.case.widths) - 2)
        return self.case.output == "categorical" if last else l + 1 == self.case.softmax

    def _product(self, a: Tensor, b: Tensor) -> Tensor:
        return (a.to(self.operands) @ b).to(self.x.dtype)

    def _predict(self, l: int, v: Tensor) -> None:
        a = self._product(v, self.weights[l].T).add_(self.biases[l])
        self.mus[l].copy_(a if self._logits(l) else torch.tanh(a))

    def _error(self, l: int) -> None:
        mu = self.mus[l]
        if self._logits(l):
            p = self.hot if l == self.size - 1 else torch.softmax(self.phis[l], -1)
            self.deltas[l].copy_(torch.softmax(mu, -1).sub_(p))  # type: ignore[arg-type]
        else:
            state = self.target if l == self.size - 1 else self.phis[l]
            self.deltas[l].copy_((mu - state) * (1 - mu * mu))

    def _fed(self, l: int) -> Tensor:
        return torch.softmax(self.phis[l], -1) if self._logits(l) else self.phis[l]

    def start(self) -> None:
        """The forward pass: phi_l = mu_l."""
        v = self.x
        for l in range(self.size):
            self._predict(l, v)
            if l < self.size - 1:
                self.phis[l].copy_(self.mus[l])
                v = self._fed(l)
            self._error(l)

    def step(self) -> None:
        """One Jacobi move."""
        feedback = [self._product(self.deltas[l + 1], self.weights[l + 1]) for l in range(self.size - 1)]
        for l, back in enumerate(feedback):
            self.phis[l].sub_((self.phis[l] - self.mus[l]).add_(back), alpha=self.case.lr)
        for l in range(self.size):
            if l:
                self._predict(l, self._fed(l - 1))
            self._error(l)

    def run(self) -> None:
        """All of it."""
        self.start()
        for _ in range(self.case.steps):
            self.step()
