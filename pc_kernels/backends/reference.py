# SPDX-License-Identifier: MIT
"""Every layer op in plain torch, on any device: the oracle of the other backends and the fallback. `infer` is in
reference_infer.py."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pc_kernels.backends.reference_infer import infer
from pc_kernels.backends.reference_linear_softmax import linear_softmax_errors
from pc_kernels.node_math import movable, node_energy
from pc_kernels.pc_math import ENERGY_TABLE, Energy

__all__ = [
    "infer", "layer_energies", "layer_errors", "linear_softmax_errors", "supports", "update_phi_", "weight_grads",
]  # fmt: skip


def supports(op: str, tensors: Sequence[Tensor]) -> str | None:
    """Always None: the reference runs everything (reduced precisions by rounding the operands of float32 products)."""
    return None


def _working(x: Tensor | None) -> Tensor | None:
    """float16 and bfloat16 are computed in float32."""
    return x.float() if x is not None and x.dtype in (torch.float16, torch.bfloat16) else x


def _grad_phi(
    family: Energy,
    phi: Tensor,
    mu: Tensor,
    log_var: Tensor | None,
    mask: Tensor | None,
    hold: Tensor | None,
    clamped: bool,
) -> Tensor:
    if clamped:
        return torch.zeros(phi.shape, dtype=mu.dtype, device=mu.device)
    grad = family.grad_phi(phi, mu, log_var, mask)
    return grad if hold is None else grad.masked_fill(hold, 0.0)


def layer_energies(
    phis: Sequence[Tensor],
    mus: Sequence[Tensor],
    energies: Sequence[str],
    log_vars: Sequence[Tensor | None],
    masks: Sequence[Tensor | None],
    holds: Sequence[Tensor | None],
    clamped: Sequence[bool],
) -> Tensor:
    """(L, B): E_l per sample."""
    rows = zip(phis, mus, energies, log_vars, masks, clamped, strict=True)
    return torch.stack(
        [
            node_energy(ENERGY_TABLE[name], _working(phi), _working(mu), _working(log_var), mask, held)  # type: ignore[arg-type]
            for phi, mu, name, log_var, mask, held in rows
        ]
    )


def layer_errors(
    phis: Sequence[Tensor],
    mus: Sequence[Tensor],
    energies: Sequence[str],
    log_vars: Sequence[Tensor | None],
    masks: Sequence[Tensor | None],
    holds: Sequence[Tensor | None],
    clamped: Sequence[bool],
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Energies (L, B), dE/dphi and dE/dmu per node (the README's section 2)."""
    grad_phi, grad_mu = [], []
    for raw_phi, raw_mu, name, raw_lv, mask, hold, held in zip(
        phis, mus, energies, log_vars, masks, holds, clamped, strict=True
    ):
        family, phi, mu, log_var = ENERGY_TABLE[name], _working(raw_phi), _working(raw_mu), _working(raw_lv)
        assert phi is not None
        assert mu is not None
        by_mu = family.target_grad_mu if held else family.grad_mu
        grad_phi.append(_grad_phi(family, phi, mu, log_var, mask, hold, held).to(raw_mu.dtype))
        grad_mu.append(by_mu(phi, mu, log_var, mask).to(raw_mu.dtype).clone(memory_format=torch.contiguous_format))
    return layer_energies(phis, mus, energies, log_vars, masks, holds, clamped), grad_phi, grad_mu


def update_phi_(
    phis: Sequence[Tensor],
    mus: Sequence[Tensor],
    feedback: Sequence[Tensor | None],
    energies: Sequence[str],
    rules: Sequence[str],
    lr: float,
    momentum: float,
    velocities: Sequence[Tensor],
    lr_scales: Sequence[float],
    log_vars: Sequence[Tensor | None],
    masks: Sequence[Tensor | None],
    holds: Sequence[Tensor | None],
) -> None:
    """One move of every node, in place: u <- m u + g; phi <- phi - lr u (the README's section 1, and 2 for the natural
    step)."""
    for l, (phi, mu, name) in enumerate(zip(phis, mus, energies, strict=True)):
        family, log_var = ENERGY_TABLE[name], log_vars[l]
        grad = phi - mu if rules[l] == "natural" else family.grad_phi(phi, mu, log_var, masks[l])
        back = feedback[l]
        moves = movable(masks[l], holds[l])
        step = grad if back is None else grad + back
        if velocities:
            step = momentum * velocities[l] + step
            velocities[l].copy_(step if moves is None else torch.where(moves, step, velocities[l]))
        moved = family.project(phi - lr * lr_scales[l] * step)
        phi.copy_(moved if moves is None else torch.where(moves, moved, phi))


def weight_grads(
    deltas: Sequence[Tensor], values: Sequence[Tensor], biased: Sequence[bool], scale: float
) -> tuple[list[Tensor], list[Tensor]]:
    """dW_l = scale * delta_l^T v_{l-1}, db_l = scale * sum delta_l (empty where there is no bias)."""
    weights = [(delta.T @ v).mul_(scale) for delta, v in zip(deltas, values, strict=True)]
    sums = zip(deltas, biased, strict=True)
    return weights, [delta.sum(0).mul_(scale) if there else delta.new_empty(0) for delta, there in sums]
