# SPDX-License-Identifier: MIT
"""The float64 truth of linear_softmax_errors: whole logits, plain logarithms, autograd; and problems to try it on."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from inputs import normal
from torch import Tensor


@dataclass(frozen=True)
class Problem:
    """Arguments of linear_softmax_errors."""

    v: Tensor
    weight: Tensor
    bias: Tensor | None
    target: Tensor
    mask: Tensor | None = None

    def to(self, dtype: torch.dtype) -> Problem:
        """The same numbers, rounded."""
        bias = None if self.bias is None else self.bias.to(dtype)
        target = self.target.to(dtype) if self.target.is_floating_point() else self.target
        return replace(self, v=self.v.to(dtype), weight=self.weight.to(dtype), bias=bias, target=target)


def problem(
    gen: torch.Generator, rows: tuple[int, ...], classes: int, width: int, kind: str, bias: bool = True,
    masked: bool = False, scale: float = 1.0, dtype: torch.dtype = torch.float64,
) -> Problem:  # fmt: skip
    """kind: "index", "soft" (rows sum to one, half of the entries are zero) or "mass" (rows sum to anything)."""
    device = torch.get_default_device()
    target = torch.randint(classes, rows, generator=gen, device="cpu").to(device)
    if kind != "index":
        target = normal(gen, *rows, classes).relu()
        target[..., 0] += 0.1
        target = target / target.sum(-1, keepdim=True) if kind == "soft" else 3 * target
    mask = normal(gen, *rows) > -0.5 if masked else None
    return Problem(
        normal(gen, *rows, width),
        scale * normal(gen, classes, width) / width**0.5,
        normal(gen, classes) if bias else None,
        target,
        mask,
    ).to(dtype)


def truth(given: Problem, dtype: torch.dtype = torch.float64, family: str = "categorical") -> list[Tensor | None]:
    """energy, grad_v, grad_weight, grad_bias. Another dtype: what plain torch makes of it."""
    given = given.to(dtype)
    bias = given.bias
    leaves = [x.detach().requires_grad_() for x in (given.v, given.weight, *([] if bias is None else [bias]))]
    v, weight, *rest = leaves
    logits = v @ weight.T + (rest[0] if rest else 0.0)
    classes = weight.shape[0]
    o = given.target if given.target.is_floating_point() else torch.eye(classes, dtype=dtype)[given.target]
    if family == "gaussian":
        energy = 0.5 * (logits.softmax(-1) - o).square().sum(-1)
    else:
        energy = (torch.xlogy(o, o) - torch.where(o > 0, o * logits.log_softmax(-1), 0.0)).sum(-1)
    if given.mask is not None:
        energy = torch.where(given.mask, energy, 0.0)
    grads = torch.autograd.grad(energy.sum(), leaves)
    return [energy.detach(), *grads, *([None] if bias is None else [])]


def distance(got: Tensor, want: Tensor) -> float:
    """Greatest difference, relative to the greatest entry."""
    if want.numel() == 0:
        return 0.0
    return float((got.double() - want.double()).abs().max() / want.double().abs().max().clamp_min(1e-30))
