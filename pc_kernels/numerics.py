# SPDX-License-Identifier: MIT
"""Differences of exponentials that do not cancel, and masked softmax: the pieces that `pc_math` is made of."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from math import factorial
from typing import Any

import torch
from torch import Tensor

SERIES_RADIUS = 0.5  # below it differences of exponentials are taken from expm1/log1p/series, above it directly
_SERIES = [1.0 / factorial(k + 2) for k in range(14)]  # 0.5^14 / 16! < 4e-18: exact in float64


def without_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """Products inside have the precision that they are asked for."""
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


def expm1_minus_x(x: Tensor) -> Tensor:
    """e^x - 1 - x, accurate near 0 (the series x^2/2! + x^3/3! + ...)."""
    series = torch.full_like(x, _SERIES[-1])
    for coefficient in reversed(_SERIES[:-1]):
        series = series * x + coefficient
    return torch.where(x.abs() < SERIES_RADIUS, x * x * series, torch.expm1(x) - x)


def generalised_kl(p: Tensor, q: Tensor, log_ratio: Tensor) -> Tensor:
    """p ln(p/q) - p + q >= 0 for p, q >= 0, given log_ratio = ln(p/q); q where p = 0."""
    near = log_ratio.abs() < SERIES_RADIUS
    close = p * expm1_minus_x(torch.where(near, -log_ratio, 0.0))
    far = torch.where(p > 0, p * log_ratio, 0.0) - p + q
    return torch.where(near, close, far)


def difference_from_ratio(p: Tensor, q: Tensor, log_ratio: Tensor) -> Tensor:
    """q - p, given log_ratio = ln(p/q), accurate where p and q are close."""
    near = log_ratio.abs() < SERIES_RADIUS
    return torch.where(near, p * torch.expm1(torch.where(near, -log_ratio, 0.0)), q - p)


def softplus(x: Tensor) -> Tensor:
    """ln(1 + e^x), exact for every x (torch's own is linear beyond 20)."""
    return x.clamp(min=0) + torch.log1p(torch.exp(-x.abs()))


def keep(mask: Tensor | None, value: Tensor) -> Tensor:
    """`value` where the mask is True, an exact zero elsewhere; no mask keeps all."""
    return value if mask is None else torch.where(mask, value, 0.0)


def log_softmax(x: Tensor, mask: Tensor | None = None) -> Tensor:
    """log softmax over the last dimension; masked entries take no part and come out as -inf."""
    return torch.log_softmax(x if mask is None else x.masked_fill(~mask, -torch.inf), dim=-1)


def softmax(x: Tensor, mask: Tensor | None = None) -> Tensor:
    """Softmax over the last dimension; masked entries take no part and come out as exact zeros."""
    return torch.softmax(x if mask is None else x.masked_fill(~mask, -torch.inf), dim=-1)


def softmax_vjp(p: Tensor, grad: Tensor) -> Tensor:
    """J^T grad of p = softmax(x): p * (grad - <p, grad>)."""
    return p * (grad - (p * grad).sum(-1, keepdim=True))
