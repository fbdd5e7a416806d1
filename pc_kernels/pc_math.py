# SPDX-License-Identifier: MIT
"""The mathematics in torch, once: tables of activations and energy families with closed-form derivatives.

Everything that needs a name, a formula or a list of valid choices reads it from `ACTIVATIONS`, `ENERGIES` and
`FEEDS` here.

Shapes: phi, mu, a are (B, ..., D); families with structure along a dimension (softmax, mean/log-variance halves) use
the last. An energy returns per-entry terms of phi's shape (half the width for `gaussian_full`); their sum over all
dimensions but the first is E_l, a number per sample. All formulas are the README's section 2's, in forms that keep
relative accuracy near phi = mu, where the textbook forms cancel.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pc_kernels.numerics import (
    SERIES_RADIUS,
    difference_from_ratio,
    expm1_minus_x,
    generalised_kl,
    keep,
    log_softmax,
    softmax,
    softmax_vjp,
    softplus,
)

PROBABILITY_FLOOR = 1e-6  # `categorical_probs` keeps its state above this; the only clamp there is

# ---------------------------------------------------------------------------------------------------------------------
# activations: mu = f(a)


@dataclass(frozen=True)
class Activation:
    """mu = `value(a)`; `vjp(a, mu, grad)` = J^T grad, the derivative applied to a gradient with respect to mu."""

    name: str
    value: Callable[[Tensor], Tensor]
    vjp: Callable[[Tensor, Tensor, Tensor], Tensor]


LEAKY_SLOPE = 0.01
_SQRT_HALF = 0.5**0.5
_INV_SQRT_2PI = 0.3989422804014327


def _gelu_vjp(a: Tensor, mu: Tensor, grad: Tensor) -> Tensor:
    """gelu = a * Phi(a); derivative Phi(a) + a * N(a), Phi and N the normal distribution function and density."""
    cdf = 0.5 * torch.erfc(-a * _SQRT_HALF)
    return grad * (cdf + a * _INV_SQRT_2PI * torch.exp(-0.5 * a * a))


def _silu_vjp(a: Tensor, mu: Tensor, grad: Tensor) -> Tensor:
    """silu = a s, s = sigmoid(a); derivative s (1 + a (1 - s))."""
    s = torch.sigmoid(a)
    return grad * s * (1 + a * torch.sigmoid(-a))


_ACTIVATIONS = [
    Activation("identity", lambda a: a, lambda a, mu, grad: grad),
    Activation("tanh", torch.tanh, lambda a, mu, grad: grad * (1 - mu * mu)),
    Activation("relu", torch.relu, lambda a, mu, grad: torch.where(a > 0, grad, 0.0)),
    Activation(
        "leaky_relu",
        lambda a: torch.where(a > 0, a, LEAKY_SLOPE * a),
        lambda a, mu, grad: torch.where(a > 0, grad, LEAKY_SLOPE * grad),
    ),
    Activation("gelu", lambda a: a * (0.5 * torch.erfc(-a * _SQRT_HALF)), _gelu_vjp),
    Activation("silu", lambda a: a * torch.sigmoid(a), _silu_vjp),
    Activation("sigmoid", torch.sigmoid, lambda a, mu, grad: grad * mu * torch.sigmoid(-a)),
    Activation(
        "hardtanh",
        lambda a: a.clamp(-1, 1),
        lambda a, mu, grad: torch.where(a.abs() < 1, grad, 0.0),
    ),
    Activation("softplus", softplus, lambda a, mu, grad: grad * torch.sigmoid(a)),
    Activation("softmax", softmax, lambda a, mu, grad: softmax_vjp(mu, grad)),
]
ACTIVATION_TABLE: dict[str, Activation] = {entry.name: entry for entry in _ACTIVATIONS}
ACTIVATIONS: tuple[str, ...] = tuple(ACTIVATION_TABLE)


# ---------------------------------------------------------------------------------------------------------------------
# energies: E = D_KL[X(phi) || Xhat(mu)]


class Energy:
    """One family. Methods take (phi, mu, log_var, mask) and return per-entry tensors; `target_*` take the clamped
    target.

    `feed` is the default map from phi to what the node passes on; `natural` says that the natural step exists (the
    README's section 2); `target_is_state` that a clamped target has the form of phi (otherwise the `target_*` formulas
    differ).
    """

    name = ""
    feed = "identity"
    natural = False
    target_is_state = True

    def terms(self, phi: Tensor, mu: Tensor, log_var: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        raise TypeError(f"{self.name}: no such form")

    def grad_phi(self, phi: Tensor, mu: Tensor, log_var: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        raise TypeError(f"{self.name}: no such form")

    def grad_mu(self, phi: Tensor, mu: Tensor, log_var: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        raise TypeError(f"{self.name}: no such form")

    def target_terms(self, target: Tensor, mu: Tensor, log_var: Tensor | None, mask: Tensor | None) -> Tensor:
        return self.terms(target, mu, log_var, mask)

    def target_grad_mu(self, target: Tensor, mu: Tensor, log_var: Tensor | None, mask: Tensor | None) -> Tensor:
        return self.grad_mu(target, mu, log_var, mask)

    def fisher(self, phi: Tensor, direction: Tensor, mask: Tensor | None = None) -> Tensor:
        """The Fisher matrix of X(phi) times a direction: turns a natural step's direction into the Euclidean
        gradient."""
        raise TypeError(f"{self.name}: no natural step")

    def project(self, phi: Tensor) -> Tensor:
        """The state brought back into the family's domain after a move."""
        return phi


