# SPDX-License-Identifier: MIT
"""The prior of a free `gaussian_full` node: w KL(N(u, e^s) || N(0, I)), its family's energy at mu = 0."""

from __future__ import annotations

import torch
from torch import Tensor

import pc_kernels as pck
from pc_runner.walk import State


def prior_energy(state: State, phi: Tensor) -> Tensor:
    """(B,), differentiable with respect to phi (B, ..., D)."""
    return (
        state.node.prior * pck.layer_energies([phi], [torch.zeros_like(phi)], ["gaussian_full"], masks=[state.mask])[0]
    )


def prior_errors(state: State, phi: Tensor) -> tuple[Tensor, Tensor]:
    """(B,) and its gradient with respect to phi, 0 where that is held or masked; one launch, nothing read back."""
    zero, weight = torch.zeros_like(phi), state.node.prior
    found = torch.ops.pc_kernels.layer_errors([phi], [zero], ["gaussian_full"], [], [state.mask], [state.hold], [False])
    return weight * found[0][0], weight * found[1][0]
