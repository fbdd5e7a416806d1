# SPDX-License-Identifier: MIT
"""Energies of any pair of torch.distributions: the registered KL, or the sampled cross-entropy of the paper's Eq. 8."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributions import Distribution, kl_divergence
from torch.distributions.kl import _dispatch_kl

Make = Callable[[Tensor], Distribution]


@dataclass(frozen=True, eq=False, repr=False)
class Pair:
    """E = D_KL[X(phi) || Xhat(mu)] where torch has that KL; otherwise, or with `samples`, the cross-entropy of Eq. 8:

        E = -1/N sum_i ln Xhat(z_i; mu),   z_i = a reparametrised sample of X(phi), drawn with the noise of t = 0.

    state, predicted: from a tensor (B, ...) to a distribution over its entries, as `lambda phi: Normal(phi, 1.0)`.
    samples: N >= 1, or None for the KL. A clamped node's energy is -ln Xhat(target; mu).
    Gradients come from autograd. Raises ValueError for samples < 1.
    """

    state: Make
    predicted: Make
    samples: int | None = None

    def __post_init__(self) -> None:
        if self.samples is not None and (not isinstance(self.samples, int) or self.samples < 1):
            raise ValueError(f"samples: wanted a whole number >= 1 or None, got {self.samples!r}; None takes the KL")

    def energy(self, phi: Tensor, mu: Tensor, held: bool = False, seed: int = 0) -> Tensor:
        """(B,), nats. held: phi is data. seed: of the noise, the same at every step of one inference.

        Raises ValueError where neither the KL nor reparametrised samples exist.
        """
        predicted = self.predicted(mu)
        if held:
            return -_per_sample(predicted.log_prob(phi))
        state = self.state(phi)
        if self.samples is None and has_kl(state, predicted):
            return _per_sample(kl_divergence(state, predicted))
        if not state.has_rsample:
            name = type(state).__name__
            raise ValueError(f"energy: wanted a registered KL or a state with rsample, got {name}; choose another pair")
        with torch.random.fork_rng(devices=[phi.device] if phi.is_cuda else []):
            torch.manual_seed(seed)
            z = state.rsample(torch.Size([self.samples or 1]))
        return -_per_sample(predicted.log_prob(z).mean(0))


def has_kl(state: Distribution, predicted: Distribution) -> bool:
    """Whether torch knows D_KL[state || predicted]."""
    return _dispatch_kl(type(state), type(predicted)) is not NotImplemented


def _per_sample(terms: Tensor) -> Tensor:
    return terms.flatten(1).sum(1) if terms.ndim > 1 else terms