class Gaussian(Energy):
    """Unit variance: E = 1/2 sum (phi - mu)^2 (paper Eq. 6 with Eq. 5's factor)."""

    name = "gaussian"

    def terms(self, phi, mu, log_var=None, mask=None):
        return keep(mask, 0.5 * (phi - mu) ** 2)

    def grad_phi(self, phi, mu, log_var=None, mask=None):
        return keep(mask, phi - mu)

    def grad_mu(self, phi, mu, log_var=None, mask=None):
        return keep(mask, mu - phi)


class GaussianDiag(Energy):
    """Learnable diagonal variance: E = 1/2 sum (phi - mu)^2 e^-lv + lv (paper Eq. 5, a cross-entropy)."""

    name = "gaussian_diag"

    def terms(self, phi, mu, log_var=None, mask=None):
        assert log_var is not None  # checked by functional.py
        return keep(mask, 0.5 * ((phi - mu) ** 2 * torch.exp(-log_var) + log_var))

    def grad_phi(self, phi, mu, log_var=None, mask=None):
        assert log_var is not None
        return keep(mask, (phi - mu) * torch.exp(-log_var))

    def grad_mu(self, phi, mu, log_var=None, mask=None):
        assert log_var is not None
        return keep(mask, (mu - phi) * torch.exp(-log_var))

    def grad_log_var(self, phi: Tensor, mu: Tensor, log_var: Tensor, mask: Tensor | None = None) -> Tensor:
        """Per entry: 1/2 (1 - (phi - mu)^2 e^-lv)."""
        return keep(mask, 0.5 * (1 - (phi - mu) ** 2 * torch.exp(-log_var)))


class GaussianFull(Energy):
    """Input-dependent variance: phi = [u, s], mu = [uh, sh]; E = 1/2 sum expm1(s-sh) - (s-sh) + (u-uh)^2 e^-sh.

    A mask acts term by term: its first half on the mean's terms, its second on the variance's.
    """

    name = "gaussian_full"
    feed = "sample"
    target_is_state = False

    def terms(self, phi, mu, log_var=None, mask=None):
        (u, s), (uh, sh) = phi.chunk(2, -1), mu.chunk(2, -1)
        mask_u, mask_s = _halves(mask, mu)
        return 0.5 * (keep(mask_s, expm1_minus_x(s - sh)) + keep(mask_u, (u - uh) ** 2 * torch.exp(-sh)))

    def grad_phi(self, phi, mu, log_var=None, mask=None):
        (u, s), (uh, sh) = phi.chunk(2, -1), mu.chunk(2, -1)
        return keep(mask, torch.cat([(u - uh) * torch.exp(-sh), 0.5 * torch.expm1(s - sh)], -1))

    def grad_mu(self, phi, mu, log_var=None, mask=None):
        (u, s), (uh, sh) = phi.chunk(2, -1), mu.chunk(2, -1)
        mask_u, mask_s = _halves(mask, mu)
        difference = keep(mask_u, u - uh)  # an exact zero, whatever stands in masked entries
        scaled = keep(mask_u, difference * torch.exp(-sh))
        grad_s = keep(mask_s, torch.expm1(s - sh)) + scaled * difference
        return torch.cat([-scaled, -0.5 * grad_s], -1)

    def target_terms(self, target, mu, log_var, mask):
        uh, sh = mu.chunk(2, -1)
        return keep(mask, 0.5 * (sh + (target - uh) ** 2 * torch.exp(-sh)))

    def target_grad_mu(self, target, mu, log_var, mask):
        uh, sh = mu.chunk(2, -1)
        scaled = (target - uh) * torch.exp(-sh)
        grad_u, grad_s = -scaled, 0.5 * (1 - scaled * (target - uh))
        return torch.cat([keep(mask, grad_u), keep(mask, grad_s)], -1)


