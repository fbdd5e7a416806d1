// SPDX-License-Identifier: MIT
// The cluster-resident kernel on the CPU: a thread for each CTA, a loop for its threads; same plan, same body.
#include <pthread.h>

#include <cstring>
#include <memory>
#include <thread>
#include <vector>

#include "cuda/cluster_body.h"
#include "cuda/cluster_owned.h"

namespace {

struct Alone {  // the team of one thread
  int rank = 0, size = 1;
  float sum(float x) const { return x; }
  float max(float x) const { return x; }
};

struct Cta {
  int cta;
  std::vector<std::vector<float>>* memory;
  pthread_barrier_t* barrier;

  char* base(int of) const { return reinterpret_cast<char*>((*memory)[of].data()); }
  void sync() const {}
  void sync_cluster() const { pthread_barrier_wait(barrier); }

  void lower(int64_t* number, int64_t to) const {
    int64_t found = __atomic_load_n(number, __ATOMIC_RELAXED);
    while (found == 0 || found > to) {
      if (__atomic_compare_exchange_n(number, &found, to, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) return;
    }
  }

  template <class F>
  void each(int count, const F& f) const {
    for (int i = 0; i < count; ++i) f(i);
  }
  template <class F>
  void rows(const F& f) const {
    for (int m = 0; m < pc::kTile; ++m) f(m, Alone{});
  }
  template <class F>
  void warps(int count, const F& f) const {
    for (int i = 0; i < count; ++i) f(i);
  }
  template <class F>
  void team(const F& f) const {
    for (int w = 0; w < pc::kWarpsOfCta; ++w) f(w);
  }
  template <class T>
  struct Own {
    std::vector<T> all = std::vector<T>(pc::kWarpsOfCta * 32);
    T& of(int warp, int c, int m) { return all[warp * 32 + c % 8 * 4 + m / 2]; }
  };
  template <int Unroll = 1, class F>
  void lanes(int count, const F& f) const {
    for (int i = 0; i < count; ++i) f(i);
  }
  void sync_warp() const {}
  template <int N, class F>
  void totals(float (&x)[N], const F& f) const {
    for (int i = 0; i < N; ++i) f(i, x[i]);
  }
  template <class F>
  void quads(const F& f) const {
    for (int c = 0; c < 8; ++c) {
      for (int m = 0; m < pc::kTile; m += 2) f(c, m);
    }
  }
  template <class F>
  void multiply(const pc::Bf16* weight, int pitch, const pc::Bf16* lines, int inner, const F& f) const {
    product(weight, pitch, 1, lines, inner, 0, f);
  }
  template <class F>
  void multiply_across(const pc::Bf16* weight, int pitch, const pc::Bf16* lines, int inner, int blocks, const F& f) const {
    for (int block = 0; block < blocks; ++block) product(weight, 1, pitch, lines, inner, block * pc::kUnit, f);
  }
  template <class F>
  void product(const pc::Bf16* weight, int to_row, int to_inner, const pc::Bf16* lines, int inner, int first, const F& f) const {
    quads([&](int c, int m) {
      pc::Four sums = {0, 0, 0, 0};
      for (int i = 0; i < 4; ++i) {
        const pc::Bf16* row = weight + (first + c + i / 2 * 8) * to_row;
        for (int k = 0; k < inner; ++k) sums[i] += pc::widen(row[k * to_inner]) * pc::widen(lines[k * pc::kTile + m + i % 2]);
      }
      f(first + c, m, sums);
    });
  }
};

template <bool Bare>
void run_tile(const pc::ClusterRun& run, int64_t tile) {
  std::vector<std::vector<float>> memory(pc::kCluster);  // fresh memory is NaN
  for (auto& one : memory) one.assign(run.plan.bytes / 4, NAN);
  pthread_barrier_t barrier;
  pthread_barrier_init(&barrier, nullptr, pc::kCluster);
  std::vector<std::thread> threads;
  for (int c = 0; c < pc::kCluster; ++c) {
    threads.emplace_back([&, c] {
      const Cta cta{c, &memory, &barrier};
      if constexpr (Bare) pc::ClusterOwned<Cta>(cta, run, tile).solve();
      else pc::ClusterBody<Cta>(cta, run, tile).solve();
    });
  }
  for (std::thread& thread : threads) thread.join();
  pthread_barrier_destroy(&barrier);
}

}  // namespace

extern "C" int64_t size_of_chain_node() { return sizeof(pc::ChainNode); }

// 0 and the results in the nodes' phi and delta; or 1 and, in `why`, the reason. general: without the shorter code of a bare run.
// found: rounds and parts of the plan, the lowest node that is not finite, whether the code was a bare run's
extern "C" int run_cluster(const pc::ChainNode* nodes, const int64_t* widths, int64_t count, const float* x, int64_t inputs,
                           int64_t batch, int64_t steps, double momentum, bool differences, bool general, int64_t* found, char* why,
                           int64_t room) {
  const auto run = std::make_unique<pc::ClusterRun>();
  const std::string said = pc::describe_cluster(nodes, widths, count, batch, steps, momentum, differences, *run);
  std::strncpy(why, said.c_str(), room - 1);
  if (!said.empty()) return 1;
  const bool bare = pc::is_bare(*run) && !general;
  found[0] = run->plan.rounds, found[1] = run->plan.parts, found[2] = 0, found[3] = bare;
  std::vector<float> first_a(batch * widths[0], NAN);
  run->x = x, run->inputs = static_cast<int>(inputs), run->first_a = first_a.data(), run->diverged = found + 2;
  for (int64_t tile = 0; tile * pc::kTile < batch; ++tile) bare ? run_tile<true>(*run, tile) : run_tile<false>(*run, tile);
  return 0;
}
