// SPDX-License-Identifier: MIT
// The cluster kernel's tile as one CTA sees it: where an entry of a node lies, and what it holds. Host and device.
#pragma once

#include "cluster_nodes.h"

namespace pc {

struct RowPair {  // of a softmax: the maximum, and the sum of e^(x - maximum); of a plain sum: 0, and the sum
  float max, sum;
};

struct alignas(16) Eight {
  Bf16 x[8];
};

enum Stat : int { kState, kPrediction, kDot };  // places of a node's row statistics

template <class Exec>
class ClusterView {
 public:
  PC_HD ClusterView(const Exec& exec, const ClusterRun& run, int64_t tile)
      : exec_(exec), run_(run), plan_(run.plan), tile_(tile) {}

 protected:
  PC_HD const LayerPlan& plan(int64_t l) const { return plan_.layers[l]; }
  PC_HD const ClusterNode& node(int64_t l) const { return run_.nodes[l]; }
  PC_HD bool last(int64_t l) const { return l + 1 == plan_.count; }
  PC_HD int64_t sample(int m) const {  // rows beyond the batch repeat its last sample, and are not written out
    const int64_t b = tile_ * kTile + m;
    return b < run_.batch ? b : run_.batch - 1;
  }
  PC_HD bool written(int m) const { return tile_ * kTile + m < run_.batch; }
  PC_HD int64_t from(int64_t l) const { return plan(l).first[exec_.cta]; }
  PC_HD int64_t columns(int64_t l) const {  // this CTA's, without padding
    const int64_t end = plan(l).first[exec_.cta + 1], real = end < plan(l).width ? end : plan(l).width;
    return real > from(l) ? real - from(l) : 0;
  }
  template <class T>
  PC_HD T* here(int64_t offset) const { return reinterpret_cast<T*>(exec_.base(exec_.cta) + offset); }
  template <class T>
  PC_HD T* there(int cta, int64_t offset) const { return reinterpret_cast<T*>(exec_.base(cta) + offset); }
  PC_HD RowPair* stats(int cta, int64_t l, Stat which, int64_t of) const {
    return there<RowPair>(cta, plan(l).stats) + (which * (kCluster + 1) + of) * kTile;
  }
  PC_HD RowPair stat(int64_t l, Stat which, int m) const { return stats(exec_.cta, l, which, kCluster)[m]; }
  PC_HD bool moves(int64_t l, int64_t t) const { return t >= node(l).moves_from; }

  PC_HD int64_t place(int64_t l, int m, int64_t j) const { return sample(m) * plan(l).width + from(l) + j; }
  PC_HD bool kept(int64_t l, int m, int64_t j) const {
    const ClusterNode& d = node(l);
    return d.mask == nullptr || d.mask[sample(m) * d.mask_sample + from(l) + j];
  }
  PC_HD bool held(int64_t l, int m, int64_t j) const {
    const ClusterNode& d = node(l);
    return d.hold != nullptr && d.hold[sample(m) * d.hold_sample + from(l) + j];
  }
  PC_HD float phi(int64_t l, int m, int64_t j) const {
    const ClusterNode& d = node(l);
    if (!d.clamped) return here<float>(plan(l).phi)[m * plan(l).slice + j];
    if (d.index != nullptr) return d.index[sample(m)] == from(l) + j ? 1.0f : 0.0f;
    return d.start[place(l, m, j)];
  }
  PC_HD float a(int64_t l, int m, int64_t j) const {
    return l == 0 ? node(0).first_a[place(0, m, j)] : here<float>(plan(l).a)[m * plan(l).slice + j];
  }
  PC_HD float log_var(int64_t l, int64_t j) const { return node(l).log_var == nullptr ? 0.0f : node(l).log_var[from(l) + j]; }
  PC_HD float mu(int64_t l, int m, int64_t j) const {
    if (!is_softmax(node(l).activation)) return activated(node(l).activation, a(l, m, j));
    const RowPair row = stat(l, kPrediction, m);
    return exp(a(l, m, j) - row.max) / row.sum;
  }

  // f(m, j) for the entries of this CTA's columns of node l, of those in [begin, end)
  template <class F>
  PC_HD void entries(int64_t l, int64_t begin, int64_t end, const F& f) const {
    const int64_t most = columns(l);
    const int width = static_cast<int>((end < most ? end : most) - begin);
    if (width <= 0) return exec_.sync();
    exec_.each(kTile * width, [&](int i) { f(i / width, begin + i % width); });
  }
  template <class F>
  PC_HD void entries(int64_t l, const F& f) const { entries(l, 0, plan(l).slice, f); }

  const Exec& exec_;
  const ClusterRun& run_;
  const ClusterPlan& plan_;
  const int64_t tile_;
};

}  // namespace pc
