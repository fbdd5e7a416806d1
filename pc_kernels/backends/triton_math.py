# SPDX-License-Identifier: MIT
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportGeneralTypeIssues=false, reportIndexIssue=false
# (the type checker reads Triton's language as Python)
"""The mathematics in Triton, once: activations and energy families with closed-form derivatives, on float32 tiles.

The formulas are those of pc_math.py and csrc/pc_math.h, in forms that keep relative accuracy near phi = mu; a fixed
point is exactly zero. Nothing here loads or stores, and masks are the caller's: terms of single entries are computed
for all and selected afterwards (`tl.where(keep, energy, 0.0)`), so what stands in a masked entry never matters.

    activate(a, code, PRESENT) -> mu                            elementwise ones; softmax_row is the row's
    activation_vjp(a, mu, grad, code, PRESENT) -> J^T grad      likewise; softmax_vjp is the row's
    energy_free(phi, mu, log_var, code, PRESENT) -> energy, grad_phi, grad_mu           families of single entries
    energy_target(target, mu, code, PRESENT) -> energy, grad_mu                         HAS_OWN_TARGET; others: free
    gaussian_full_free(u, s, uh, sh, keep_u, keep_s) -> energy, grad_phi_u, grad_phi_s, grad_mu_u, grad_mu_s
    gaussian_full_target(data, uh, sh, keep) -> energy, grad_mu_u, grad_mu_s
    sample_feed(u, s, noise) -> z;  sample_vjp_s(s, noise, grad) -> to s (to u: grad itself)

Rows, tiles (ROWS, BLOCK) with a bool tile `visible` of what takes part (also False beyond the row's end):

    softmax_row(x, visible) -> p, max, log_sum (ROWS, 1);  softmax_vjp(p, grad)
    categorical_row(phi, mu, visible) -> p, q, log_ratio
    categorical_free(p, q, log_ratio) -> energy, grad_mu;  categorical_grad_phi(p, log_ratio, row_energy)
    categorical_target(target, mu, visible) -> energy, grad_mu
    categorical_index(index, mu, columns, visible) -> energy (one entry of a row holds it), grad_mu
    softmax_delta(phi, mu, visible) -> dF/da of `categorical_probs` over act = softmax

Rows wider than a tile, piece by piece: softmax_more, softmax_entries, categorical_gap, categorical_change and
categorical_target_entry.

`code` is the family's or activation's place in pc_math's tuple, a run-time scalar that is uniform in a program, so that
nodes of different families share a launch. PRESENT is a constexpr bit set, 1 << code of everything that occurs in the
launch (`present`): other branches are not compiled, and a set of one needs no test at run time.
"""

from __future__ import annotations

from collections.abc import Iterable

import triton
import triton.language as tl

from pc_kernels.backends.triton_numerics import (
    difference_from_ratio,
    exp,
    expm1,
    expm1_minus_x,
    generalised_kl,
    is_near,
    log,
    log1p,
    near_expm1,
    normal_cdf,
    round_to_bfloat16,
    sigmoid,
    softmax_entries,
    softmax_more,
    softmax_row,
    softmax_vjp,
    softplus,
    tanh,
    to_storage,
    x_log_x,
)
from pc_kernels.pc_math import ACTIVATIONS, ENERGIES, ENERGY_TABLE, LEAKY_SLOPE, PROBABILITY_FLOOR

__all__ = [
    "ACTIVATION_CODES", "ENERGY_CODES", "FLOOR", "HAS_OWN_TARGET", "ROW_ENERGIES", "SAMPLE_FEED", "activate",
    "activation_vjp", "categorical_change", "categorical_free", "categorical_gap", "categorical_grad_phi",
    "categorical_index", "categorical_row", "categorical_target", "categorical_target_entry", "energy_free",
    "energy_target", "gaussian_full_free", "gaussian_full_target", "present", "round_to_bfloat16", "sample_feed",
    "sample_vjp_s", "softmax_delta", "softmax_entries", "softmax_more", "softmax_row", "softmax_vjp", "to_storage",
]  # fmt: skip

ENERGY_CODES: dict[str, int] = {name: code for code, name in enumerate(ENERGIES)}
ACTIVATION_CODES: dict[str, int] = {name: code for code, name in enumerate(ACTIVATIONS)}
SAMPLE_FEED = -1  # the code of a `gaussian_full` node's feed, which is no activation
ROW_ENERGIES = ("gaussian_full", "categorical")  # their entries hang together along the last dimension
HAS_OWN_TARGET = tuple(n for n in ENERGIES if n not in ROW_ENERGIES and not ENERGY_TABLE[n].target_is_state)
FLOOR = tl.constexpr(PROBABILITY_FLOOR)

