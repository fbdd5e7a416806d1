// SPDX-License-Identifier: MIT
// What the formulas of pc_math.h are made of: value types, exponentials and their differences that do not cancel, sums
// in a fixed order, softmax over a row. Host and device; the C++ counterpart of pc_kernels/numerics.py.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#if defined(__CUDACC__)
#define PC_HD __host__ __device__ __forceinline__
#elif defined(__GNUC__)
#define PC_HD inline __attribute__((always_inline))
#else
#define PC_HD inline
#endif

// Said of a short loop over an array that a GPU is to hold in registers.
#if defined(__CUDA_ARCH__)
#define PC_UNROLL _Pragma("unroll")
#else
#define PC_UNROLL
#endif

// Said of a loop whose iterations touch no common memory, so that the compiler vectorises it without asking.
#if defined(__GNUC__) && !defined(__clang__) && !defined(__CUDACC__)
#define PC_INDEPENDENT _Pragma("GCC ivdep")
#else
#define PC_INDEPENDENT
#endif

namespace pc {

// ---------------------------------------------------------------------------------------------------------------------
// primitives

// sum of x^k / (k+2)!, so that e^x = 1 + x + x^2 exp_series(x); exact to rounding for |x| <= 1/2
template <int K>
struct Factorial {
  static constexpr double value = K * Factorial<K - 1>::value;
};
template <>
struct Factorial<0> {
  static constexpr double value = 1;
};
template <int Last, int K = 2, class V>
PC_HD V exp_series(V x) {
  if constexpr (K == Last) {
    return V(1 / Factorial<K>::value);
  } else {
    return V(1 / Factorial<K>::value) + x * exp_series<Last, K + 1>(x);
  }
}

// What the formulas need from a value type.
template <class V>
struct Prim;

template <class S>
struct ScalarPrim {
  PC_HD static S select(bool c, S a, S b) { return c ? a : b; }
  PC_HD static S abs(S x) { return x < 0 ? -x : x; }
};

template <>
struct Prim<double> : ScalarPrim<double> {
  static constexpr int kSeries = 15;  // 0.5^14 / 16! < 4e-18
  PC_HD static double exp(double x) { return ::exp(x); }
  PC_HD static double expm1(double x) { return ::expm1(x); }
  PC_HD static double log(double x) { return ::log(x); }
  PC_HD static double log1p(double x) { return ::log1p(x); }
  PC_HD static double tanh(double x) { return ::tanh(x); }
  PC_HD static double erfc(double x) { return ::erfc(x); }
};

#if !defined(__CUDA_ARCH__)
// float on the host: without branches or tables, so that loops over them vectorise; within 1.5 ulp, tanh 2.5.
namespace host {

constexpr float kLn2High = 0.693145751953125f, kLn2Low = 1.42860682e-6f, kInf = std::numeric_limits<float>::infinity();
constexpr uint32_t kSqrtHalf = 0x3f3504f3, kOne = 0x3f800000, kMantissa = 0x7fffff;

PC_HD uint32_t bits(float x) {
  uint32_t u;
  std::memcpy(&u, &x, sizeof u);
  return u;
}
PC_HD float value(uint32_t u) {
  float x;
  std::memcpy(&x, &u, sizeof x);
  return x;
}
PC_HD float power_of_two(int32_t n) { return value(static_cast<uint32_t>(n + 127) << 23); }

struct Reduced {  // x = n ln 2 + r, |r| <= ln 2 / 2; tail = e^r - 1
  int32_t n;
  float tail;
};
PC_HD Reduced reduce(float x) {
  constexpr float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to a whole number, found in the low bits
  const float shifted = x * 1.44269504f + magic, n = shifted - magic;
  const float r = (x - n * kLn2High) - n * kLn2Low;
  return {static_cast<int32_t>(bits(shifted) - bits(magic)), r + r * r * exp_series<9>(r)};
}

PC_HD float exp(float x) {
  x = x < -104.0f ? -104.0f : x;  // e^-104 rounds to 0; NaN passes
  x = x > 89.0f ? 89.0f : x;      // e^89 is infinite
  const Reduced part = reduce(x);
  const int32_t half = part.n >> 1;  // two factors: the result may be subnormal, or infinite
  return (1 + part.tail) * power_of_two(half) * power_of_two(part.n - half);
}

PC_HD float expm1(float x) {
  x = x < -60.0f ? -60.0f : x;
  x = x > 89.0f ? 89.0f : x;
  const Reduced part = reduce(x);
  const float half = power_of_two(part.n - 1);
  return 2 * (half * part.tail + (half - 0.5f));
}

// ln of u in (0, inf), plus the relative correction c of u; `near` takes ln(1 + f) itself, |f| < 0.42
PC_HD float log_of(float u, float c, int32_t scaled, bool near, float f_near) {
  const uint32_t word = bits(u) + (kOne - kSqrtHalf);
  const float f_far = value((word & kMantissa) + kSqrtHalf) - 1;
  const float k = near ? 0.0f : static_cast<float>(static_cast<int32_t>(word >> 23) - 127 - scaled);
  const float f = near ? f_near : f_far, correction = near ? 0.0f : c;
  const float s = f / (2 + f), z = s * s;  // ln(1 + f) = 2 artanh(s) = f - s (f - 2 z (1/3 + z/5 + ...))
  const float r = z * (0.66666667f + z * (0.4f + z * (0.28571429f + z * 0.22222222f)));
  return k * kLn2High + (f - (s * (f - r) - (k * kLn2Low + correction)));
}

PC_HD float log_edges(float y, float x) {  // x is the argument of ln
  y = x < kInf ? y : x;
  return x > 0 ? y : (x == 0 ? -kInf : NAN);
}

PC_HD float log(float x) {
  const bool tiny = x < 1.17549435e-38f;
  return log_edges(log_of(tiny ? x * 33554432.0f : x, 0.0f, tiny ? 25 : 0, false, 0.0f), x);
}

PC_HD float log1p(float x) {
  const float u = 1 + x;
  const float lost = (x > 1 ? 1 - (u - x) : x - (u - 1)) / u;
  return log_edges(log_of(u, lost, 0, ScalarPrim<float>::abs(x - 0.06f) < 0.35f, x), u);
}

PC_HD float tanh(float x) {
  const float size = ScalarPrim<float>::abs(x), t = expm1(size > 10.0f ? 20.0f : 2 * size), y = t / (t + 2);
  return x < 0 ? -y : y;
}

}  // namespace host
#define PC_F32(name) host::name
#else
#define PC_F32(name) ::name##f
#endif

template <>
struct Prim<float> : ScalarPrim<float> {
  static constexpr int kSeries = 9;  // 0.5^8 / 10! < 2e-9
  PC_HD static float exp(float x) { return PC_F32(exp)(x); }
  PC_HD static float expm1(float x) { return PC_F32(expm1)(x); }
  PC_HD static float log(float x) { return PC_F32(log)(x); }
  PC_HD static float log1p(float x) { return PC_F32(log1p)(x); }
  PC_HD static float tanh(float x) { return PC_F32(tanh)(x); }
  PC_HD static float erfc(float x) { return ::erfcf(x); }
};
#undef PC_F32

#define PC_FORWARD(name)         \
  template <class V>             \
  PC_HD V name(V x) {            \
    return Prim<V>::name(x);     \
  }
PC_FORWARD(exp) PC_FORWARD(expm1) PC_FORWARD(log) PC_FORWARD(log1p) PC_FORWARD(tanh) PC_FORWARD(erfc) PC_FORWARD(abs)
#undef PC_FORWARD

template <class C, class V>
PC_HD V select(C c, V a, V b) {
  return Prim<V>::select(c, a, b);
}

// ---------------------------------------------------------------------------------------------------------------------
// differences of exponentials that do not cancel (pc_kernels/numerics.py)

constexpr double kSeriesRadius = 0.5;

template <class V>
PC_HD auto is_near(V x) {
  return abs(x) < V(kSeriesRadius);
}

// e^x - 1 - x, and e^x - 1, for |x| < kSeriesRadius
template <class V>
PC_HD V near_expm1_minus_x(V x) {
  return x * x * exp_series<Prim<V>::kSeries>(x);
}
template <class V>
PC_HD V near_expm1(V x) {
  return x + near_expm1_minus_x(x);
}

// e^x - 1 - x for every x, given e1 = e^x - 1
template <class V>
PC_HD V expm1_minus_x(V x, V e1) {
  return select(is_near(x), near_expm1_minus_x(x), e1 - x);
}

// p ln(p/q) - p + q >= 0, given ln(p/q); q where p = 0
template <class V>
PC_HD V generalised_kl(V p, V q, V log_ratio) {
  const V far = select(p > V(0), p * log_ratio, V(0)) - p + q;
  return select(is_near(log_ratio), p * near_expm1_minus_x(-log_ratio), far);
}

// q - p, given ln(p/q)
template <class V>
PC_HD V difference_from_ratio(V p, V q, V log_ratio) {
  return select(is_near(log_ratio), p * near_expm1(-log_ratio), q - p);
}

template <class V>
PC_HD V sigmoid(V x) {
  return V(1) / (V(1) + exp(-x));
}
template <class V>
PC_HD V softplus(V x) {
  return select(x < V(0), V(0), x) + log1p(exp(-abs(x)));
}
// x ln x, 0 at x = 0
template <class V>
PC_HD V x_log_x(V x) {
  return select(x > V(0), x * log(x), V(0));
}

// ---------------------------------------------------------------------------------------------------------------------
// rows on one thread (CUDA has its own reductions): sums in a fixed order, in blocks that vectorise

constexpr int kBlock = 256;
constexpr int kRowsAtOnce = 16;  // at most: short rows are worked on together
constexpr int64_t kEntriesAtOnce = 1024;

PC_HD int64_t rows_at_once(int64_t width) {
  const int64_t rows = kEntriesAtOnce / (width > 0 ? width : 1);
  return rows < 1 ? 1 : rows > kRowsAtOnce ? kRowsAtOnce : rows;
}

constexpr int kLanes = 16;  // results that run side by side: a loop of this length vectorises without a remainder

// f(i) for i < n; f writes what belongs to i alone. Indices of 64 bits: where a narrower one may wrap nothing vectorises.
template <class F>
PC_HD void each(int64_t n, F f) {
  int64_t start = 0;
  for (; start + kLanes <= n; start += kLanes) {
    PC_INDEPENDENT
    for (int64_t j = 0; j < kLanes; ++j) f(start + j);
  }
  PC_INDEPENDENT
  for (int64_t i = start; i < n; ++i) f(i);
}

// op over f(i), n <= kBlock: lane by lane, then the lanes pairwise.
template <class T, class F, class Op>
PC_HD T fold(int64_t n, T neutral, F f, Op op) {
  T lanes[kLanes];
  for (int j = 0; j < kLanes; ++j) lanes[j] = neutral;
  int64_t start = 0;
  for (; start + kLanes <= n; start += kLanes) {
    PC_INDEPENDENT
    for (int64_t j = 0; j < kLanes; ++j) lanes[j] = op(lanes[j], f(start + j));
  }
  PC_INDEPENDENT
  for (int64_t j = 0; j < n - start; ++j) lanes[j] = op(lanes[j], f(start + j));
  for (int j = 0; j < 8; ++j) lanes[j] = op(lanes[j], lanes[j + 8]);
  for (int j = 0; j < 4; ++j) lanes[j] = op(lanes[j], lanes[j + 4]);
  return op(op(lanes[0], lanes[2]), op(lanes[1], lanes[3]));
}
template <class T>
PC_HD T tree_sum(const T* v, int n) {
  return fold(n, T(0), [=](int64_t i) { return v[i]; }, [](T a, T b) { return a + b; });
}

// sum of f(i): in lanes within a block, blocks in double. f may write what belongs to i alone.
template <class T, class F>
PC_HD double row_sum(int64_t n, F f) {
  double total = 0;
  for (int64_t start = 0; start < n; start += kBlock) {
    const int64_t m = n - start < kBlock ? n - start : kBlock;
    total += fold(m, T(0), [=](int64_t i) { return f(start + i); }, [](T a, T b) { return a + b; });
  }
  return total;
}

template <class T>
PC_HD T row_max(int64_t n, const T* x) {
  T most = -INFINITY;
  for (int64_t start = 0; start < n; start += kBlock) {
    const int64_t m = n - start < kBlock ? n - start : kBlock;
    const T found = fold(m, T(-INFINITY), [=](int64_t i) { return x[start + i]; }, [](T a, T b) { return a > b ? a : b; });
    most = found > most ? found : most;
  }
  return most;
}

template <class T>
struct SoftmaxRow {  // softmax(x) = e^(x - max) / sum, its logarithm x - max - log_sum
  T max, log_sum;
};

// p <- softmax(x) of `rows` rows, x = -inf taking no part; x may be p. A step is done for all rows before the next one: a
// short row is a chain of results that wait for each other, and rows do not wait for rows.
template <class T>
PC_HD void softmax_rows(int rows, int64_t n, const T* x, T* p, SoftmaxRow<T>* out) {
  double sum[kRowsAtOnce];
  for (int r = 0; r < rows; ++r) out[r].max = row_max(n, x + r * n);
  for (int r = 0; r < rows; ++r) {
    const T *from = x + r * n, most = out[r].max;
    T* to = p + r * n;
    sum[r] = row_sum<T>(n, [=](int64_t i) { return to[i] = exp(from[i] - most); });
  }
  for (int r = 0; r < rows; ++r) {
    const T scale = T(1 / sum[r]);
    T* to = p + r * n;
    each(n, [=](int64_t i) { to[i] *= scale; });
  }
  for (int r = 0; r < rows; ++r) out[r].log_sum = T(::log(sum[r]));
}

template <class T>
PC_HD SoftmaxRow<T> softmax_row(int64_t n, const T* x, T* p) {
  SoftmaxRow<T> out;
  softmax_rows(1, n, x, p, &out);
  return out;
}

// m ? a : b for m = 0 or 1, in bits: a select whose parts differ in size does not vectorise.
PC_HD float pick(uint8_t m, float a, float b) {
  uint32_t x, y;
  std::memcpy(&x, &a, sizeof x);
  std::memcpy(&y, &b, sizeof y);
  y ^= (x ^ y) & (0u - static_cast<uint32_t>(m));
  std::memcpy(&a, &y, sizeof a);
  return a;
}
PC_HD double pick(uint8_t m, double a, double b) { return m ? a : b; }

// x with -inf where the mask is False, in `room`; x itself where there is no mask.
template <class T>
PC_HD const T* visible(int64_t n, const T* x, const uint8_t* mask, T* room) {
  if (mask == nullptr) return x;
  PC_INDEPENDENT
  for (int64_t i = 0; i < n; ++i) room[i] = pick(mask[i], x[i], T(-INFINITY));
  return room;
}

}  // namespace pc
