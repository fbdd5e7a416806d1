// SPDX-License-Identifier: MIT
// The cluster kernel for chains of single entries (is_bare), the usual case: each warp owns a block of 16 columns of one node, and
// its lanes keep their entries' state in registers through all steps. Same plan and exchange as cluster_body.h. Host and device.
//
// Per step, with a cluster barrier at each bar:
//     owners: a, mu, delta; then W^T delta is sent | owners: phi, dv, which is sent; then shares of a narrow layer's W dv |
#pragma once

#include "cluster_exchange.h"

namespace pc {

struct Owned {  // a lane's four entries
  Four phi, mu, a, velocity;
};

template <class Exec>
class ClusterOwned : private ClusterExchange<Exec, true> {
 public:
  PC_HD ClusterOwned(const Exec& exec, const ClusterRun& run, int64_t tile) : ClusterExchange<Exec, true>(exec, run, tile) {}

  PC_HD void solve() {
    this->begin();
    typename Exec::template Own<Owned> own;
    owners([&](int w, int l, int j) { quads(w, own, [&](int c, int m, Owned& mine) { take_over(l, j + c, m, mine); }); });
    const int64_t steady = from_when_steady();
    const bool lists = steady < run_.steps && list_jobs(steady);
    for (int64_t t = 0; t < run_.steps; ++t) {
      owners([&](int w, int l, int j) { predict(t, w, l, j, own); });
      exec_.sync();
      jobs(kFeedback, lists && t >= steady, [&](int l) { return feeds_back(t, 0, l); }, [&](int l, int job) { send_feedback(l, 0, job); });
      exec_.sync_cluster();
      owners([&](int w, int l, int j) {
        if (moves(l, t)) move(w, l, j, own);
      });
      exec_.sync();
      jobs(kSend, lists && t >= steady, [&](int l) { return sends(t + 1, 0, l); }, [&](int l, int job) { send_share(l, job); });
      exec_.sync_cluster();
    }
    owners([&](int w, int l, int j) {
      predict(run_.steps, w, l, j, own);
      quads(w, own, [&](int c, int m, Owned& mine) { hand_in(l, j + c, m, mine); });
    });
    exec_.sync_cluster();  // no CTA leaves while another may still write to it
  }

 private:
  using Base = ClusterExchange<Exec, true>;
  using Own = typename Exec::template Own<Owned>;
  using Base::exec_, Base::run_, Base::plan_, Base::plan, Base::node, Base::last, Base::written, Base::from, Base::moves;
  using Base::place, Base::real, Base::blocks, Base::column, Base::at, Base::get, Base::put, Base::jobs, Base::refreshes, Base::sends;
  using Base::feeds_back, Base::from_when_steady, Base::send_block, Base::send_share, Base::send_feedback, Base::from_shares;
  using Base::added_up;
  using typename Base::Sums;
  template <class T>
  PC_HD T* here(int offset) const { return Base::template here<T>(offset); }

  // f(warp, layer, first column) for the warps that own a block
  template <class F>
  PC_HD void owners(const F& f) const {
    exec_.team([&](int w) {
      int l = 0, block = w;
      while (l < plan_.count && block >= blocks(l)) block -= blocks(l), ++l;
      if (l < plan_.count) f(w, l, block * kUnit);
    });
  }
  template <class F>
  PC_HD void quads(int w, Own& own, const F& f) const {
    exec_.quads([&](int c, int m) { f(c, m, own.of(w, c, m)); });
  }
  PC_HD bool list_jobs(int64_t t) const {
    const bool fits = this->list(kSend, [&](int l) { return sends(t + 1, 0, l); });
    return this->list(kFeedback, [&](int l) { return feeds_back(t, 0, l); }) && fits;
  }

  PC_HD void take_over(int l, int j, int m, Owned& mine) const {
    get(here<float>(plan(l).phi), j, m, mine.phi);
    get(here<float>(plan(l).mu), j, m, mine.mu);
    for (int i = 0; i < 4; ++i) {
      mine.velocity[i] = 0;
      mine.a[i] = real(l, column(j, i)) ? this->a(l, m + i % 2, column(j, i)) : 0.0f;
    }
  }

  // -------------------------------------------------------------------------------------------------------------------
  // a, mu, delta

