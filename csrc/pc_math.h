// SPDX-License-Identifier: MIT
// The mathematics in C++, once, for the CPU and for CUDA: activations and energy families with closed-form derivatives.
//
// The formulas are the README's section 2's in the forms of pc_kernels/pc_math.py, which keep relative accuracy near phi = mu.
// Everything is a template over the value type V: float, double, or a vector type for which Prim<V> is specialised
// (comparisons then yield a vector mask: branches are `select`, conditions are joined by `&`, constants are V(c)).
// No torch header here. Adding a family = one struct and one line in PC_ENERGIES.
#pragma once

#include "pc_numerics.h"

// The names, in pc_math.py's order: X(name, struct).
#define PC_ENERGIES(X)                                                                                               \
  X(gaussian, Gaussian)                                                                                              \
  X(gaussian_diag, GaussianDiag)                                                                                     \
  X(gaussian_full, GaussianFull)                                                                                     \
  X(categorical, Categorical)                                                                                        \
  X(categorical_probs, CategoricalProbs)                                                                             \
  X(bernoulli, Bernoulli)                                                                                            \
  X(laplace, Laplace)                                                                                                \
  X(poisson, Poisson)

#define PC_ACTIVATIONS(X)                                                                                            \
  X(identity, Identity)                                                                                              \
  X(tanh, Tanh)                                                                                                      \
  X(relu, Relu)                                                                                                      \
  X(leaky_relu, LeakyRelu)                                                                                           \
  X(gelu, Gelu)                                                                                                      \
  X(silu, Silu)                                                                                                      \
  X(sigmoid, Sigmoid)                                                                                                \
  X(hardtanh, Hardtanh)                                                                                              \
  X(softplus, Softplus)                                                                                              \
  X(softmax, Softmax)