_GAUSSIAN_DIAG = tl.constexpr(ENERGY_CODES["gaussian_diag"])
_CATEGORICAL_PROBS = tl.constexpr(ENERGY_CODES["categorical_probs"])
_BERNOULLI = tl.constexpr(ENERGY_CODES["bernoulli"])
_LAPLACE = tl.constexpr(ENERGY_CODES["laplace"])
_POISSON = tl.constexpr(ENERGY_CODES["poisson"])
_TANH = tl.constexpr(ACTIVATION_CODES["tanh"])
_RELU = tl.constexpr(ACTIVATION_CODES["relu"])
_LEAKY_RELU = tl.constexpr(ACTIVATION_CODES["leaky_relu"])
_GELU = tl.constexpr(ACTIVATION_CODES["gelu"])
_SILU = tl.constexpr(ACTIVATION_CODES["silu"])
_SIGMOID = tl.constexpr(ACTIVATION_CODES["sigmoid"])
_HARDTANH = tl.constexpr(ACTIVATION_CODES["hardtanh"])
_SOFTPLUS = tl.constexpr(ACTIVATION_CODES["softplus"])
_GAUSSIAN_DIAG_BIT = tl.constexpr(1 << int(_GAUSSIAN_DIAG))
_CATEGORICAL_PROBS_BIT = tl.constexpr(1 << int(_CATEGORICAL_PROBS))
_BERNOULLI_BIT = tl.constexpr(1 << int(_BERNOULLI))
_LAPLACE_BIT = tl.constexpr(1 << int(_LAPLACE))
_POISSON_BIT = tl.constexpr(1 << int(_POISSON))
_TANH_BIT = tl.constexpr(1 << int(_TANH))
_RELU_BIT = tl.constexpr(1 << int(_RELU))
_LEAKY_RELU_BIT = tl.constexpr(1 << int(_LEAKY_RELU))
_GELU_BIT = tl.constexpr(1 << int(_GELU))
_SILU_BIT = tl.constexpr(1 << int(_SILU))
_SIGMOID_BIT = tl.constexpr(1 << int(_SIGMOID))
_HARDTANH_BIT = tl.constexpr(1 << int(_HARDTANH))
_SOFTPLUS_BIT = tl.constexpr(1 << int(_SOFTPLUS))
_SLOPE = tl.constexpr(LEAKY_SLOPE)


def present(codes: Iterable[int]) -> int:
    """The bit set PRESENT of some codes; SAMPLE_FEED has no bit."""
    bits = 0
    for code in codes:
        bits |= 1 << code if code >= 0 else 0
    return bits


# ---------------------------------------------------------------------------------------------------------------------
# activations: mu = f(a). In `BIT & PRESENT and (BIT == PRESENT or code == c)` all but the last is constexpr: what is
# not there is not compiled, what is alone is not tested for. (The interpreter knows `constexpr & int`, not `int &`.)


@triton.jit
def activate(a, code, PRESENT: tl.constexpr):
    """mu = f(a)."""
    mu = a
    if _TANH_BIT & PRESENT and (_TANH_BIT == PRESENT or code == _TANH):
        mu = tanh(a)
    if _RELU_BIT & PRESENT and (_RELU_BIT == PRESENT or code == _RELU):
        mu = tl.where(a < 0.0, 0.0, a)
    if _LEAKY_RELU_BIT & PRESENT and (_LEAKY_RELU_BIT == PRESENT or code == _LEAKY_RELU):
        mu = tl.where(a > 0.0, a, _SLOPE * a)
    if _GELU_BIT & PRESENT and (_GELU_BIT == PRESENT or code == _GELU):
        mu = a * normal_cdf(a)[0]
    if _SILU_BIT & PRESENT and (_SILU_BIT == PRESENT or code == _SILU):
        mu = a * sigmoid(a)
    if _SIGMOID_BIT & PRESENT and (_SIGMOID_BIT == PRESENT or code == _SIGMOID):
        mu = sigmoid(a)
    if _HARDTANH_BIT & PRESENT and (_HARDTANH_BIT == PRESENT or code == _HARDTANH):
        mu = tl.where(a < -1.0, -1.0, tl.where(a > 1.0, 1.0, a))
    if _SOFTPLUS_BIT & PRESENT and (_SOFTPLUS_BIT == PRESENT or code == _SOFTPLUS):
        mu = softplus(a)
    return mu


