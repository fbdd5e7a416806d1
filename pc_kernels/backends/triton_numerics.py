# SPDX-License-Identifier: MIT
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportGeneralTypeIssues=false, reportIndexIssue=false
# (the type checker reads Triton's language as Python)
"""What the formulas of triton_math.py are made of: exponentials and their differences that do not cancel, softmax over
a row. The Triton counterpart of pc_kernels/numerics.py and of csrc/pc_numerics.h.

Everything takes and gives float32 tiles. Made of sums, products and the bits of a number alone (no library of the
device, no hardware exponential), so that an interpreted, a CUDA and a HIP kernel get the same numbers; exp, expm1, log
and log1p are within 2 ulp, tanh within 3.
"""

from __future__ import annotations

import triton
import triton.language as tl

LN2_HIGH = tl.constexpr(0.693145751953125)  # few bits: n * LN2_HIGH is exact
LN2_LOW = tl.constexpr(1.42860682e-6)
ONE_MINUS_SQRT_HALF = tl.constexpr(0x3F800000 - 0x3F3504F3)  # difference of the two numbers' bits
SQRT_HALF = tl.constexpr(0x3F3504F3)
MANTISSA = tl.constexpr(0x7FFFFF)
SERIES_RADIUS = tl.constexpr(0.5)


@triton.jit
def _bits(x):
    return x.to(tl.int32, bitcast=True)


