// SPDX-License-Identifier: MIT
#include "chain_kernels.h"

#include <cstring>
#include <type_traits>

#include "clones.h"

namespace pc {
namespace {

template <class F, class T>
PC_HD void activate_row(int64_t n, const T* bias, T* a, T* mu) {
  if (bias != nullptr) {
    PC_INDEPENDENT
    for (int64_t i = 0; i < n; ++i) a[i] += bias[i];
  }
  if constexpr (std::is_same_v<F, Softmax>) {
    softmax_row(n, a, mu);
  } else if (!std::is_same_v<F, Identity> || mu != a) {
    PC_INDEPENDENT
    for (int64_t i = 0; i < n; ++i) mu[i] = F::value(a[i]);
  }
}

template <class F, class T>
PC_HD void vjp_row(int64_t n, const T* a, const T* mu, T* grad) {
  if constexpr (std::is_same_v<F, Softmax>) {
    const T dot = static_cast<T>(row_sum<T>(n, [=](int64_t i) { return mu[i] * grad[i]; }));
    PC_INDEPENDENT
    for (int64_t i = 0; i < n; ++i) grad[i] = Softmax::vjp(mu[i], grad[i], dot);
  } else if constexpr (!std::is_same_v<F, Identity>) {
    PC_INDEPENDENT
    for (int64_t i = 0; i < n; ++i) grad[i] = F::vjp(a[i], mu[i], grad[i]);
  }
}

template <class T>
PC_HD void sample_row(int64_t half, const T* phi, const T* noise, T* v) {
  PC_INDEPENDENT
  for (int64_t i = 0; i < half; ++i) v[i] = Sample::value(phi[i], phi[half + i], noise[i]);
}

template <class T>
PC_HD void sample_vjp_row(int64_t half, const T* phi, const T* noise, T* g) {
  PC_INDEPENDENT
  for (int64_t i = 0; i < half; ++i) g[half + i] = Sample::vjp_s(phi[half + i], noise[i], g[i]);
}

template <class T>
PC_HD void softmax_delta_row(int64_t n, const T* phi, const T* mu, const uint8_t* mask, T* delta) {
  const T sum = static_cast<T>(row_sum<T>(n, [=](int64_t i) {
    return delta[i] = mask ? pick(mask[i], mu[i] - phi[i], T(0)) : mu[i] - phi[i];
  }));
  PC_INDEPENDENT
  for (int64_t i = 0; i < n; ++i) delta[i] -= mu[i] * sum;
}

template <class T>
PC_HD double norm_row(bool fisher_softmax, bool fisher_sigmoid, int64_t n, const T* phi, const uint8_t* mask,
                      const uint8_t* moves, const T* g, T* p) {
  T dot = 0;
  if (fisher_softmax) {
    softmax_row(n, visible(n, phi, mask, p), p);
    dot = static_cast<T>(row_sum<T>(n, [=](int64_t i) { return p[i] * g[i]; }));
  }
  return row_sum<T>(n, [=](int64_t i) {
    T x = g[i];
    if (fisher_softmax) x = p[i] * (x - dot);
    if (fisher_sigmoid) x = sigmoid(phi[i]) * sigmoid(-phi[i]) * x;
    if (moves != nullptr) x = pick(moves[i], x, T(0));
    return x * x;
  });
}

}  // namespace

// One function per activation and type, compiled for several instruction sets; their names must be symbols.
namespace kernel {
#define PC_KERNEL(name, type)                                                                                        \
  PC_CLONES static void value_##name(int64_t n, const float* bias, float* a, float* mu) {                           \
    activate_row<type>(n, bias, a, mu);                                                                              \
  }                                                                                                                  \
  static void value_##name(int64_t n, const double* bias, double* a, double* mu) { activate_row<type>(n, bias, a, mu); } \
  PC_CLONES static void vjp_##name(int64_t n, const float* a, const float* mu, float* grad) {                       \
    vjp_row<type>(n, a, mu, grad);                                                                                   \
  }                                                                                                                  \
  static void vjp_##name(int64_t n, const double* a, const double* mu, double* grad) { vjp_row<type>(n, a, mu, grad); }
PC_ACTIVATIONS(PC_KERNEL)
#undef PC_KERNEL

