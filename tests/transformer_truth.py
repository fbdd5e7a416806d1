# SPDX-License-Identifier: MIT
"""The float64 truth of the language model: its forward pass from the parameters alone, F by literal formulas, T moves
by autograd. No code of pc_runner, no operator that keeps logits away."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from tests import truth

Node = Callable[[str, str, Tensor, Tensor | None], Tensor]  # (name, family, mu, mask) -> what the node passes on


@dataclass
class Shape:
    """What the parameters do not tell."""

    heads: int = 1
    gaussian: bool = False  # PC_F
    projections: bool = False


@dataclass
class Look:
    """One evaluation of F."""

    phis: dict[str, Tensor] = field(default_factory=dict)
    values: dict[str, Tensor] = field(default_factory=dict)
    mus: dict[str, Tensor] = field(default_factory=dict)
    natural: list[str] = field(default_factory=list)
    masks: dict[str, Tensor | None] = field(default_factory=dict)
    energy: dict[str, Tensor] = field(default_factory=dict)  # per sample

    @property
    def total(self) -> Tensor:
        return torch.stack([e.sum() for e in self.energy.values()]).sum()


def logits(p: dict[str, Tensor], tokens: Tensor, shape: Shape, node: Node) -> Tensor:
    """(B, T, vocabulary)."""

    def linear(name: str, h: Tensor) -> Tensor:
        return h @ p[f"{name}.weight"].T + p[f"{name}.bias"]

    def norm(name: str, h: Tensor) -> Tensor:
        centred = h - h.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return scaled * p[f"{name}.weight"] + p[f"{name}.bias"]

    def maybe(name: str, h: Tensor) -> Tensor:
        return node(name, "gaussian", h, None) if shape.projections else h

    h = norm("norm", p["embedding.weight"][tokens] + p["position.weight"])
    batch, length, width = h.shape
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    for b in range(sum(name.endswith("attention.query.weight") for name in p)):
        at = f"blocks.{b}.attention"
        q, k, v = (maybe(f"{at}.{n[0]}", linear(f"{at}.{n}", h)) for n in ("query", "key", "value"))
        q, k, v = (x.view(batch, length, shape.heads, -1).permute(0, 2, 1, 3) for x in (q, k, v))
        scores = torch.einsum("bhid,bhjd->bhij", q, k) / math.sqrt(width / shape.heads)
        if shape.gaussian:
            seen = node(f"{at}.scores", "gaussian", truth.softmax(scores, causal), causal)
        else:
            seen = node(f"{at}.scores", "categorical", scores, causal)
        mixed = torch.einsum("bhij,bhjd->bhid", seen, v).permute(0, 2, 1, 3).reshape(batch, length, width)
        h = norm(f"blocks.{b}.norm1", h + maybe(f"{at}.o", linear(f"{at}.out", mixed)))
        up = node(f"blocks.{b}.intermediate", "gaussian", linear(f"blocks.{b}.up", h).tanh(), None)
        h = norm(f"blocks.{b}.norm2", h + linear(f"blocks.{b}.down", up))
    h = node("head", "gaussian", linear("transform", h).tanh(), None)
    return linear("decoder", norm("head_norm", h))


def look(p: dict[str, Tensor], tokens: Tensor, y: Tensor, rows: Tensor, shape: Shape, phis: dict[str, Tensor]) -> Look:
    """F at the given states; a state that is not given is its prediction. rows: (B, T), True counts."""
    found = Look()

    def meet(name: str, family: str, mu: Tensor, mask: Tensor | None) -> Tensor:
        phi = phis.get(name, mu.detach().clone().requires_grad_())
        found.mus[name], found.phis[name], found.masks[name] = mu, phi, mask
        found.energy[name] = truth.energy(family, phi, mu, None, mask, False)
        found.values[name] = truth.softmax(phi, mask) if family == "categorical" else phi
        if family == "categorical":
            found.natural.append(name)
        return found.values[name]

    out = logits(p, tokens, shape, meet)
    target = F.one_hot(y, out.shape[-1]).to(out)
    each = (
        0.5 * (out.softmax(-1) - target).square().sum(-1) if shape.gaussian else -(target * out.log_softmax(-1)).sum(-1)
    )
    found.energy["output"] = torch.where(rows, each, 0.0).sum(1)
    return found


def moves(now: Look, natural: bool = True) -> dict[str, Tensor]:
    """The direction of every node's move."""
    found = {}
    for name, phi in now.phis.items():
        mask = now.masks[name]
        if natural and name in now.natural:
            (back,) = torch.autograd.grad(now.total, now.values[name], retain_graph=True)
            step = (phi - now.mus[name] + back).detach()
        else:
            (step,) = torch.autograd.grad(now.total, phi, retain_graph=True)
        found[name] = step if mask is None else step.masked_fill(~mask, 0.0)
    return found


def settle(
    p: dict[str, Tensor], tokens: Tensor, y: Tensor, rows: Tensor, shape: Shape, rates: list[float]
) -> tuple[Look, Tensor]:
    """One move per rate from the forward pass; the last look, and the energies before each move and after the last."""
    phis: dict[str, Tensor] = {}
    trace = []
    for rate in [*rates, None]:
        now = look(p, tokens, y, rows, shape, phis)
        trace.append(torch.stack([e.mean() for e in now.energy.values()]).detach())
        if rate is not None:
            steps = moves(now)
            phis = {n: (now.phis[n] - rate * step).detach().requires_grad_() for n, step in steps.items()}
    return now, torch.stack(trace)