@triton.jit
def _gelu_slope(a):
    """Phi(a) + a N(a), the normal distribution function and density."""
    cdf, bell = normal_cdf(a)
    return cdf + a * 0.3989422804014327 * bell


@triton.jit
def activation_vjp(a, mu, grad, code, PRESENT: tl.constexpr):
    """f'(a) grad, mu = f(a)."""
    out = grad
    if _TANH_BIT & PRESENT and (_TANH_BIT == PRESENT or code == _TANH):
        out = grad * (1.0 - mu * mu)
    if _RELU_BIT & PRESENT and (_RELU_BIT == PRESENT or code == _RELU):
        out = tl.where(a > 0.0, grad, 0.0)
    if _LEAKY_RELU_BIT & PRESENT and (_LEAKY_RELU_BIT == PRESENT or code == _LEAKY_RELU):
        out = tl.where(a > 0.0, grad, _SLOPE * grad)
    if _GELU_BIT & PRESENT and (_GELU_BIT == PRESENT or code == _GELU):
        out = grad * _gelu_slope(a)
    if _SILU_BIT & PRESENT and (_SILU_BIT == PRESENT or code == _SILU):
        out = grad * sigmoid(a) * (1.0 + a * sigmoid(-a))
    if _SIGMOID_BIT & PRESENT and (_SIGMOID_BIT == PRESENT or code == _SIGMOID):
        out = grad * mu * sigmoid(-a)
    if _HARDTANH_BIT & PRESENT and (_HARDTANH_BIT == PRESENT or code == _HARDTANH):
        out = tl.where(tl.abs(a) < 1.0, grad, 0.0)
    if _SOFTPLUS_BIT & PRESENT and (_SOFTPLUS_BIT == PRESENT or code == _SOFTPLUS):
        out = grad * sigmoid(a)
    return out


@triton.jit
def sample_feed(u, s, noise):
    """z = u + e^(s/2) n."""
    return u + exp(0.5 * s) * noise


@triton.jit
def sample_vjp_s(s, noise, grad):
    """1/2 n e^(s/2) grad, the sample's gradient to s."""
    return 0.5 * noise * exp(0.5 * s) * grad


# ---------------------------------------------------------------------------------------------------------------------
# energies of single entries


@triton.jit
def _gaussian_diag(phi, mu, log_var):
    """E = 1/2 ((phi - mu)^2 e^-lv + lv), a cross-entropy."""
    d = phi - mu
    precision = exp(-log_var)
    return 0.5 * (d * d * precision + log_var), d * precision, (mu - phi) * precision


@triton.jit
def _categorical_probs(phi, mu):
    """phi, mu hold probabilities: E = phi ln(phi/mu) - phi + mu."""
    relative = (phi - mu) / mu
    log_ratio = tl.where(is_near(relative), log1p(relative), log(phi) - log(mu))
    return generalised_kl(phi, mu, log_ratio), log_ratio, (mu - phi) / mu


@triton.jit
def _outcomes(x):
    """sigmoid(x), sigmoid(-x), softplus(x), softplus(-x) from one exponential."""
    e = exp(-tl.abs(x))
    likely = 1.0 / (1.0 + e)
    unlikely = e * likely
    tail = log1p(e)
    up = x > 0.0
    return (
        tl.where(up, likely, unlikely),
        tl.where(up, unlikely, likely),
        tl.where(up, x, 0.0) + tail,
        tl.where(up, 0.0, -x) + tail,
    )


@triton.jit
def _bernoulli(phi, mu):
    """phi, mu hold logits: the KL of both outcomes' probabilities, as generalised KLs whose -p + q cancel."""
    d = phi - mu
    e1 = near_expm1(d)
    p_on, p_off, p_plus, p_minus = _outcomes(phi)
    q_on, q_off, q_plus, q_minus = _outcomes(mu)
    close = log1p(p_off * e1)  # ln(p_on / q_on) for small d; that of the other outcome is d less
    on = tl.where(is_near(d), close, q_minus - p_minus)
    off = tl.where(is_near(d), close - d, q_plus - p_plus)
    energy = generalised_kl(p_on, q_on, on) + generalised_kl(p_off, q_off, off)
    far = tl.where(mu > 0.0, p_off - q_off, q_on - p_on)  # the same, from the smaller two
    return energy, p_on * p_off * d, tl.where(is_near(d), -p_off * q_on * e1, far)


