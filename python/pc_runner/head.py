# SPDX-License-Identifier: MIT
"""An output node and the linear layer that predicts it as one operator: energies and gradients without the logits."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import pc_kernels as pck
from pc_runner.node import fail
from pc_runner.walk import State


def check_head(state: State, v: Tensor) -> None:
    """Raise ValueError or TypeError for a target or a mask that does not fit a clamped output at v (B, ..., V)."""
    weight, bias, target, mask = _operands(state, v)
    classes, rows = weight.shape[0], tuple(v.shape[:-1])
    indices = not target.is_floating_point()
    if tuple(target.shape) != (rows if indices else (*rows, classes)):
        wanted = f"class indices {rows} or probabilities {(*rows, classes)}"
        fail("y", wanted, tuple(target.shape), "one target per row of what the module returns")
    none = target.reshape(-1, *target.shape[len(rows) :])[:0]
    pck.linear_softmax_errors(v.reshape(-1, v.shape[-1])[:0], weight, bias, none)  # dtypes and devices
    if not indices or not target.numel() or (target.is_cuda and torch.cuda.is_current_stream_capturing()):
        return
    shown = target if mask is None else target.masked_fill(~mask, 0)
    low, high = int(shown.min()), int(shown.max())
    if low < 0 or high >= classes:
        got = low if low < 0 else high
        fail("y", f"class indices 0..{classes - 1}", got, "a row that is padding belongs in masks={'output': rows}")


def head_errors(state: State, v: Tensor, precision: str = "fp32") -> tuple[Tensor, Tensor]:
    """E (B,) and dE/dv (B, ..., V). The operator itself is called: `check_head` has looked at the values once."""
    weight, bias, target, mask = _operands(state, v)
    rows = v.reshape(-1, v.shape[-1])
    energy, grad, _, _ = torch.ops.pc_kernels.linear_softmax_errors(
        rows, weight, bias, target.reshape(len(rows), *target.shape[v.ndim - 1 :]),
        None if mask is None else mask.reshape(-1), False, precision, state.node.energy,
    )  # fmt: skip
    return _per_sample(energy, v), grad.view(v.shape)


def head_energy(state: State, v: Tensor) -> Tensor:
    """E (B,), differentiable with respect to v, and to the layer's weight and bias."""
    if not torch.is_grad_enabled():
        return head_errors(state, v)[0]
    _, _, target, mask = _operands(state, v)
    assert state.head is not None  # as in _operands
    operands = (v, state.head.weight, state.head.bias, target, mask)
    return _per_sample(_Energy.apply(*operands, state.node.energy), v)  # type: ignore[arg-type]


def _operands(state: State, v: Tensor) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    """weight, bias, target, and the mask of the rows (B, ...) or None."""
    assert state.head is not None  # of every node that comes here
    mask, bias = state.mask, state.head.bias
    if mask is not None:
        if mask.shape[-1] != 1:
            remedy = "classes of an output behind linear= cannot be masked; leave linear= out for that"
            fail(f"masks[{state.name!r}]", "rows (B, ..., 1)", tuple(mask.shape), remedy)
        mask = mask.squeeze(-1).expand(v.shape[:-1])
    return state.head.weight.detach(), None if bias is None else bias.detach(), state.phi, mask


def _per_sample(rows: Tensor, v: Tensor) -> Tensor:
    return rows.view(v.shape[0], -1).sum(1)


class _Energy(torch.autograd.Function):
    """Energies of rows (...,). The gradients of their sum are there at once: they serve where all rows weigh alike."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, v: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, mask: Tensor | None, energy: str
    ) -> Tensor:
        learns = weight.requires_grad or (bias is not None and bias.requires_grad)
        found = pck.linear_softmax_errors(v, weight, bias, target, mask=mask, weight_grads=learns, energy=energy)
        ctx.save_for_backward(v, weight, bias, target, mask)
        ctx.grads, ctx.energy = found[1:], energy
        return found.energy

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        if any(stride and size > 1 for stride, size in zip(grad.stride(), grad.shape, strict=True)):
            v, weight, bias, target, mask = ctx.saved_tensors
            return (*_weighted(v, weight, bias, target, mask, grad, ctx.energy), None, None, None)
        scale = grad.flatten()[:1].sum()  # the one number, or none
        return *(None if g is None else g * scale for g in ctx.grads), None, None, None


def _weighted(
    v: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, mask: Tensor | None, grad: Tensor, family: str
) -> list[Tensor | None]:
    """Gradients of sum_r grad_r E_r with respect to v, weight and bias, with all logits at once."""
    rows = torch.ones_like(grad, dtype=torch.bool) if mask is None else mask
    leaves = [p if p is None else p.detach().requires_grad_() for p in (v, weight, bias)]
    with torch.enable_grad():
        mu, phi = F.linear(leaves[0][rows], leaves[1], leaves[2]), target[rows]  # type: ignore[index,arg-type]
        if family == "gaussian":
            mu = mu.softmax(-1)
            phi = phi if phi.is_floating_point() else F.one_hot(phi, mu.shape[-1]).to(mu.dtype)
        energy = pck.layer_energies([phi], [mu], [family], clamped=[True])[0]
        given = [p for p in leaves if p is not None]
        found = iter(torch.autograd.grad(energy, given, grad[rows]))
    return [None if p is None else next(found) for p in leaves]