  PC_HD void predict(int64_t t, int w, int l, int j, Own& own) const {
    const LayerPlan& p = plan(l);
    const auto found = [&](int c, int m, const Four& x) { advance(l, j + c, own.of(w, c, m), x); };
    if (l > 0 && refreshes(l, t) && p.narrow) {
      exec_.quads([&](int c, int m) { found(c, m, from_shares(l, j + c, m).x); });
    } else if (l > 0 && refreshes(l, t)) {
      exec_.multiply(here<Bf16>(p.weight) + j * p.pitch, p.pitch, here<Bf16>(p.gather), plan(l - 1).padded, found);
    }
    if (is_row_family(node(l).energy)) row_errors(t, w, l, j, own);
    else quads(w, own, [&](int c, int m, Owned& mine) { errors(t, l, j + c, m, mine); });
  }
  // a has changed by x, or is x but for the bias
  PC_HD void advance(int l, int j, Owned& mine, const Four& x) const {
    const ChainNode& d = node(l);
    for (int i = 0; i < 4; ++i) {
      if (!run_.differences) mine.a[i] = d.bias != nullptr && real(l, column(j, i)) ? d.bias[from(l) + column(j, i)] : 0.0f;
      mine.a[i] += x[i];
    }
    activate(d.activation, mine.a, mine.mu);
  }
  PC_HD void errors(int64_t t, int l, int j, int m, const Owned& mine) const {
    const ChainNode& d = node(l);
    const Four none = {0, 0, 0, 0};
    Four grad;
    grads_of<kGradMu>(d.energy, d.clamped, mine.phi, mine.mu, none, grad);
    finish_errors(t, l, j, m, mine, grad);
  }
  PC_HD void finish_errors(int64_t t, int l, int j, int m, const Owned& mine, Four& grad) const {
    const ChainNode& d = node(l);
    pull(d.activation, mine.a, mine.mu, grad);
    for (int i = 0; i < 4; ++i) grad[i] = real(l, column(j, i)) ? grad[i] : 0.0f;
    if (l > 0) put(here<Bf16>(plan(l).delta), j, m, grad);
    for (int i = 0; t == run_.steps && i < 4; ++i) {
      if (real(l, column(j, i)) && written(l, m + i % 2)) d.delta[place(l, m + i % 2, column(j, i))] = grad[i];
    }
  }

  // q - p of a categorical target that this warp has whole
  PC_HD void row_errors(int64_t t, int w, int l, int j, Own& own) const {
    float* mus = here<float>(plan(l).mu);
    quads(w, own, [&](int c, int m, Owned& mine) { put(mus, j + c, m, mine.mu); });
    exec_.sync_warp();
    quads(w, own, [&](int c, int m, Owned& mine) {
      Four grad;
      for (int i = 0; i < 2; ++i) {
        const Row row = row_of(mus, here<float>(plan(l).phi), plan(l).width, m + i);
        for (int k = i; k < 4; k += 2) {
          grad[k] = Categorical::target<kGradMu>(mine.phi[k], exp(mine.mu[k] - row.max) / row.sum, 0.0f, row.mass).grad_mu;
        }
      }
      finish_errors(t, l, j + c, m, mine, grad);
    });
    exec_.sync_warp();  // all have read mus
  }
  struct Row {
    float max, sum, mass;
  };
  PC_HD Row row_of(const float* mus, const float* target, int width, int m) const {
    Row row{-INFINITY, 0, 0};
    for (int k = 0; k < width; ++k) row.max = mus[at(k, m)] > row.max ? mus[at(k, m)] : row.max;
    for (int k = 0; k < width; ++k) row.sum += exp(mus[at(k, m)] - row.max), row.mass += target[at(k, m)];
    return row;
  }

  // -------------------------------------------------------------------------------------------------------------------
  // moves

  PC_HD void move(int w, int l, int j, Own& own) const {
    const auto moved = [&](int c, int m, const Four& x) {
      Four back = {x[0], x[1], x[2], x[3]};
      move_entries(l, j + c, m, own.of(w, c, m), back);
    };
    if (last(l)) return exec_.quads([&](int c, int m) { moved(c, m, Four{}); });
    const LayerPlan& above = plan(l + 1);
    if (above.narrow) {
      return exec_.multiply_across(here<Bf16>(above.weight) + j, above.pitch, here<Bf16>(above.delta), above.padded, 1, moved);
    }
    const auto sent = [&](int cta) { return above.first[cta + 1] > above.first[cta]; };
    exec_.quads([&](int c, int m) { moved(c, m, added_up(here<float>(above.receive), above.part, j + c, m, sent).x); });
    send_block(l + 1, j);
  }
  // phi of four entries; padding stays
  PC_HD void move_entries(int l, int j, int m, Owned& mine, Four& back) const {
    const ChainNode& d = node(l);
    const float floor = floor_of(d.energy);
    const Four none = {0, 0, 0, 0};
    Four before, now, way;
    direction(d, last(l), mine.phi, mine.mu, none, back, way);
    for (int i = 0; i < 4; ++i) {
      if (plan_.momentum) way[i] = mine.velocity[i] = way[i] + run_.momentum * mine.velocity[i];
      const float to = mine.phi[i] - d.lr * way[i];
      before[i] = mine.phi[i];
      now[i] = mine.phi[i] = !real(l, column(j, i)) ? before[i] : to < floor ? floor : to;
    }
    if (last(l)) return;
    feed_of(d, run_.differences, before, now);
    put(here<Bf16>(plan(l).moved), j, m, now);
  }

  PC_HD void hand_in(int l, int j, int m, const Owned& mine) const {
    const ChainNode& d = node(l);
    for (int i = 0; i < 4; ++i) {
      if (d.clamped || !real(l, column(j, i)) || !written(l, m + i % 2)) continue;
      d.phi[place(l, m + i % 2, column(j, i))] = mine.phi[i];
      if (!(mine.phi[i] - mine.phi[i] == 0.0f)) exec_.lower(run_.diverged, l + 1);
    }
  }
};

}  // namespace pc
