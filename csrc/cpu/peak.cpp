// SPDX-License-Identifier: MIT
// The machine's float32 FMA peak, for rooflines: independent chains of fused multiply-adds in registers, one set per thread.
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <chrono>

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#endif

namespace pc {
namespace {

constexpr int kChains = 12;  // latency 4, two units: at least 8 must be under way

#if defined(__x86_64__) && defined(__GNUC__)
__attribute__((target("avx512f"))) float chains_512(int64_t n) {
  __m512 sums[kChains];
  for (auto& sum : sums) sum = _mm512_set1_ps(1.0f);
  const __m512 factor = _mm512_set1_ps(0.999f), step = _mm512_set1_ps(1e-6f);
  for (int64_t i = 0; i < n; ++i) {
#pragma GCC unroll 12
    for (int k = 0; k < kChains; ++k) sums[k] = _mm512_fmadd_ps(sums[k], factor, step);
  }
  float total = 0;
  for (auto& sum : sums) total += _mm512_cvtss_f32(sum);
  return total;
}
__attribute__((target("avx2,fma"))) float chains_256(int64_t n) {
  __m256 sums[kChains];
  for (auto& sum : sums) sum = _mm256_set1_ps(1.0f);
  const __m256 factor = _mm256_set1_ps(0.999f), step = _mm256_set1_ps(1e-6f);
  for (int64_t i = 0; i < n; ++i) {
#pragma GCC unroll 12
    for (int k = 0; k < kChains; ++k) sums[k] = _mm256_fmadd_ps(sums[k], factor, step);
  }
  float total = 0;
  for (auto& sum : sums) total += _mm256_cvtss_f32(sum);
  return total;
}
#endif

float chains_plain(int64_t n) {
  float sums[kChains];
  for (float& sum : sums) sum = 1.0f;
  for (int64_t i = 0; i < n; ++i) {
    for (float& sum : sums) sum = sum * 0.999f + 1e-6f;
  }
  float total = 0;
  for (const float sum : sums) total += sum;
  return total;
}

// GFLOP/s of all threads together over about `seconds`.
double fma_peak(double seconds) {
  TORCH_CHECK_VALUE(seconds > 0, "seconds: wanted a number > 0, got ", seconds);
  float (*run)(int64_t) = chains_plain;
  int lanes = 1;
#if defined(__x86_64__) && defined(__GNUC__)
  if (__builtin_cpu_supports("avx512f")) {
    run = chains_512, lanes = 16;
  } else if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    run = chains_256, lanes = 8;
  }
#endif
  using Clock = std::chrono::steady_clock;
  constexpr int64_t kLoops = 200000;
  const int threads = at::get_num_threads();
  const auto start = Clock::now();
  const auto elapsed = [&] { return std::chrono::duration<double>(Clock::now() - start).count(); };
  volatile float sink = 0;
  int64_t rounds = 0;
  while (elapsed() < seconds) {
    at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) sink = run(kLoops);
    });
    ++rounds;
  }
  return 2.0 * lanes * kChains * kLoops * threads * rounds / elapsed() * 1e-9;
}

}  // namespace
}  // namespace pc

TORCH_LIBRARY_FRAGMENT(pc_kernels_native, m) { m.def("fma_peak(float seconds) -> float", &pc::fma_peak); }