@triton.jit
def _power_of_two(n):
    return ((n + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def exp_series(x):
    """sum of x^k / (k+2)!, so that e^x = 1 + x + x^2 exp_series(x); exact to rounding for |x| <= 1/2."""
    high = 1.0 / 720 + x * (1.0 / 5040 + x * (1.0 / 40320 + x * (1.0 / 362880)))
    return 0.5 + x * (1.0 / 6 + x * (1.0 / 24 + x * (1.0 / 120 + x * high)))


@triton.jit
def _reduce(x):
    """n and e^r - 1 of x = n ln 2 + r, |r| <= ln 2 / 2."""
    shifted = x * 1.44269504 + 12582912.0  # 1.5 * 2^23: adding it rounds to a whole number, found in the low bits
    n = shifted - 12582912.0
    r = (x - n * LN2_HIGH) - n * LN2_LOW
    return _bits(shifted) - 0x4B400000, r + r * r * exp_series(r)


@triton.jit
def exp(x):
    """e^x."""
    x = tl.where(x < -104.0, -104.0, x)  # e^-104 rounds to 0; NaN passes
    x = tl.where(x > 89.0, 89.0, x)  # e^89 is infinite
    n, tail = _reduce(x)
    half = n >> 1  # two factors: the result may be subnormal, or infinite
    return (1.0 + tail) * _power_of_two(half) * _power_of_two(n - half)


@triton.jit
def expm1(x):
    """e^x - 1."""
    x = tl.where(x < -60.0, -60.0, x)
    x = tl.where(x > 89.0, 89.0, x)
    n, tail = _reduce(x)
    half = _power_of_two(n - 1)
    return 2.0 * (half * tail + (half - 0.5))


@triton.jit
def _log_of(u, c, scaled, near, f_near):
    """ln of u in (0, inf), plus the relative correction c of u; where `near`, ln(1 + f_near), |f_near| < 0.42."""
    word = _bits(u) + ONE_MINUS_SQRT_HALF
    f_far = ((word & MANTISSA) + SQRT_HALF).to(tl.float32, bitcast=True) - 1.0
    k = tl.where(near, 0.0, ((word >> 23) - 127 - scaled).to(tl.float32))
    f = tl.where(near, f_near, f_far)
    correction = tl.where(near, 0.0, c)
    s = f / (2.0 + f)
    z = s * s  # ln(1 + f) = 2 artanh(s) = f - s (f - 2 z (1/3 + z/5 + ...))
    r = z * (0.66666667 + z * (0.4 + z * (0.28571429 + z * 0.22222222)))
    return k * LN2_HIGH + (f - (s * (f - r) - (k * LN2_LOW + correction)))


@triton.jit
def _log_edges(y, x):
    """The logarithm y of x, mended where x is infinite, 0, negative or NaN."""
    y = tl.where(x < float("inf"), y, x)
    return tl.where(x > 0.0, y, tl.where(x == 0.0, float("-inf"), float("nan")))


@triton.jit
def log(x):
    """ln x; -inf at 0, NaN below."""
    tiny = x < 1.1754944e-38
    u = tl.where(tiny, x * 33554432.0, x)
    return _log_edges(_log_of(u, 0.0, tl.where(tiny, 25, 0), x != x, x), x)


@triton.jit
def log1p(x):
    """ln(1 + x)."""
    u = 1.0 + x
    lost = tl.where(x > 1.0, 1.0 - (u - x), x - (u - 1.0)) / u
    return _log_edges(_log_of(u, lost, 0, tl.abs(x - 0.06) < 0.35, x), u)


@triton.jit
def tanh(x):
    """tanh x."""
    size = tl.abs(x)
    t = expm1(tl.where(size > 10.0, 20.0, 2.0 * size))
    y = t / (t + 2.0)
    return tl.where(x < 0.0, -y, y)


@triton.jit
def sigmoid(x):
    """1 / (1 + e^-x)."""
    return 1.0 / (1.0 + exp(-x))


@triton.jit
def softplus(x):
    """ln(1 + e^x), exact for every x."""
    return tl.where(x < 0.0, 0.0, x) + log1p(exp(-tl.abs(x)))


@triton.jit
def normal_cdf(a):
    """Phi(a) of the standard normal distribution, relatively accurate in the lower tail too, and e^(-a^2/2).

    Phi(-x) = e^(-x^2/2) t P(t - 1/2), t = 1 / (1 + 0.3 x), P a polynomial fitted to 1e-7.
    """
    x = tl.abs(a)
    x = tl.where(x > 15.0, 15.0, x)  # Phi(-15) rounds to 0
    head = (_bits(x) & -4096).to(tl.float32, bitcast=True)  # head^2 is exact, as the argument of a tail's exp must be
    bell = exp(-0.5 * head * head) * exp(-0.5 * (x - head) * (x + head))
    t = 1.0 / (1.0 + 0.3 * x)
    w = t - 0.5
    high = 0.034077365 + w * (0.0235543381 + w * (-0.0150044756 - w * 0.0110622793))
    middle = 0.0290911011 + w * (-0.0773461834 + w * (-0.0370032378 + w * high))
    tail = bell * t * (0.221970618 + w * (0.329159081 + w * (0.346197993 + w * (0.222074106 + w * middle))))
    return tl.where(a < 0.0, tail, tl.where(a == a, 1.0 - tail, a)), bell


# ---------------------------------------------------------------------------------------------------------------------
# differences of exponentials that do not cancel


@triton.jit
def is_near(x):
    """Where the series is taken."""
    return tl.abs(x) < SERIES_RADIUS


@triton.jit
def near_expm1_minus_x(x):
    """e^x - 1 - x for |x| < SERIES_RADIUS."""
    return x * x * exp_series(x)


@triton.jit
def near_expm1(x):
    """e^x - 1 for |x| < SERIES_RADIUS."""
    return x + near_expm1_minus_x(x)


@triton.jit
def expm1_minus_x(x, e1):
    """e^x - 1 - x for every x, given e1 = e^x - 1."""
    return tl.where(is_near(x), near_expm1_minus_x(x), e1 - x)


@triton.jit
def generalised_kl(p, q, log_ratio):
    """p ln(p/q) - p + q >= 0, given ln(p/q); q where p = 0."""
    far = tl.where(p > 0.0, p * log_ratio, 0.0) - p + q
    return tl.where(is_near(log_ratio), p * near_expm1_minus_x(-log_ratio), far)


@triton.jit
def difference_from_ratio(p, q, log_ratio):
    """q - p, given ln(p/q)."""
    return tl.where(is_near(log_ratio), p * near_expm1(-log_ratio), q - p)


@triton.jit
def x_log_x(x):
    """x ln x, 0 at x = 0."""
    return tl.where(x > 0.0, x * log(x), 0.0)


# ---------------------------------------------------------------------------------------------------------------------
# bfloat16


@triton.jit
def round_to_bfloat16(x):
    """x rounded to the nearest bfloat16, ties to even, still as float32: `.to(tl.bfloat16)` is then exact, also where
    (in the interpreter) it cuts the low bits off."""
    word = _bits(x)
    rounded = (word + 0x7FFF + ((word >> 16) & 1)) & -65536
    return tl.where(x == x, rounded.to(tl.float32, bitcast=True), x)


@triton.jit
def to_storage(x, BFLOAT16: tl.constexpr):
    """float32 as it is to be stored in memory of float32, or of bfloat16: rounded to the nearest."""
    return round_to_bfloat16(x) if BFLOAT16 else x


# ---------------------------------------------------------------------------------------------------------------------
# rows: tiles (ROWS, BLOCK), a row along the last dimension; entries that take no part are not `visible`


@triton.jit
def softmax_more(x, visible, most, total):
    """Maximum and sum of e^(x - max), (ROWS, 1), of a row so far and of these entries; begin with -inf and 0."""
    x = tl.where(visible, x, float("-inf"))
    found = tl.max(x, axis=1, keep_dims=True)
    most_now = tl.where(found > most, found, most)
    pivot = tl.where(most_now == float("-inf"), 0.0, most_now)  # nothing visible yet
    return most_now, total * exp(most - pivot) + tl.sum(exp(x - pivot), axis=1, keep_dims=True)


@triton.jit
def softmax_entries(x, visible, most, total):
    """e^(x - max) / sum, exact zeros where not visible, given the row's maximum and sum."""
    return exp(tl.where(visible, x, float("-inf")) - most) * (1.0 / total)


@triton.jit
def softmax_row(x, visible):
    """p = softmax(x) with exact zeros where not visible, the row's maximum and ln sum e^(x - max), both (ROWS, 1).

    The logarithm of p is (x - max) - log_sum. A row without a visible entry gives NaN.
    """
    x = tl.where(visible, x, float("-inf"))
    most = tl.max(x, axis=1, keep_dims=True)
    exponentials = exp(x - most)
    total = tl.sum(exponentials, axis=1, keep_dims=True)
    return exponentials * (1.0 / total), most, log(total)


@triton.jit
def softmax_vjp(p, grad):
    """J^T grad of p = softmax(x): p (grad - <p, grad>)."""
    return p * (grad - tl.sum(p * grad, axis=1, keep_dims=True))
