// SPDX-License-Identifier: MIT
// The cluster kernel's tile as one CTA sees it: where an entry of a node lies, and what it holds. Host and device.
#pragma once

#include "cluster_nodes.h"

namespace pc {

struct RowPair {  // of a softmax: the maximum, and the sum of e^(x - maximum); of a plain sum: 0, and the sum
  float max, sum;
};

struct alignas(16) Line {  // a column's samples, as products take them
  Bf16 x[kTile];
};
struct alignas(8) Two {
  float x[2];
};
struct alignas(4) TwoHalves {
  Bf16 x[2];
};

enum Work : int { kSend, kPredict, kCorrect, kFeedback, kMove, kMoveLast };  // of a round, in their order

enum Stat : int { kState, kPrediction, kDot };  // places of a node's row statistics

// Bare: the run is (is_bare), and nothing is asked of an entry that no entry has.
template <class Exec, bool Bare>
class ClusterView {
 public:
  PC_HD ClusterView(const Exec& exec, const ClusterRun& run, int64_t tile)
      : exec_(exec), run_(run), plan_(run.plan), tile_(tile) {}

 protected:
  PC_HD const LayerPlan& plan(int l) const { return plan_.layers[l]; }
  PC_HD const ChainNode& node(int l) const { return run_.nodes[l]; }
  PC_HD bool last(int l) const { return l + 1 == plan_.count; }
  PC_HD int64_t sample(int m) const {  // rows beyond the batch repeat its last sample, and are not written out
    const int64_t b = tile_ * kTile + m;
    return b < run_.batch ? b : run_.batch - 1;
  }
  // of a narrow node, which all CTAs hold, the first one writes
  PC_HD bool written(int l, int m) const { return tile_ * kTile + m < run_.batch && (!plan(l).narrow || exec_.cta == 0); }
  PC_HD int from(int l) const { return plan(l).narrow ? 0 : plan(l).first[exec_.cta]; }
  PC_HD int held_columns(int l) const {  // this CTA's, with padding: a multiple of a unit
    return plan(l).narrow ? plan(l).padded : plan(l).first[exec_.cta + 1] - plan(l).first[exec_.cta];
  }
  PC_HD int blocks(int l) const { return held_columns(l) / kUnit; }
  PC_HD bool real(int l, int j) const { return from(l) + j < plan(l).width; }
  PC_HD int columns(int l) const {  // this CTA's, without padding
    const int held = held_columns(l), real = plan(l).width - from(l);
    return real < held ? (real > 0 ? real : 0) : held;
  }
  template <class T>
  PC_HD T* here(int offset) const { return reinterpret_cast<T*>(exec_.base(exec_.cta) + offset); }
  template <class T>
  PC_HD T* there(int cta, int offset) const { return reinterpret_cast<T*>(exec_.base(cta) + offset); }
  PC_HD RowPair* stats(int cta, int l, Stat which, int of) const {
    return there<RowPair>(cta, plan(l).stats) + (which * (kCluster + 1) + of) * kTile;
  }
  PC_HD RowPair stat(int l, Stat which, int m) const { return stats(exec_.cta, l, which, kCluster)[m]; }
  PC_HD bool moves(int l, int64_t t) const { return t >= node(l).moves_from; }

  PC_HD static int at(int j, int m) { return j * kTile + m; }
  PC_HD int64_t place(int l, int m, int j) const { return sample(m) * plan(l).width + from(l) + j; }
  PC_HD bool kept(int l, int m, int j) const {
    if constexpr (Bare) return true;
    const ChainNode& d = node(l);
    return d.mask == nullptr || d.mask[sample(m) * d.mask_sample + from(l) + j];
  }
  PC_HD bool held(int l, int m, int j) const {
    if constexpr (Bare) return false;
    const ChainNode& d = node(l);
    return d.hold != nullptr && d.hold[sample(m) * d.hold_sample + from(l) + j];
  }
  PC_HD float phi(int l, int m, int j) const { return here<float>(plan(l).phi)[at(j, m)]; }
  PC_HD float mu(int l, int m, int j) const { return here<float>(plan(l).mu)[at(j, m)]; }
  PC_HD float a(int l, int m, int j) const {
    return l == 0 ? run_.first_a[place(0, m, j)] : here<float>(plan(l).a)[at(j, m)];
  }
  PC_HD float log_var(int l, int j) const {
    if constexpr (Bare) return 0.0f;
    return node(l).log_var == nullptr ? 0.0f : node(l).log_var[from(l) + j];
  }

  // -------------------------------------------------------------------------------------------------------------------
  // four entries, a lane's share of a block of 16 columns: entry i is (column j + 8 (i / 2), sample m + i % 2)

  PC_HD static int column(int j, int i) { return j + i / 2 * 8; }
  PC_HD static void get(const float* buffer, int j, int m, Four& x) {
    const Two low = *reinterpret_cast<const Two*>(buffer + at(j, m)), high = *reinterpret_cast<const Two*>(buffer + at(j + 8, m));
    x[0] = low.x[0], x[1] = low.x[1], x[2] = high.x[0], x[3] = high.x[1];
  }
  PC_HD static void put(float* buffer, int j, int m, const Four& x) {
    *reinterpret_cast<Two*>(buffer + at(j, m)) = {{x[0], x[1]}};
    *reinterpret_cast<Two*>(buffer + at(j + 8, m)) = {{x[2], x[3]}};
  }
  PC_HD static void put(Bf16* buffer, int j, int m, const Four& x) {
    *reinterpret_cast<TwoHalves*>(buffer + at(j, m)) = {{to_bf16(x[0]), to_bf16(x[1])}};
    *reinterpret_cast<TwoHalves*>(buffer + at(j + 8, m)) = {{to_bf16(x[2]), to_bf16(x[3])}};
  }

  // -------------------------------------------------------------------------------------------------------------------
  // work for all threads of the CTA

  template <class F>  // ends with the CTA's barrier
  PC_HD void entries(int l, const F& f) const {  // f(m, j) for the entries of this CTA's columns of node l
    exec_.each(kTile * columns(l), [&](int i) { f(i % kTile, i / kTile); });
  }
  // f(l, job) by a whole warp, for the count(l) jobs of each layer from 1 on. listed: they are those of the list. No barrier
  template <class Count, class F>
  PC_HD void jobs(Work work, bool listed, const Count& count, const F& f) const {
    const JobList& list = here<JobList>(plan_.lists)[work];
    exec_.warps(listed ? list.count : total(count), [&](int i) {
      const Job job = listed ? list.jobs[i] : find(count, i);
      f(job.layer, job.number);
    });
  }
  template <class Count>
  PC_HD int total(const Count& count) const {
    int jobs = 0;
    for (int l = 1; l < plan_.count; ++l) jobs += count(l);
    return jobs;
  }
  template <class Count>
  PC_HD Job find(const Count& count, int job) const {
    int l = 1;
    for (int some = count(l); job >= some; some = count(l)) job -= some, ++l;
    return {static_cast<short>(l), static_cast<short>(job)};
  }
  template <class Count>
  PC_HD bool list(Work work, const Count& count) const {  // whether there is room for them
    JobList& list = here<JobList>(plan_.lists)[work];
    const int jobs = total(count);
    if (jobs > kListed) return false;
    exec_.each(jobs + 1, [&](int i) {
      if (i == jobs) {
        list.count = jobs;
        return;
      }
      list.jobs[i] = find(count, i);
    });
    return true;
  }

  const Exec& exec_;
  const ClusterRun& run_;
  const ClusterPlan& plan_;
  const int64_t tile_;
};

}  // namespace pc