@triton.jit
def _bernoulli_target(o, mu):
    """The binary cross-entropy minus the target's entropy."""
    q_on, q_off, q_plus, q_minus = _outcomes(mu)
    grad_mu = tl.where(mu > 0.0, (1.0 - o) - q_off, q_on - o)
    return o * q_minus + (1.0 - o) * q_plus + x_log_x(o) + x_log_x(1.0 - o), grad_mu


@triton.jit
def _laplace(phi, mu):
    """Unit scale, d = |phi - mu|: E = d + e^-d - 1."""
    d = phi - mu
    e1 = expm1(-tl.abs(d))
    return expm1_minus_x(-tl.abs(d), e1), tl.where(d > 0.0, -e1, e1), tl.where(d > 0.0, e1, -e1)


@triton.jit
def _poisson(phi, mu):
    """phi, mu hold log rates: E = e^phi (phi - mu) - e^phi + e^mu."""
    d = phi - mu
    p = exp(phi)
    q = exp(mu)
    return generalised_kl(p, q, d), p * d, difference_from_ratio(p, q, d)


@triton.jit
def _poisson_target(count, mu):
    """E = y ln y - y mu - y + e^mu."""
    rate = exp(mu)
    return tl.where(count > 0.0, count * (log(count) - mu - 1.0), 0.0) + rate, rate - count


@triton.jit
def energy_free(phi, mu, log_var, code, PRESENT: tl.constexpr):
    """One entry's energy, dE/dphi and dE/dmu of the families of single entries; a clamped target of the state's form
    too.

    log_var: a tile like phi, read for `gaussian_diag` only (pass phi where there is none).
    """
    grad_phi = phi - mu
    energy = 0.5 * grad_phi * grad_phi
    grad_mu = mu - phi
    if _GAUSSIAN_DIAG_BIT & PRESENT and (_GAUSSIAN_DIAG_BIT == PRESENT or code == _GAUSSIAN_DIAG):
        energy, grad_phi, grad_mu = _gaussian_diag(phi, mu, log_var)
    if _CATEGORICAL_PROBS_BIT & PRESENT and (_CATEGORICAL_PROBS_BIT == PRESENT or code == _CATEGORICAL_PROBS):
        energy, grad_phi, grad_mu = _categorical_probs(phi, mu)
    if _BERNOULLI_BIT & PRESENT and (_BERNOULLI_BIT == PRESENT or code == _BERNOULLI):
        energy, grad_phi, grad_mu = _bernoulli(phi, mu)
    if _LAPLACE_BIT & PRESENT and (_LAPLACE_BIT == PRESENT or code == _LAPLACE):
        energy, grad_phi, grad_mu = _laplace(phi, mu)
    if _POISSON_BIT & PRESENT and (_POISSON_BIT == PRESENT or code == _POISSON):
        energy, grad_phi, grad_mu = _poisson(phi, mu)
    return energy, grad_phi, grad_mu


@triton.jit
def energy_target(target, mu, code, PRESENT: tl.constexpr):
    """One entry's energy and dE/dmu of a clamped target that is not of the state's form (HAS_OWN_TARGET)."""
    energy = target
    grad_mu = target
    if _BERNOULLI_BIT & PRESENT and (_BERNOULLI_BIT == PRESENT or code == _BERNOULLI):
        energy, grad_mu = _bernoulli_target(target, mu)
    if _POISSON_BIT & PRESENT and (_POISSON_BIT == PRESENT or code == _POISSON):
        energy, grad_mu = _poisson_target(target, mu)
    return energy, grad_mu


# ---------------------------------------------------------------------------------------------------------------------
# gaussian_full: phi = [u, s], mu = [uh, sh]: E = 1/2 (expm1(s-sh) - (s-sh) + (u-uh)^2 e^-sh)


