# SPDX-License-Identifier: MIT
"""What a node does with its family: energy, delta, feed, and which of its entries move. Shapes as in `pc_math`."""

from __future__ import annotations

import torch
from torch import Tensor

from pc_kernels.numerics import softmax
from pc_kernels.pc_math import ACTIVATION_TABLE, ACTIVATIONS, CategoricalProbs, Energy

FEEDS: tuple[str, ...] = (*ACTIVATIONS, "sample")


def feed_value(feed: str, phi: Tensor, noise: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
    """What a node passes on: v = feed(phi). `sample`: z = u + e^(s/2) n of phi = [u, s], half the width."""
    if feed == "sample":
        assert noise is not None  # checked by inference.py
        u, s = phi.chunk(2, -1)
        return u + torch.exp(0.5 * s) * noise
    return softmax(phi, mask) if feed == "softmax" else ACTIVATION_TABLE[feed].value(phi)


def feed_vjp(feed: str, phi: Tensor, value: Tensor, grad: Tensor, noise: Tensor | None = None) -> Tensor:
    """feed'(phi)^T grad, given value = feed(phi). `sample`: to u: grad, to s: 1/2 n e^(s/2) grad."""
    if feed == "sample":
        assert noise is not None
        s = phi.chunk(2, -1)[1]
        return torch.cat([grad, 0.5 * torch.exp(0.5 * s) * grad * noise], -1)
    return ACTIVATION_TABLE[feed].vjp(phi, value, grad)


def node_delta(
    energy: Energy,
    activation: str,
    phi: Tensor,
    a: Tensor,
    mu: Tensor,
    *,
    log_var: Tensor | None,
    mask: Tensor | None,
    clamped: bool,
) -> Tensor:
    """delta = dF/da = act'(a)^T dE/dmu of one node; phi is the target of a clamped one."""
    if isinstance(energy, CategoricalProbs) and activation == "softmax":
        return energy.softmax_delta(phi, mu, mask)
    grad = (energy.target_grad_mu if clamped else energy.grad_mu)(phi, mu, log_var, mask)
    return ACTIVATION_TABLE[activation].vjp(a, mu, grad)


def node_energy(
    energy: Energy, phi: Tensor, mu: Tensor, log_var: Tensor | None, mask: Tensor | None, clamped: bool
) -> Tensor:
    """E_l of one node, (B,); phi is the target of a clamped one."""
    if mu.shape[0] == 0:
        return mu.new_zeros(0)  # an empty tensor cannot be flattened
    terms = energy.target_terms if clamped else energy.terms
    return terms(phi, mu, log_var, mask).flatten(1).sum(1)


def movable(mask: Tensor | None, hold: Tensor | None) -> Tensor | None:
    """Entries that may move: those that take part and are not held. None means all."""
    if mask is None or hold is None:
        return mask if hold is None else ~hold
    return mask & ~hold
