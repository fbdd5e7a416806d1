# SPDX-License-Identifier: MIT
"""The gate before a timing: errors of delta_l and dW_l per layer against float64, beside plain torch's in the same
precision."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

import pc_kernels as pck
from benchmarks.baselines import deltas_and_grads, eager_autograd
from benchmarks.cases import Case, Inputs, make

EPS = torch.finfo(torch.float32).eps


@dataclass(frozen=True)
class Truth:
    """The case in float64 by autograd (no pc_kernels code), and what plain torch makes of it in float32."""

    deltas: list[Tensor]
    grads: list[Tensor]
    phi_norms: list[float]
    torch_deltas: list[float]
    torch_grads: list[float]


def relative(value: Tensor, truth: Tensor) -> float:
    """||value - truth|| / ||truth||."""
    return ((value.double() - truth).norm() / truth.norm()).item()


def truth_of(case: Case, device: str = "cpu") -> Truth:
    """One float64 and one float32 inference by autograd."""
    exact, plain = make(case, torch.float64, device), make(case, device=device)
    phis = eager_autograd(case, exact, weight_gradients=False)
    deltas, grads = deltas_and_grads(case, exact, phis)
    torch_deltas, torch_grads = deltas_and_grads(case, plain, eager_autograd(case, plain, weight_gradients=False))
    return Truth(
        deltas,
        grads,
        [phi.detach().norm().item() for phi in phis] + [case.batch**0.5],  # the output's state is one-hot
        [relative(a, b) for a, b in zip(torch_deltas, deltas, strict=True)],
        [relative(a, b) for a, b in zip(torch_grads, grads, strict=True)],
    )


def errors(case: Case, inputs: Inputs, precision: str, truth: Truth) -> dict[str, list[float]]:
    """Relative error of delta_l and of dW_l, a number per layer."""
    result = pck.infer(inputs.x, inputs.layers, target=inputs.target, steps=case.steps, lr=case.lr, precision=precision)
    grads = pck.weight_grads(inputs.x, inputs.layers, result, reduction="sum")
    return {
        "delta": [relative(a, b) for a, b in zip(result.deltas, truth.deltas, strict=True)],
        "dW": [relative(a.weight, b) for a, b in zip(grads, truth.grads, strict=True)],
    }


def within_rule(found: dict[str, list[float]], emulated: dict[str, list[float]], truth: Truth) -> bool:
    """At most twice the error that plain torch makes in the same precision, plus 4 eps ||phi_l|| (relative to
    ||delta_l||)."""
    for l, delta in enumerate(truth.deltas):
        slack = 4 * EPS * truth.phi_norms[l] / delta.norm().item()
        if found["delta"][l] > 2 * emulated["delta"][l] + slack or found["dW"][l] > 2 * emulated["dW"][l] + slack:
            return False
    return True
