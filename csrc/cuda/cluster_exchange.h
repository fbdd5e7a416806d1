// SPDX-License-Identifier: MIT
// What the CTAs of a cluster send each other in a step: dv of a layer's columns to all, shares of W dv and of W^T delta to the CTAs
// that own the columns, who add them up. Host and device.
#pragma once

#include "cluster_start.h"

namespace pc {

constexpr int kPeers = 2;  // that one warp sends to

template <class Exec, bool Bare>
class ClusterExchange : protected ClusterStart<Exec, Bare> {
 protected:
  PC_HD ClusterExchange(const Exec& exec, const ClusterRun& run, int64_t tile) : ClusterStart<Exec, Bare>(exec, run, tile) {}

  using Base = ClusterStart<Exec, Bare>;
  using Base::exec_, Base::run_, Base::plan_, Base::plan, Base::node, Base::from, Base::moves, Base::blocks, Base::held_columns;
  using Base::get, Base::put;
  template <class T>
  PC_HD T* here(int offset) const { return Base::template here<T>(offset); }
  template <class T>
  PC_HD T* there(int cta, int offset) const { return Base::template there<T>(cta, offset); }

  PC_HD bool in(int l, int round) const { return plan(l).round == round; }
  PC_HD bool refreshes(int l, int64_t t) const { return t > 0 && moves(l - 1, t - 1); }  // a_l has changed

  // Whether who moves the node below layer l sends it on at once. With one round nobody reads what was gathered before by then;
  // a softmax has to wait for its row.
  PC_HD bool sent_by_moves(int l) const { return Bare || (plan_.rounds == 1 && !is_softmax(node(l - 1).feed)); }

  // jobs of a layer in a round of move t
  PC_HD int sends(int64_t t, int round, int l) const {
    if (!in(l, round) || !refreshes(l, t)) return 0;
    return plan(l).narrow ? blocks(l) * kCluster : sent_by_moves(l) ? 0 : kCluster / kPeers;
  }
  PC_HD int feeds_back(int64_t t, int round, int l) const {
    return in(l, round) && moves(l - 1, t) && !plan(l).narrow && held_columns(l) > 0 ? kCluster : 0;
  }

  PC_HD int64_t from_when_steady() const {  // the first move from which on all have the same jobs
    int64_t from = 1;
    for (int l = 0; l < plan_.count; ++l) {
      const int64_t first = node(l).moves_from;
      from = first < run_.steps && first + 1 > from ? first + 1 : from;
    }
    return from;
  }

  // dv of the node below, a line a column, to some CTAs; each begins with others, so that not all write to the same
  PC_HD void send_moved(int l, int job) const {
    const Line* own = here<Line>(plan(l - 1).moved);
    for (int i = 0; i < kPeers; ++i) {
      Line* gather = there<Line>((exec_.cta + job * kPeers + i) % kCluster, plan(l).gather) + from(l - 1);
      exec_.lanes(held_columns(l - 1), [&](int j) { gather[j] = own[j]; });
    }
  }

  // the same of a block of 16 columns, by the warp that has just moved them
  PC_HD void send_block(int l, int j) const {
    exec_.sync_warp();
    const Line* own = here<Line>(plan(l - 1).moved) + j;
    const int at = from(l - 1) + j;
    exec_.lanes(kUnit * kCluster, [&](int i) {
      there<Line>((exec_.cta + i / kUnit) % kCluster, plan(l).gather)[at + i % kUnit] = own[i % kUnit];
    });
  }

  // of a narrow layer: this CTA's share of a block of W dv, to one CTA. The product is short: each sender makes it
  PC_HD void send_share(int l, int job) const {
    const LayerPlan& p = plan(l);
    const int block = job / kCluster, to = (exec_.cta + job) % kCluster;
    float* shares = there<float>(to, p.shares) + exec_.cta * p.padded * kTile;
    const Bf16* weight = here<Bf16>(p.weight) + block * kUnit * p.pitch;
    exec_.multiply(weight, p.pitch, here<Bf16>(plan(l - 1).moved), held_columns(l - 1), [&](int c, int m, const Four& x) {
      put(shares, block * kUnit + c, m, x);
    });
  }

  struct Sums {
    Four x;
  };
  PC_HD Sums from_shares(int l, int j, int m) const {
    return added_up(here<float>(plan(l).shares), plan(l).padded, j, m, [](int) { return true; });
  }
  // of what the CTAs have sent, `width` lines each, in their order
  template <class Sent>
  PC_HD Sums added_up(const float* from, int width, int j, int m, const Sent& sent) const {
    Sums sums{};
    for (int c = 0; c < kCluster; ++c) {
      if (!sent(c)) continue;
      Four x;
      get(from + c * width * kTile, j, m, x);
      for (int i = 0; i < 4; ++i) sums.x[i] += x[i];
    }
    return sums;
  }

  // this CTA's share of W^T delta for a part of an owner's columns of the node below
  PC_HD void send_feedback(int l, int part, int job) const {
    const LayerPlan &p = plan(l), &below = plan(l - 1);
    const int owner = (exec_.cta + job) % kCluster, first = below.first[owner] + part * p.part, inner = held_columns(l);
    const int left = below.first[owner + 1] - first, width = left < p.part ? left : p.part;
    float* receive = there<float>(owner, p.receive) + exec_.cta * p.part * kTile;
    exec_.multiply_across(here<Bf16>(p.weight) + first, p.pitch, here<Bf16>(p.delta), inner, width / kUnit,
                          [&](int c, int m, const Four& x) { put(receive, c, m, x); });
  }
};

}  // namespace pc
