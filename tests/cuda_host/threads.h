// SPDX-License-Identifier: MIT
// A block of CUDA threads, played by threads of the CPU: two for each warp, with real barriers.
#pragma once

#include <pthread.h>

#include <functional>
#include <thread>
#include <vector>

#include "cuda/node_table.h"

namespace host {

constexpr int kLanes = 2;

struct Group {  // those that share a reduction
  explicit Group(int size) : places(size) { pthread_barrier_init(&barrier, nullptr, size); }
  ~Group() { pthread_barrier_destroy(&barrier); }
  pthread_barrier_t barrier;
  std::vector<double> places;
};

struct Team {
  int rank, size;
  Group* group;

  template <class Op>
  double reduce(double x, Op op) const {
    pthread_barrier_wait(&group->barrier);
    group->places[rank] = x;
    pthread_barrier_wait(&group->barrier);
    double out = group->places[0];
    for (int i = 1; i < size; ++i) out = op(out, group->places[i]);
    return out;
  }
  double sum(double x) const {
    return reduce(x, [](double a, double b) { return a + b; });
  }
  float max(float x) const {
    return static_cast<float>(reduce(x, [](double a, double b) { return a > b ? a : b; }));
  }
};

struct Teams {
  int warp, lane;
  Group *own, *block;

  Team line(bool by_warp) const {
    return by_warp ? Team{lane, kLanes, own} : Team{warp * kLanes + lane, pc::kWarps * kLanes, block};
  }
  double sum_of_warps(double x) const { return line(false).sum(lane == 0 ? x : 0); }
};

// work(teams) by every thread of one block
inline void run_block(const std::function<void(const Teams&)>& work) {
  Group block(pc::kWarps * kLanes);
  std::vector<std::unique_ptr<Group>> own;
  for (int w = 0; w < pc::kWarps; ++w) own.push_back(std::make_unique<Group>(kLanes));
  std::vector<std::thread> threads;
  for (int w = 0; w < pc::kWarps; ++w) {
    for (int lane = 0; lane < kLanes; ++lane) {
      threads.emplace_back([&, w, lane] { work(Teams{w, lane, own[w].get(), &block}); });
    }
  }
  for (std::thread& thread : threads) thread.join();
}

}  // namespace host
