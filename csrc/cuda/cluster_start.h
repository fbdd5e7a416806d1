// SPDX-License-Identifier: MIT
// The cluster kernel before its first move: weights into shared memory, and the forward pass, in float32. Host and device.
//
// A layer's v, which every CTA needs whole, is handed on through plan.forward: lines of 8 samples, a line a column.
#pragma once

#include "cluster_rows.h"

namespace pc {

constexpr int kTogether = 4;  // rows of W that a warp multiplies together

struct alignas(16) Sixteen {
  float x[4];
};
using Eight = float[kTile];

PC_HD float read_only(const float* from) {  // nobody writes there while the kernel runs, so that it may be read ahead of stores
#if defined(__CUDA_ARCH__)
  return __ldg(from);
#else
  return *from;
#endif
}

template <class Exec, bool Bare>
class ClusterStart : protected ClusterRows<Exec, Bare> {
 protected:
  PC_HD ClusterStart(const Exec& exec, const ClusterRun& run, int64_t tile) : ClusterRows<Exec, Bare>(exec, run, tile) {}

  using Base = ClusterRows<Exec, Bare>;
  using Base::exec_, Base::run_, Base::plan_, Base::plan, Base::node, Base::last, Base::sample, Base::tile_, Base::from;
  using Base::columns, Base::place, Base::at, Base::phi, Base::mu, Base::entries, Base::needs_state_row;
  using Base::needs_prediction_row, Base::send_state_row, Base::send_prediction_row, Base::combine, Base::softmax_mu;
  using Base::fed_softmax;
  template <class T>
  PC_HD T* here(int offset) const { return Base::template here<T>(offset); }
  template <class T>
  PC_HD T* there(int cta, int offset) const { return Base::template there<T>(cta, offset); }

  PC_HD void begin() const {
    Sixteen* words = here<Sixteen>(0);
    exec_.each(plan_.bytes / 16, [&](int i) { words[i] = Sixteen{}; });  // padding takes part in the products
    for (int l = 0; l < plan_.count; ++l) forward(l);
  }

 private:
  PC_HD void forward(int l) const {
    if (l == 0) {
      pre_activations(0, run_.inputs, [&](int k, Eight& v) {
        PC_UNROLL for (int m = 0; m < kTile; ++m) v[m] = operand(read_only(run_.x + sample(m) * run_.inputs + k));
      });
    } else {
      const Sixteen* lines = here<Sixteen>(plan_.forward);
      pre_activations(l, plan(l - 1).width, [&](int k, Eight& v) {
        const Sixteen low = lines[2 * k], high = lines[2 * k + 1];
        PC_UNROLL for (int m = 0; m < 4; ++m) v[m] = low.x[m], v[4 + m] = high.x[m];
      });
    }
    exec_.sync_cluster();  // every CTA of the cluster runs, its memory is ready, and the lines have been read
    if (needs_prediction_row(l)) {
      send_prediction_row(l);
      exec_.sync_cluster();
      combine(l, kPrediction);
      if (is_softmax(node(l).activation)) softmax_mu(l);
    }
    float* state = here<float>(plan(l).phi);
    entries(l, [&](int m, int j) { state[at(j, m)] = first_state(l, m, j); });
    if (needs_state_row(l)) {
      send_state_row(l);
      exec_.sync_cluster();
      combine(l, kState);
    }
    if (!last(l)) entries(l, [&](int m, int j) { hand_on(l, m, j); });
    exec_.sync_cluster();
  }

  // products of the start are exact for bf16_delta, and of bfloat16 operands for bf16
  PC_HD float operand(float x) const { return run_.differences ? x : widen(to_bf16(x)); }

  // W v + b of this CTA's columns, and what of W it needs later; v(k, factor): the node below's, or x, of all samples
  template <class V>
  PC_HD void pre_activations(int l, int inputs, const V& v) const {
    const int rows = columns(l);
    exec_.warps((rows + kTogether - 1) / kTogether, [&](int group) {
      float sums[kTogether * kTile] = {};
      const float* weight[kTogether];
      int row[kTogether];
      PC_UNROLL for (int r = 0; r < kTogether; ++r) {
        row[r] = group * kTogether + r < rows ? group * kTogether + r : rows - 1;
        weight[r] = node(l).weight + int64_t{from(l) + row[r]} * inputs;
      }
      exec_.template lanes<Bare ? 2 : 1>(inputs, [&](int k) {
        Eight factor;
        float w[kTogether];  // all are on their way before the first is needed
        PC_UNROLL for (int r = 0; r < kTogether; ++r) w[r] = read_only(weight[r] + k);
        v(k, factor);
        PC_UNROLL for (int r = 0; r < kTogether; ++r) {
          PC_UNROLL for (int m = 0; m < kTile; ++m) sums[r * kTile + m] += operand(w[r]) * factor[m];
        }
        PC_UNROLL for (int r = 0; l > 0 && r < kTogether; ++r) keep_weight(l, row[r], k, w[r]);
      });
      exec_.template totals<kTogether * kTile>(sums, [&](int i, float total) {
        if (group * kTogether + i / kTile < rows) predicted(l, i % kTile, group * kTogether + i / kTile, total);
      });
    });
  }
  PC_HD void keep_weight(int l, int row, int k, float w) const {  // of a narrow layer what belongs to its columns of the node below
    const LayerPlan& p = plan(l);
    const int at = p.narrow ? k - from(l - 1) : k;
    if (!p.narrow || (at >= 0 && at < columns(l - 1))) here<Bf16>(p.weight)[row * p.pitch + at] = to_bf16(w);
  }
  PC_HD void predicted(int l, int m, int j, float product) const {
    const ChainNode& d = node(l);
    const float a = product + (d.bias == nullptr ? 0.0f : d.bias[from(l) + j]);
    if (l > 0) here<float>(plan(l).a)[at(j, m)] = a;
    else if (tile_ * kTile + m < run_.batch) run_.first_a[place(0, m, j)] = a;
    if (!is_softmax(d.activation)) here<float>(plan(l).mu)[at(j, m)] = activated(d.activation, a);
  }

  PC_HD float first_state(int l, int m, int j) const {
    const ChainNode& d = node(l);
    if (d.index != nullptr) return d.index[sample(m)] == from(l) + j ? 1.0f : 0.0f;
    const float state = d.start == nullptr ? mu(l, m, j) : d.start[place(l, m, j)], floor = floor_of(d.energy);
    return !d.clamped && state < floor ? floor : state;
  }
  PC_HD void hand_on(int l, int m, int j) const {
    const ChainNode& d = node(l);
    const float v = !Bare && is_softmax(d.feed) ? fed_softmax(l, m, j) : activated(static_cast<Activation>(d.feed), phi(l, m, j));
    if (plan(l).fed != kNowhere) here<float>(plan(l).fed)[at(j, m)] = v;
    for (int c = 0; c < kCluster; ++c) there<float>(c, plan_.forward)[at(from(l) + j, m)] = operand(v);
    if (plan(l).moved != kNowhere && !run_.differences) here<Bf16>(plan(l).moved)[at(j, m)] = to_bf16(v);
  }
};

}  // namespace pc