namespace pc {

#define PC_ENTRY(name, type) name,
enum class Energy : int { PC_ENERGIES(PC_ENTRY) };
enum class Activation : int { PC_ACTIVATIONS(PC_ENTRY) };
#undef PC_ENTRY

// ---------------------------------------------------------------------------------------------------------------------
// activations: mu = value(a), vjp(a, mu, grad) = J^T grad

struct Identity {
  template <class V>
  PC_HD static V value(V a) { return a; }
  template <class V>
  PC_HD static V vjp(V, V, V grad) { return grad; }
};

struct Tanh {
  template <class V>
  PC_HD static V value(V a) { return tanh(a); }
  template <class V>
  PC_HD static V vjp(V, V mu, V grad) { return grad * (V(1) - mu * mu); }
};

struct Relu {
  template <class V>
  PC_HD static V value(V a) { return select(a < V(0), V(0), a); }
  template <class V>
  PC_HD static V vjp(V a, V, V grad) { return select(a > V(0), grad, V(0)); }
};

struct LeakyRelu {
  static constexpr double kSlope = 0.01;
  template <class V>
  PC_HD static V value(V a) { return select(a > V(0), a, V(kSlope) * a); }
  template <class V>
  PC_HD static V vjp(V a, V, V grad) { return select(a > V(0), grad, V(kSlope) * grad); }
};

struct Gelu {  // a Phi(a); derivative Phi(a) + a N(a), the normal distribution function and density
  template <class V>
  PC_HD static V cdf(V a) { return V(0.5) * erfc(a * V(-0.70710678118654752)); }
  template <class V>
  PC_HD static V value(V a) { return a * cdf(a); }
  template <class V>
  PC_HD static V vjp(V a, V, V grad) {
    return grad * (cdf(a) + a * V(0.3989422804014327) * exp(V(-0.5) * a * a));
  }
};

struct Silu {  // a s, s = sigmoid(a); derivative s (1 + a (1 - s))
  template <class V>
  PC_HD static V value(V a) { return a * sigmoid(a); }
  template <class V>
  PC_HD static V vjp(V a, V, V grad) { return grad * sigmoid(a) * (V(1) + a * sigmoid(-a)); }
};

struct Sigmoid {  // derivative e^-|a| t^2, t the larger of mu and 1 - mu: no division, and exact where mu is near 1
  template <class V>
  PC_HD static V value(V a) { return sigmoid(a); }
  template <class V>
  PC_HD static V vjp(V a, V mu, V grad) {
    const V likely = select(a > V(0), mu, V(1) - mu);
    return grad * (exp(-abs(a)) * likely * likely);
  }
};

struct Hardtanh {
  template <class V>
  PC_HD static V value(V a) { return select(a < V(-1), V(-1), select(a > V(1), V(1), a)); }
  template <class V>
  PC_HD static V vjp(V a, V, V grad) { return select(abs(a) < V(1), grad, V(0)); }
};

struct Softplus {
  template <class V>
  PC_HD static V value(V a) { return softplus(a); }
  template <class V>
  PC_HD static V vjp(V a, V, V grad) { return grad * sigmoid(a); }
};

struct Softmax {  // the entry's part; the row's is `softmax_row`, and dot = <mu, grad> over the row
  template <class V>
  PC_HD static V vjp(V mu, V grad, V dot) { return mu * (grad - dot); }
};

// The feed of a `gaussian_full` node: z = u + e^(s/2) n; to u: grad, to s: vjp_s.
struct Sample {
  template <class V>
  PC_HD static V value(V u, V s, V noise) { return u + exp(V(0.5) * s) * noise; }
  template <class V>
  PC_HD static V vjp_s(V s, V noise, V grad) { return V(0.5) * noise * exp(V(0.5) * s) * grad; }
};

// ---------------------------------------------------------------------------------------------------------------------
// energies: one entry's part of E, dE/dphi, dE/dmu; what is not in Want is left unset and costs nothing

constexpr double kProbabilityFloor = 1e-6;  // a free `categorical_probs` state stays above it; the only clamp there is

enum Want : int { kEnergy = 1, kGradPhi = 2, kGradMu = 4, kErrors = 7 };

template <class V>
struct Local {
  V energy, grad_phi, grad_mu;
};

// Families of single entries have free<Want>(phi, mu, log_var) and, where a clamped target is not of the form of phi
// (kOwnTarget), target<Want>(target, mu). log_var is read by `gaussian_diag` only.
struct Elementwise {
  static constexpr bool kOwnTarget = false, kLogVar = false;
};

struct Gaussian : Elementwise {  // E = 1/2 (phi - mu)^2
  template <int W, class V>
  PC_HD static Local<V> free(V phi, V mu, V) {
    Local<V> out{};
    const V d = phi - mu;
    if constexpr (W & kEnergy) out.energy = V(0.5) * d * d;
    if constexpr (W & kGradPhi) out.grad_phi = d;
    if constexpr (W & kGradMu) out.grad_mu = mu - phi;
    return out;
  }
};

struct GaussianDiag : Elementwise {  // E = 1/2 ((phi - mu)^2 e^-lv + lv), a cross-entropy
  static constexpr bool kLogVar = true;
  template <int W, class V>
  PC_HD static Local<V> free(V phi, V mu, V log_var) {
    return at_precision<W>(phi, mu, log_var, exp(-log_var));
  }
  template <int W, class V>
  PC_HD static Local<V> at_precision(V phi, V mu, V log_var, V precision) {
    Local<V> out{};
    const V d = phi - mu;
    if constexpr (W & kEnergy) out.energy = V(0.5) * (d * d * precision + log_var);
    if constexpr (W & kGradPhi) out.grad_phi = d * precision;
    if constexpr (W & kGradMu) out.grad_mu = (mu - phi) * precision;
    return out;
  }
  template <class V>
  PC_HD static V grad_log_var(V phi, V mu, V log_var) {
    return V(0.5) * (V(1) - (phi - mu) * (phi - mu) * exp(-log_var));
  }
};

template <class V>
struct LocalPair {
  V energy, grad_phi_u, grad_phi_s, grad_mu_u, grad_mu_s;
};

// phi = [u, s], mu = [uh, sh]: E = 1/2 (expm1(s-sh) - (s-sh) + (u-uh)^2 e^-sh). keep_u, keep_s: which terms take part.
struct GaussianFull {
  template <int W, class V, class C>
  PC_HD static LocalPair<V> free(V u, V s, V uh, V sh, C keep_u, C keep_s) {
    LocalPair<V> out{};
    const V d = u - uh, e1 = select(keep_s, expm1(s - sh), V(0)), scaled = select(keep_u, d * exp(-sh), V(0));
    const V squared = select(keep_u, scaled * d, V(0));
    if constexpr (W & kEnergy) {
      out.energy = V(0.5) * (select(keep_s, expm1_minus_x(s - sh, e1), V(0)) + squared);
    }
    if constexpr (W & kGradPhi) out.grad_phi_u = scaled, out.grad_phi_s = V(0.5) * e1;
    if constexpr (W & kGradMu) out.grad_mu_u = -scaled, out.grad_mu_s = V(-0.5) * (e1 + squared);
    return out;
  }
  template <int W, class V, class C>
  PC_HD static LocalPair<V> target(V data, V uh, V sh, C keep) {  // half the width: E = 1/2 (sh + (data-uh)^2 e^-sh)
    LocalPair<V> out{};
    const V d = data - uh, scaled = d * exp(-sh);
    if constexpr (W & kEnergy) out.energy = select(keep, V(0.5) * (sh + scaled * d), V(0));
    if constexpr (W & kGradMu) {
      out.grad_mu_u = select(keep, -scaled, V(0));
      out.grad_mu_s = select(keep, V(0.5) * (V(1) - scaled * d), V(0));
    }
    return out;
  }
};

// phi, mu hold logits, p = softmax(phi), q = softmax(mu): E = <p, ln p - ln q>. The row's part is `categorical_rows`.
struct Categorical {
  // With d = phi - mu - (lse(phi) - lse(mu)) as rounded, ln(p/q) = d - log1p(sum of change), also where p and q agree.
  template <class V>
  PC_HD static V change(V p, V q, V d) {
    return select(is_near(d), q * near_expm1(d), p - q);
  }
  template <int W, class V>
  PC_HD static Local<V> free(V p, V q, V log_ratio) {  // sum p = sum q: the energy's added -p + q cancels over the row
    Local<V> out{};
    if constexpr (W & kEnergy) out.energy = generalised_kl(p, q, log_ratio);
    if constexpr (W & kGradMu) out.grad_mu = difference_from_ratio(p, q, log_ratio);
    return out;
  }
  template <class V>
  PC_HD static V grad_phi(V p, V log_ratio, V row_energy) {
    return p * (log_ratio - row_energy);
  }
  template <int W, class V>
  PC_HD static Local<V> target(V o, V q, V log_q, V row_sum) {  // E = sum o ln(o/q), row_sum = sum o
    Local<V> out{};
    if constexpr (W & kEnergy) out.energy = select(o > V(0), o * (log(o) - log_q), V(0));
    if constexpr (W & kGradMu) out.grad_mu = q * row_sum - o;
    return out;
  }
};

struct CategoricalProbs : Elementwise {  // phi, mu hold probabilities: E = phi ln(phi/mu) - phi + mu
  template <int W, class V>
  PC_HD static Local<V> free(V phi, V mu, V) {
    Local<V> out{};
    const V relative = (phi - mu) / mu;
    const V log_ratio = select(is_near(relative), log1p(relative), log(phi) - log(mu));
    if constexpr (W & kEnergy) out.energy = generalised_kl(phi, mu, log_ratio);
    if constexpr (W & kGradPhi) out.grad_phi = log_ratio;
    if constexpr (W & kGradMu) out.grad_mu = (mu - phi) / mu;
    return out;
  }
  // dF/da for mu = softmax(a), without the 1 - phi/mu that overflows: row_sum = sum over the row of mu - phi
  template <class V>
  PC_HD static V softmax_delta(V phi, V mu, V row_sum) { return (mu - phi) - mu * row_sum; }
};

struct Bernoulli : Elementwise {  // phi, mu hold logits: E = sig(phi)(phi - mu) + softplus(mu) - softplus(phi)
  static constexpr bool kOwnTarget = true;
  template <class V>
  struct Outcomes {  // sigmoid(x), sigmoid(-x), softplus(x), softplus(-x) from one exponential
    V on, off, softplus, softplus_minus;
  };
  template <class V>
  PC_HD static Outcomes<V> outcomes(V x) {
    const V e = exp(-abs(x)), likely = V(1) / (V(1) + e), unlikely = e * likely, tail = log1p(e);
    const auto up = x > V(0);
    return {select(up, likely, unlikely), select(up, unlikely, likely), select(up, x, V(0)) + tail,
            select(up, V(0), -x) + tail};
  }
  template <int W, class V>
  PC_HD static Local<V> free(V phi, V mu, V) {
    Local<V> out{};
    const V d = phi - mu, e1 = near_expm1(d);
    const Outcomes<V> p = outcomes(phi), q = outcomes(mu);
    if constexpr (W & kEnergy) {  // the KL of both outcomes' probabilities, as generalised KLs whose -p + q cancel
      const V close = log1p(p.off * e1);  // ln(p.on / q.on) for small d; that of the other outcome is d less
      const V on = select(is_near(d), close, q.softplus_minus - p.softplus_minus);
      const V off = select(is_near(d), close - d, q.softplus - p.softplus);
      out.energy = generalised_kl(p.on, q.on, on) + generalised_kl(p.off, q.off, off);
    }
    if constexpr (W & kGradPhi) out.grad_phi = p.on * p.off * d;
    if constexpr (W & kGradMu) {  // q.on - p.on = p.off - q.off, from the smaller two
      out.grad_mu = select(is_near(d), -p.off * q.on * e1, select(mu > V(0), p.off - q.off, q.on - p.on));
    }
    return out;
  }
  template <int W, class V>
  PC_HD static Local<V> target(V o, V mu) {  // binary cross-entropy minus the target's entropy
    Local<V> out{};
    const Outcomes<V> q = outcomes(mu);
    if constexpr (W & kEnergy) {
      out.energy = o * q.softplus_minus + (V(1) - o) * q.softplus + x_log_x(o) + x_log_x(V(1) - o);
    }
    if constexpr (W & kGradMu) out.grad_mu = select(mu > V(0), (V(1) - o) - q.off, q.on - o);
    return out;
  }
};

struct Laplace : Elementwise {  // unit scale, d = |phi - mu|: E = d + e^-d - 1
  template <int W, class V>
  PC_HD static Local<V> free(V phi, V mu, V) {
    Local<V> out{};
    const V d = phi - mu, away = -abs(d), e1 = expm1(away);
    if constexpr (W & kEnergy) out.energy = expm1_minus_x(away, e1);
    if constexpr (W & kGradPhi) out.grad_phi = select(d > V(0), -e1, e1);
    if constexpr (W & kGradMu) out.grad_mu = select(d > V(0), e1, -e1);
    return out;
  }
};

struct Poisson : Elementwise {  // phi, mu hold log rates: E = e^phi (phi - mu) - e^phi + e^mu
  static constexpr bool kOwnTarget = true;
  template <int W, class V>
  PC_HD static Local<V> free(V phi, V mu, V) {
    Local<V> out{};
    const V d = phi - mu, p = exp(phi);
    if constexpr (W & kEnergy) out.energy = generalised_kl(p, exp(mu), d);
    if constexpr (W & kGradPhi) out.grad_phi = p * d;
    if constexpr (W & kGradMu) out.grad_mu = difference_from_ratio(p, exp(mu), d);
    return out;
  }
  template <int W, class V>
  PC_HD static Local<V> target(V count, V mu) {  // E = y ln y - y mu - y + e^mu
    Local<V> out{};
    if constexpr (W & kEnergy) out.energy = select(count > V(0), count * (log(count) - mu - V(1)), V(0)) + exp(mu);
    if constexpr (W & kGradMu) out.grad_mu = exp(mu) - count;
    return out;
  }
};

// p, q <- the two softmaxes of `rows` rows, log_ratio <- ln(p/q) (0 where masked), room for rows * n each.
template <class T>
PC_HD void categorical_rows(int rows, int64_t n, const T* phi, const T* mu, const uint8_t* mask, T* p, T* q, T* log_ratio) {
  SoftmaxRow<T> top[kRowsAtOnce], bottom[kRowsAtOnce];
  double changed[kRowsAtOnce];
  T correction[kRowsAtOnce];
  softmax_rows(rows, n, visible(rows * n, phi, mask, p), p, top);
  softmax_rows(rows, n, visible(rows * n, mu, mask, q), q, bottom);
  for (int r = 0; r < rows; ++r) {
    const T shift = top[r].max - bottom[r].max, offset = top[r].log_sum - bottom[r].log_sum;  // apart: a large shift rounds
    const T *phi_r = phi + r * n, *mu_r = mu + r * n;                                          // nothing
    T* ratio = log_ratio + r * n;
    each(n, [=](int64_t i) { ratio[i] = phi_r[i] - mu_r[i] - shift - offset; });
  }
  if (mask != nullptr) {
    PC_INDEPENDENT
    for (int64_t i = 0; i < rows * n; ++i) log_ratio[i] = pick(mask[i], log_ratio[i], T(0));
  }
  for (int r = 0; r < rows; ++r) {
    const T *p_r = p + r * n, *q_r = q + r * n, *ratio = log_ratio + r * n;
    changed[r] = row_sum<T>(n, [=](int64_t i) { return Categorical::change(p_r[i], q_r[i], ratio[i]); });
  }
  PC_INDEPENDENT
  for (int r = 0; r < rows; ++r) correction[r] = log1p(T(changed[r]));
  for (int r = 0; r < rows; ++r) {
    T *ratio = log_ratio + r * n, by = correction[r];
    each(n, [=](int64_t i) { ratio[i] -= by; });
  }
}

}  // namespace pc
