# SPDX-License-Identifier: MIT
"""A linear layer and a softmax into a clamped node, for large vocabularies: checks and the op call; no math."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pc_kernels import checks, library_linear_softmax

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
PRECISIONS = ("fp32", "tf32", "bf16")
ENERGIES = ("categorical", "gaussian")

assert library_linear_softmax.OP  # importing it defines the op


class LinearSoftmaxErrors(NamedTuple):
    """Energies of the rows and the gradients of their sum."""

    energy: Tensor  # (...,)
    grad_v: Tensor  # (..., V)
    grad_weight: Tensor | None  # (D, V); None with weight_grads=False
    grad_bias: Tensor | None  # (D,); None without a bias, and with weight_grads=False


def linear_softmax_errors(
    v: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    *,
    mask: Tensor | None = None,
    weight_grads: bool = True,
    precision: str = "fp32",
    energy: str = "categorical",
) -> LinearSoftmaxErrors:
    """Energy and gradients of a softmax output clamped to `target` behind a linear layer, without its logits.

        a = v W^T + b,  q = softmax(a)
        "categorical":  E = sum o ln(o / q) in nats (0 ln 0 = 0),  delta = dE/da = q sum(o) - o
        "gaussian":     E = 1/2 sum (q - o)^2  (the paper's PC_F),  delta = q * (r - <q, r>),  r = q - o
        grad_v = delta W,  grad_weight = sum over rows of delta^T v,  grad_bias = sum over rows of delta

    v: (..., V), any number of rows; weight: (D, V); bias: (D,) or None; float32, float64, bfloat16 or float16, all
    alike. target o: class indices (...,) int64, or probabilities (..., D) as v, whose rows need not sum to one.
    mask: bool, broadcast to (...,); rows where it is False (padding) contribute exact zeros, whatever v and target hold
    there. weight_grads=False leaves the weights' gradients out: the steps of an inference need only grad_v.
    precision: of the matrix products; "fp32", "tf32" or "bf16" (operands rounded, delta among them, accumulated in
    float32). float64 runs in float64.
    energy: of the output, see above.

    Returns LinearSoftmaxErrors(energy (...,) float32, float64 of float64; grad_v, grad_weight, grad_bias of v's dtype).
    The (rows, D) logits exist a part at a time only, never more than 2^23 entries. Nothing is differentiable: these are
    the gradients. Raises ValueError or TypeError that names the bad argument.
    """
    _check_layer(v, weight, bias)
    rows, classes = tuple(v.shape[:-1]), weight.shape[0]
    if mask is not None:
        checks.mask("mask", mask, rows, v.device)
        mask = mask.expand(rows)
    _check_target(target, v, rows, classes, mask)
    checks.flag("weight_grads", weight_grads)
    checks.choice("precision", precision, PRECISIONS)
    checks.choice("energy", energy, ENERGIES)
    if precision != "fp32" and v.dtype == torch.float64:
        remedy = "float64 runs in float64 throughout; or pass v.float()"
        checks.fail("precision", "'fp32' with float64 input", repr(precision), remedy)
    count = math.prod(rows)
    rows_energy, grad_v, grad_weight, grad_bias = torch.ops.pc_kernels.linear_softmax_errors(
        v.reshape(count, v.shape[-1]), weight, bias, target.reshape(count, *target.shape[len(rows) :]),
        None if mask is None else mask.reshape(count), weight_grads, precision, energy,
    )  # fmt: skip
    return LinearSoftmaxErrors(
        rows_energy.view(rows),
        grad_v.view(v.shape),
        grad_weight if weight_grads else None,
        grad_bias if weight_grads and bias is not None else None,
    )


def _check_layer(v: Any, weight: Any, bias: Any) -> None:
    checks.floating("v", v, dtypes=FLOATS)
    if v.ndim == 0:
        checks.fail("v", "rows (..., V)", checks.describe(v), "a single row is v[None]")
    checks.floating("weight", weight, ndim=2, like=v)
    if weight.shape[1] != v.shape[-1] or 0 in weight.shape:
        wanted = f"shape (D, {v.shape[-1]}), one column per entry of v's rows, D and V > 0"
        checks.fail("weight", wanted, checks.describe(weight), "logits are v @ weight.T")
    if bias is not None:
        checks.floating("bias", bias, shape=weight.shape[:1], like=v)


def _check_target(target: Any, v: Tensor, rows: tuple[int, ...], classes: int, mask: Tensor | None) -> None:
    """Class indices, or probabilities; what stands in masked rows does not matter."""
    checks.tensor("target", target)
    if target.is_floating_point():
        checks.floating("target", target, shape=(*rows, classes), like=v)
        if target.numel() and checks.reads_values(target):
            least = target.amin(-1)  # one number per row: no copy of the rows that take part
            checks.in_range("target", least if mask is None else least.masked_fill(~mask, 0.0), 0.0, math.inf)
        return
    if target.dtype != torch.int64:
        remedy = "call .long()"
        checks.fail("target", "int64 class indices or float probabilities", checks.describe(target), remedy, TypeError)
    if target.shape != rows:
        remedy = "one index per row of v, or probabilities (..., D)"
        checks.fail("target", f"class indices of shape {rows}", checks.describe(target), remedy)
    if target.device != v.device:
        checks.fail("target", f"a tensor on {v.device}", checks.describe(target), f"call .to({str(v.device)!r})")
    checks.class_indices("target", target if mask is None else target.masked_fill(~mask, 0), classes, None)