PC_CLONES static void sample(int64_t half, const float* phi, const float* noise, float* v) { sample_row(half, phi, noise, v); }
static void sample(int64_t half, const double* phi, const double* noise, double* v) { sample_row(half, phi, noise, v); }
PC_CLONES static void sample_vjp(int64_t half, const float* phi, const float* noise, float* g) {
  sample_vjp_row(half, phi, noise, g);
}
static void sample_vjp(int64_t half, const double* phi, const double* noise, double* g) { sample_vjp_row(half, phi, noise, g); }
PC_CLONES static void probs_delta(int64_t n, const float* phi, const float* mu, const uint8_t* mask, float* delta) {
  softmax_delta_row(n, phi, mu, mask, delta);
}
static void probs_delta(int64_t n, const double* phi, const double* mu, const uint8_t* mask, double* delta) {
  softmax_delta_row(n, phi, mu, mask, delta);
}
PC_CLONES static void masked_softmax(int64_t n, const float* x, const uint8_t* mask, float* p) {
  softmax_row(n, visible(n, x, mask, p), p);
}
static void masked_softmax(int64_t n, const double* x, const uint8_t* mask, double* p) {
  softmax_row(n, visible(n, x, mask, p), p);
}

// to nearest, ties to even
PC_HD uint16_t bfloat16_bits(float x) {
  uint32_t u;
  std::memcpy(&u, &x, sizeof u);
  return static_cast<uint16_t>((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
}
PC_CLONES static void round_row(int64_t n, const float* x, uint16_t* out) {
  PC_INDEPENDENT
  for (int64_t i = 0; i < n; ++i) out[i] = bfloat16_bits(x[i]);
}
PC_CLONES static void difference_row(int64_t n, const float* v, float* last, uint16_t* out) {
  PC_INDEPENDENT
  for (int64_t i = 0; i < n; ++i) {
    out[i] = bfloat16_bits(v[i] - last[i]);
    last[i] = v[i];
  }
}
}  // namespace kernel

template <class T>
void activate(Activation activation, int64_t n, const T* bias, T* a, T* mu) {
  using Kernel = void (*)(int64_t, const T*, T*, T*);
#define PC_ENTRY(name, type) kernel::value_##name,
  static constexpr Kernel table[] = {PC_ACTIVATIONS(PC_ENTRY)};
#undef PC_ENTRY
  table[static_cast<int>(activation)](n, bias, a, mu);
}

template <class T>
void activation_vjp(Activation activation, int64_t n, const T* a, const T* mu, T* grad) {
  using Kernel = void (*)(int64_t, const T*, const T*, T*);
#define PC_ENTRY(name, type) kernel::vjp_##name,
  static constexpr Kernel table[] = {PC_ACTIVATIONS(PC_ENTRY)};
#undef PC_ENTRY
  table[static_cast<int>(activation)](n, a, mu, grad);
}

template <class T>
void feed_value(int feed, int64_t n, const T* phi, const uint8_t* mask, const T* noise, T* v) {
  if (feed == kSampleFeed) {
    kernel::sample(n / 2, phi, noise, v);
  } else if (static_cast<Activation>(feed) == Activation::softmax) {
    kernel::masked_softmax(n, phi, mask, v);
  } else {
    activate<T>(static_cast<Activation>(feed), n, nullptr, const_cast<T*>(phi), v);  // without a bias phi is only read
  }
}

template <class T>
void feed_vjp(int feed, int64_t n, const T* phi, const T* v, const T* noise, T* g) {
  if (feed == kSampleFeed) {
    kernel::sample_vjp(n / 2, phi, noise, g);
  } else {
    activation_vjp(static_cast<Activation>(feed), n, phi, v, g);
  }
}

template <class T>
void softmax_delta(int64_t n, const T* phi, const T* mu, const uint8_t* mask, T* delta) {
  kernel::probs_delta(n, phi, mu, mask, delta);
}

template <class T>
double squared_norm(Energy energy, bool natural, int64_t n, const T* phi, const uint8_t* mask, const uint8_t* moves, const T* g,
                    T* room) {
  const bool softmax = natural && energy == Energy::categorical, sigmoid = natural && energy == Energy::bernoulli;
  return norm_row(softmax, sigmoid, n, phi, mask, moves, g, room);
}

void to_bfloat16(int64_t n, const float* x, uint16_t* out) { kernel::round_row(n, x, out); }

void difference_to_bfloat16(int64_t n, const float* v, float* last, uint16_t* out) { kernel::difference_row(n, v, last, out); }

#define PC_INSTANCE(T)                                                                                                \
  template void activate<T>(Activation, int64_t, const T*, T*, T*);                                                   \
  template void activation_vjp<T>(Activation, int64_t, const T*, const T*, T*);                                       \
  template void feed_value<T>(int, int64_t, const T*, const uint8_t*, const T*, T*);                                  \
  template void feed_vjp<T>(int, int64_t, const T*, const T*, const T*, T*);                                          \
  template void softmax_delta<T>(int64_t, const T*, const T*, const uint8_t*, T*);                                    \
  template double squared_norm<T>(Energy, bool, int64_t, const T*, const uint8_t*, const uint8_t*, const T*, T*);
PC_INSTANCE(float)
PC_INSTANCE(double)
#undef PC_INSTANCE

}  // namespace pc