def _halves(mask: Tensor | None, mu: Tensor) -> tuple[Tensor | None, Tensor | None]:
    return (None, None) if mask is None else mask.expand_as(mu).chunk(2, -1)  # type: ignore[return-value]


class Categorical(Energy):
    """phi, mu hold logits, p = softmax(phi), q = softmax(mu): E = <p, ln p - ln q>."""

    name = "categorical"
    feed = "softmax"
    natural = True
    target_is_state = False

    def terms(self, phi, mu, log_var=None, mask=None):
        return generalised_kl(*_softmax_ratio(phi, mu, mask))  # sum p = sum q: the added -p + q cancels over a row

    def grad_phi(self, phi, mu, log_var=None, mask=None):
        p, _, ratio = _softmax_ratio(phi, mu, mask)
        return softmax_vjp(p, ratio)

    def grad_mu(self, phi, mu, log_var=None, mask=None):
        return difference_from_ratio(*_softmax_ratio(phi, mu, mask))

    def target_terms(self, target, mu, log_var, mask):
        log_q = log_softmax(mu, mask)
        if not target.is_floating_point():
            terms = torch.zeros_like(mu)
            return terms.scatter_(-1, target.unsqueeze(-1), -log_q.gather(-1, target.unsqueeze(-1)))
        return torch.where(target > 0, target * (torch.log(target) - log_q), 0.0)

    def target_grad_mu(self, target, mu, log_var, mask):
        q = softmax(mu, mask)
        if not target.is_floating_point():
            index = target.unsqueeze(-1)
            return q.scatter(-1, index, q.gather(-1, index) - 1)
        return q * target.sum(-1, keepdim=True) - target

    def fisher(self, phi, direction, mask=None):
        return softmax_vjp(softmax(phi, mask), direction)