@triton.jit
def gaussian_full_free(u, s, uh, sh, keep_u, keep_s):
    """energy, dE/du, dE/ds, dE/duh, dE/dsh; keep_u, keep_s: which of the two terms take part."""
    d = u - uh
    e1 = tl.where(keep_s, expm1(s - sh), 0.0)
    scaled = tl.where(keep_u, d * exp(-sh), 0.0)
    squared = tl.where(keep_u, scaled * d, 0.0)
    energy = 0.5 * (tl.where(keep_s, expm1_minus_x(s - sh, e1), 0.0) + squared)
    return energy, scaled, 0.5 * e1, -scaled, -0.5 * (e1 + squared)


@triton.jit
def gaussian_full_target(data, uh, sh, keep):
    """energy, dE/duh, dE/dsh of clamped data, half the width: E = 1/2 (sh + (data-uh)^2 e^-sh)."""
    d = data - uh
    scaled = d * exp(-sh)
    energy = tl.where(keep, 0.5 * (sh + scaled * d), 0.0)
    return energy, tl.where(keep, -scaled, 0.0), tl.where(keep, 0.5 * (1.0 - scaled * d), 0.0)


# ---------------------------------------------------------------------------------------------------------------------
# categorical rows: phi, mu hold logits, p = softmax(phi), q = softmax(mu): E = <p, ln p - ln q>


@triton.jit
def categorical_gap(phi, mu, visible, shift, offset):
    """d = phi - mu - (lse(phi) - lse(mu)) as rounded; shift and offset: the differences of the two rows' maxima and of
    the logarithms of their sums, apart, so that a large shift of phi rounds nothing."""
    return tl.where(visible, phi - mu - shift - offset, 0.0)


@triton.jit
def categorical_change(p, q, d):
    """q (e^d - 1) of an entry: ln(p/q) = d - log1p(its sum over the row), accurate also where p and q nearly agree."""
    return tl.where(is_near(d), q * near_expm1(d), p - q)


@triton.jit
def categorical_row(phi, mu, visible):
    """p, q and ln(p/q), 0 at phi = mu; zeros where not visible."""
    p, most_p, log_sum_p = softmax_row(phi, visible)
    q, most_q, log_sum_q = softmax_row(mu, visible)
    d = categorical_gap(phi, mu, visible, most_p - most_q, log_sum_p - log_sum_q)
    correction = log1p(tl.sum(categorical_change(p, q, d), axis=1, keep_dims=True))
    return p, q, tl.where(visible, d - correction, 0.0)


@triton.jit
def categorical_free(p, q, log_ratio):
    """An entry's part of the energy, and dE/dmu = q - p. sum p = sum q: the added -p + q cancels over the row."""
    return generalised_kl(p, q, log_ratio), difference_from_ratio(p, q, log_ratio)


@triton.jit
def categorical_grad_phi(p, log_ratio, row_energy):
    """dE/dphi = p (ln(p/q) - E), E = row_energy (ROWS, 1)."""
    return p * (log_ratio - row_energy)


@triton.jit
def categorical_target_entry(o, q, log_q, row_sum):
    """o ln(o/q) and dE/dmu = q sum(o) - o of a target o of probabilities, row_sum = sum(o)."""
    return tl.where(o > 0.0, o * (log(o) - log_q), 0.0), q * row_sum - o


@triton.jit
def categorical_target(target, mu, visible):
    """Energy and dE/dmu of a target of probabilities."""
    q, most, log_sum = softmax_row(mu, visible)
    o = tl.where(visible, target, 0.0)
    return categorical_target_entry(o, q, (mu - most) - log_sum, tl.sum(o, axis=1, keep_dims=True))


@triton.jit
def categorical_index(index, mu, columns, visible):
    """E = -ln q_k and dE/dmu = q - onehot(k) of a target of class indices k = index (ROWS, 1).

    columns (1, BLOCK): the entries' places in the row. Where the mask hides class k, nothing is left to predict: zeros.
    """
    q, most, log_sum = softmax_row(mu, visible)
    hit = (columns == index) & visible
    there = tl.max(hit.to(tl.int32), axis=1, keep_dims=True) > 0
    energy = tl.where(hit, -((mu - most) - log_sum), 0.0)
    return energy, tl.where(there, tl.where(hit, q - 1.0, q), 0.0)


@triton.jit
def softmax_delta(phi, mu, visible):
    """dF/da = mu sum(phi) - phi of `categorical_probs` with mu = softmax(a), without the 1 - phi/mu that overflows."""
    weighted = tl.where(visible, mu - phi, 0.0)
    return weighted - mu * tl.sum(weighted, axis=1, keep_dims=True)
