# SPDX-License-Identifier: MIT
"""The op `pc_kernels::linear_softmax_errors`: schema, fake, no autograd (it returns errors, which are not
differentiated). As in library.py the backend is chosen when the op runs.

v (R, V), weight (D, V), bias (D,) or None, target (R,) int64 or (R, D), mask (R,) bool or None: already checked.
energy: "categorical" or "gaussian", the output's family.
Returns energy (R,), grad_v (R, V), grad_weight (D, V), grad_bias (D,); the last two are empty where not asked for.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pc_kernels import dispatch

OP = "linear_softmax_errors"

_library = torch.library.Library("pc_kernels", "FRAGMENT")
_library.define(
    f"{OP}(Tensor v, Tensor weight, Tensor? bias, Tensor target, Tensor? mask, bool weight_grads, str precision, "
    "str energy='categorical') -> (Tensor, Tensor, Tensor, Tensor)"
)


def _run(v, weight, bias, target, mask, weight_grads, precision, energy="categorical"):  # a default does not arrive
    op = OP if energy == "categorical" else f"{OP} of {energy}"
    if precision != "fp32":
        op = f"{op} in {precision}" + (" with weight gradients" if weight_grads else "")
    return dispatch.module(dispatch.choose(op, [v])).linear_softmax_errors(
        v, weight, bias, target, mask, weight_grads, precision, energy
    )


def _fake(v, weight, bias, target, mask, weight_grads, precision, energy="categorical"):
    energies = v.new_empty(v.shape[0], dtype=torch.float64 if v.dtype == torch.float64 else torch.float32)
    grad_weight = v.new_empty(weight.shape if weight_grads else 0)
    grad_bias = v.new_empty(weight.shape[0] if weight_grads and bias is not None else 0)
    return energies, v.new_empty(v.shape), grad_weight, grad_bias


def _mark(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output)  # nothing that comes out requires grad, so nothing asks for a backward


def _no_backward(ctx: Any, *grads: Any) -> tuple[None, ...]:
    return (None,) * 8


_library.impl(OP, _run, "CompositeExplicitAutograd")
torch.library.register_fake(f"pc_kernels::{OP}", _fake)
torch.library.register_autograd(f"pc_kernels::{OP}", _no_backward, setup_context=_mark)