def _softmax_ratio(phi: Tensor, mu: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """p = softmax(phi), q = softmax(mu) and L = ln(p/q), L accurate (and 0 at phi = mu) even where p and q nearly
    agree.

    With d = phi - mu - c0, c0 the difference of the two logsumexps as rounded (their maxima apart, or a shift of phi
    would
    swamp it), p = q e^d / sum(q e^d), so L = d - log1p(sum q (e^d - 1)).
    """
    p, max_p, log_sum_p = _softmax_parts(phi, mask)
    q, max_q, log_sum_q = _softmax_parts(mu, mask)
    d = keep(mask, phi - mu - (max_p - max_q) - (log_sum_p - log_sum_q))
    near = d.abs() < SERIES_RADIUS
    change = torch.where(near, q * torch.expm1(torch.where(near, d, 0.0)), p - q)
    return p, q, keep(mask, d - torch.log1p(change.sum(-1, keepdim=True)))


def _softmax_parts(x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """softmax(x), max(x) and ln sum e^(x - max) of each row, masked entries left out."""
    visible = x if mask is None else x.masked_fill(~mask, -torch.inf)
    most = visible.amax(-1, keepdim=True)
    exponentials = torch.exp(visible - most)
    total = exponentials.sum(-1, keepdim=True)
    return exponentials / total, most, torch.log(total)


class CategoricalProbs(Energy):
    """phi, mu hold probabilities: the generalised KL, E = sum phi ln(phi/mu) - phi + mu. Its free state stays >=
    1e-6."""

    name = "categorical_probs"

    def terms(self, phi, mu, log_var=None, mask=None):
        return keep(mask, generalised_kl(phi, mu, self._log_ratio(phi, mu)))

    def grad_phi(self, phi, mu, log_var=None, mask=None):
        return keep(mask, self._log_ratio(phi, mu))

    def grad_mu(self, phi, mu, log_var=None, mask=None):
        return keep(mask, (mu - phi) / mu)

    def softmax_delta(self, phi: Tensor, mu: Tensor, mask: Tensor | None = None) -> Tensor:
        """dF/da for mu = softmax(a): mu * sum(phi) - phi, without the 1 - phi/mu that overflows where mu underflows."""
        weighted = keep(mask, mu - phi)  # mu * dE/dmu
        return weighted - mu * weighted.sum(-1, keepdim=True)

    def project(self, phi):
        return phi.clamp(min=PROBABILITY_FLOOR)

    @staticmethod
    def _log_ratio(phi: Tensor, mu: Tensor) -> Tensor:
        relative = (phi - mu) / mu
        near = relative.abs() < SERIES_RADIUS
        return torch.where(near, torch.log1p(torch.where(near, relative, 0.0)), torch.log(phi) - torch.log(mu))


class Bernoulli(Energy):
    """phi, mu hold logits: E = sum sig(phi)(phi - mu) + softplus(mu) - softplus(phi)."""

    name = "bernoulli"
    feed = "sigmoid"
    natural = True
    target_is_state = False

    def terms(self, phi, mu, log_var=None, mask=None):
        # the KL of the two outcomes' probabilities, each a generalised KL whose -p + q cancel against one another
        on = generalised_kl(torch.sigmoid(phi), torch.sigmoid(mu), _log_sigmoid_ratio(phi, mu))
        off = generalised_kl(torch.sigmoid(-phi), torch.sigmoid(-mu), _log_sigmoid_ratio(-phi, -mu))
        return keep(mask, on + off)

    def grad_phi(self, phi, mu, log_var=None, mask=None):
        return keep(mask, self.fisher(phi, phi - mu))

    def grad_mu(self, phi, mu, log_var=None, mask=None):
        d = phi - mu
        near = d.abs() < SERIES_RADIUS
        close = -torch.sigmoid(-phi) * torch.sigmoid(mu) * torch.expm1(torch.where(near, d, 0.0))
        return keep(mask, torch.where(near, close, _sigmoid_difference(mu, torch.sigmoid(phi), torch.sigmoid(-phi))))

    def target_terms(self, target, mu, log_var, mask):
        entropy = torch.special.entr(target) + torch.special.entr(1 - target)
        return keep(mask, target * softplus(-mu) + (1 - target) * softplus(mu) - entropy)

    def target_grad_mu(self, target, mu, log_var, mask):
        return keep(mask, _sigmoid_difference(mu, target, 1 - target))

    def fisher(self, phi, direction, mask=None):
        return keep(mask, torch.sigmoid(phi) * torch.sigmoid(-phi) * direction)


def _sigmoid_difference(mu: Tensor, on: Tensor, off: Tensor) -> Tensor:
    """sig(mu) - on, off = 1 - on, from the smaller two of the four: near 1 the others have no digits left."""
    return torch.where(mu > 0, off - torch.sigmoid(-mu), torch.sigmoid(mu) - on)


def _log_sigmoid_ratio(phi: Tensor, mu: Tensor) -> Tensor:
    """ln(sig(phi) / sig(mu)) = softplus(-mu) - softplus(-phi) = log1p(sig(-phi) (e^d - 1)), d = phi - mu."""
    d = phi - mu
    near = d.abs() < SERIES_RADIUS
    close = torch.log1p(torch.sigmoid(-phi) * torch.expm1(torch.where(near, d, 0.0)))
    return torch.where(near, close, softplus(-mu) - softplus(-phi))


class Laplace(Energy):
    """Unit scale, d = |phi - mu|: E = sum d + e^-d - 1."""

    name = "laplace"

    def terms(self, phi, mu, log_var=None, mask=None):
        return keep(mask, expm1_minus_x(-(phi - mu).abs()))

    def grad_phi(self, phi, mu, log_var=None, mask=None):
        d = phi - mu
        return keep(mask, -torch.sign(d) * torch.expm1(-d.abs()))

    def grad_mu(self, phi, mu, log_var=None, mask=None):
        return self.grad_phi(mu, phi, None, mask)


class Poisson(Energy):
    """phi, mu hold log rates: E = sum e^phi (phi - mu) - e^phi + e^mu."""

    name = "poisson"
    target_is_state = False

    def terms(self, phi, mu, log_var=None, mask=None):
        return keep(mask, generalised_kl(torch.exp(phi), torch.exp(mu), phi - mu))

    def grad_phi(self, phi, mu, log_var=None, mask=None):
        return keep(mask, torch.exp(phi) * (phi - mu))

    def grad_mu(self, phi, mu, log_var=None, mask=None):
        return keep(mask, difference_from_ratio(torch.exp(phi), torch.exp(mu), phi - mu))

    def target_terms(self, target, mu, log_var, mask):
        return keep(mask, torch.where(target > 0, target * (torch.log(target) - mu - 1), 0.0) + torch.exp(mu))

    def target_grad_mu(self, target, mu, log_var, mask):
        return keep(mask, torch.exp(mu) - target)


_ENERGIES: list[Energy] = [
    Gaussian(),
    GaussianDiag(),
    GaussianFull(),
    Categorical(),
    CategoricalProbs(),
    Bernoulli(),
    Laplace(),
    Poisson(),
]
ENERGY_TABLE: dict[str, Energy] = {entry.name: entry for entry in _ENERGIES}
ENERGIES: tuple[str, ...] = tuple(ENERGY_TABLE)
