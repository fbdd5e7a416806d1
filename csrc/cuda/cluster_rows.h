// SPDX-License-Identifier: MIT
// The cluster kernel's rows: a node's entries lie across the cluster, so each CTA sends its part of a row's maximum and sum to
// all, and later adds up everybody's. A narrow node lies in every CTA whole. And delta of an entry whose row takes part in it.
#pragma once

#include "cluster_view.h"

namespace pc {

template <class Exec, bool Bare>
class ClusterRows : protected ClusterView<Exec, Bare> {
 protected:
  PC_HD ClusterRows(const Exec& exec, const ClusterRun& run, int64_t tile) : ClusterView<Exec, Bare>(exec, run, tile) {}

  using Base = ClusterView<Exec, Bare>;
  using Base::exec_, Base::plan_, Base::plan, Base::node, Base::columns, Base::stats, Base::stat, Base::kept, Base::phi, Base::a;
  using Base::mu, Base::log_var, Base::entries, Base::at;

  PC_HD bool needs_state_row(int l) const {
    if constexpr (Bare) return false;
    return plan(l).fed != kNowhere || (is_row_family(node(l).energy) && !node(l).clamped);
  }
  PC_HD bool needs_prediction_row(int l) const { return !plain(l); }
  PC_HD bool needs_dot(int l) const {
    if constexpr (Bare) return false;
    return is_softmax(node(l).activation) || (is_row_family(node(l).energy) && node(l).clamped);
  }
  PC_HD bool plain(int l) const {  // an entry's delta takes only the entry
    if constexpr (Bare) return true;
    return !is_softmax(node(l).activation) && !is_row_family(node(l).energy);
  }

  PC_HD void send_state_row(int l) const {
    send_softmax(l, kState, true, [&](int m, int j) { return phi(l, m, j); });
  }
  // of a, where it is the activation that normalises; else of mu
  PC_HD void send_prediction_row(int l) const {
    const bool raw = is_softmax(node(l).activation);
    send_softmax(l, kPrediction, !raw, [&](int m, int j) { return raw ? a(l, m, j) : mu(l, m, j); });
  }
  PC_HD void send_dot(int l) const {
    const ChainNode& d = node(l);
    send_sum(l, kDot, [&](int m, int j) {
      if (is_row_family(d.energy)) return phi(l, m, j);  // the target's mass
      const float value = mu(l, m, j), state = phi(l, m, j);
      if (d.energy == Energy::categorical_probs) return value - state;
      return value * grad_mu_of(d.energy, d.clamped, state, value, log_var(l, j));
    });
  }

  // the CTAs' parts in their order
  PC_HD void combine(int l, Stat which) const {
    if (plan(l).narrow) return;
    exec_.each(kTile, [&](int m) {
      RowPair all{-INFINITY, 0};
      for (int c = 0; c < kCluster; ++c) {
        const float found = stats(exec_.cta, l, which, c)[m].max;
        all.max = found > all.max ? found : all.max;
      }
      for (int c = 0; c < kCluster; ++c) {
        const RowPair part = stats(exec_.cta, l, which, c)[m];
        all.sum += part.sum > 0 || all.max == 0 ? part.sum * exp(part.max - all.max) : 0.0f;
      }
      stats(exec_.cta, l, which, kCluster)[m] = all;
    });
  }

  PC_HD void softmax_mu(int l) const {
    float* buffer = Base::template here<float>(plan(l).mu);
    entries(l, [&](int m, int j) {
      const RowPair row = stat(l, kPrediction, m);
      buffer[at(j, m)] = exp(a(l, m, j) - row.max) / row.sum;
    });
  }
  PC_HD float fed_softmax(int l, int m, int j) const {
    const RowPair row = stat(l, kState, m);
    return kept(l, m, j) ? exp(phi(l, m, j) - row.max) / row.sum : 0.0f;
  }

  // of one entry, of any family
  PC_HD float delta(int l, int m, int j) const {
    const ChainNode& d = node(l);
    const bool keep = kept(l, m, j);
    const float value = mu(l, m, j), state = keep ? phi(l, m, j) : value;  // an entry without a part has no error
    if (is_softmax(d.activation)) {  // all entries of a normalised row hang together, those without a part too
      const float dot = stat(l, kDot, m).sum;
      if (d.energy == Energy::categorical_probs) return CategoricalProbs::softmax_delta(state, value, dot);
      return Softmax::vjp(value, keep ? grad_mu_of(d.energy, d.clamped, state, value, log_var(l, j)) : 0.0f, dot);
    }
    if (!keep) return 0.0f;
    const float grad = is_row_family(d.energy) ? categorical_grad(l, m, state, value)
                                               : grad_mu_of(d.energy, d.clamped, state, value, log_var(l, j));
    return pulled(d.activation, a(l, m, j), value, grad);
  }

 private:
  // q - p. The ratio is rounded once more than in node_lines.h, which exchanges one more sum for a fixed point that is exactly
  // zero: bfloat16 would not show it.
  PC_HD float categorical_grad(int l, int m, float state, float value) const {
    const RowPair bottom = stat(l, kPrediction, m);
    const float q = exp(value - bottom.max) / bottom.sum;
    if (node(l).clamped) return Categorical::target<kGradMu>(state, q, 0.0f, stat(l, kDot, m).sum).grad_mu;
    const RowPair top = stat(l, kState, m);
    const float p = exp(state - top.max) / top.sum;
    const float ratio = (state - value) - (top.max - bottom.max) - (log(top.sum) - log(bottom.sum));
    return Categorical::free<kGradMu>(p, q, ratio).grad_mu;
  }

  // x(m, j): an entry; masked: whether the node's mask keeps entries out
  template <class X>
  PC_HD void send_softmax(int l, Stat which, bool masked, const X& x) const {
    const int n = columns(l);
    exec_.rows([&](int m, const auto& team) {
      float most = -INFINITY, sum = 0;
      for (int j = team.rank; j < n; j += team.size) {
        const float got = x(m, j);
        most = (!masked || kept(l, m, j)) && got > most ? got : most;
      }
      most = team.max(most);
      for (int j = team.rank; j < n; j += team.size) sum += !masked || kept(l, m, j) ? exp(x(m, j) - most) : 0.0f;
      send(team, l, which, m, {most, team.sum(sum)});
    });
  }
  template <class X>
  PC_HD void send_sum(int l, Stat which, const X& x) const {
    const int n = columns(l);
    exec_.rows([&](int m, const auto& team) {
      float sum = 0;
      for (int j = team.rank; j < n; j += team.size) sum += kept(l, m, j) ? x(m, j) : 0.0f;
      send(team, l, which, m, {0.0f, team.sum(sum)});
    });
  }
  template <class Team>
  PC_HD void send(const Team& team, int l, Stat which, int m, const RowPair& part) const {
    if (plan(l).narrow) {
      if (team.rank == 0) stats(exec_.cta, l, which, kCluster)[m] = part;
      return;
    }
    for (int c = team.rank; c < kCluster; c += team.size) stats(c, l, which, exec_.cta)[m] = part;
  }
};

}  // namespace pc
