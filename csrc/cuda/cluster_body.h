// SPDX-License-Identifier: MIT
// The cluster-resident kernel: T moves of a tile of 16 samples by the CTAs of a cluster; host and device.
//
// `Exec` is one CTA: its number, its shared memory and that of its peers, its threads (each, rows, the two products: all of
// them split the work over the threads and end with a barrier of the CTA) and the barrier of the cluster. On the GPU it is
// csrc/cuda/infer_cluster.cu's, on the CPU a test's. Where things lie: cluster_plan.h. In what order things happen, per round:
//     the new dv is sent to every CTA | a, delta of the layers | part by part: W^T delta is sent to its owners | they move phi
// with a cluster barrier at each bar: after it what was sent has arrived, and what was read may be overwritten.
#pragma once

#include "cluster_view.h"

namespace pc {

template <class Exec>
class ClusterBody : private ClusterView<Exec> {
 public:
  PC_HD ClusterBody(const Exec& exec, const ClusterRun& run, int64_t tile) : ClusterView<Exec>(exec, run, tile) {}

  PC_HD void solve() {
    load();
    for (int64_t t = 0; t <= run_.steps; ++t) {
      for (int64_t round = 0; round < plan_.rounds; ++round) step(t, round);
    }
    finish();
  }

 private:
  using Base = ClusterView<Exec>;
  using Base::exec_, Base::run_, Base::plan_, Base::plan, Base::node, Base::last, Base::written, Base::from, Base::columns;
  using Base::stats, Base::stat, Base::moves, Base::place, Base::kept, Base::held, Base::phi, Base::a, Base::log_var, Base::mu;
  using Base::entries;
  template <class T>
  PC_HD T* here(int64_t offset) const { return Base::template here<T>(offset); }
  template <class T>
  PC_HD T* there(int cta, int64_t offset) const { return Base::template there<T>(cta, offset); }

  // -------------------------------------------------------------------------------------------------------------------
  // rows, which lie across the cluster: send this CTA's part to all, later add up everybody's

  // x(m, j): an entry; masked: whether the node's mask keeps entries out
  template <class X>
  PC_HD void send_softmax(int64_t l, Stat which, bool masked, const X& x) const {
    const int64_t n = columns(l);
    exec_.rows([&](int m, const auto& team) {
      float most = -INFINITY, sum = 0;
      for (int64_t j = team.rank; j < n; j += team.size) {
        const float got = x(m, j);
        most = (!masked || kept(l, m, j)) && got > most ? got : most;
      }
      most = team.max(most);
      for (int64_t j = team.rank; j < n; j += team.size) sum += !masked || kept(l, m, j) ? exp(x(m, j) - most) : 0.0f;
      send(team, l, which, m, {most, team.sum(sum)});
    });
  }
  template <class X>
  PC_HD void send_sum(int64_t l, Stat which, const X& x) const {
    const int64_t n = columns(l);
    exec_.rows([&](int m, const auto& team) {
      float sum = 0;
      for (int64_t j = team.rank; j < n; j += team.size) sum += kept(l, m, j) ? x(m, j) : 0.0f;
      send(team, l, which, m, {0.0f, team.sum(sum)});
    });
  }
  template <class Team>
  PC_HD void send(const Team& team, int64_t l, Stat which, int m, const RowPair& part) const {
    for (int c = team.rank; c < kCluster; c += team.size) stats(c, l, which, exec_.cta)[m] = part;
  }
  PC_HD void combine(int64_t l, Stat which) const {
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

  // -------------------------------------------------------------------------------------------------------------------
  // before the first move

  PC_HD void load() const {
    float* words = here<float>(0);
    exec_.each(static_cast<int>(plan_.bytes / 4), [&](int i) { words[i] = 0.0f; });  // padding takes part in the products
    for (int64_t l = 0; l < plan_.count; ++l) {
      const LayerPlan& p = plan(l);
      if (l > 0) load_weight(l);
      entries(l, [&](int m, int64_t j) {
        if (!node(l).clamped) here<float>(p.phi)[m * p.slice + j] = node(l).start[place(l, m, j)];
        if (l > 0) here<float>(p.a)[m * p.slice + j] = node(l).first_a[place(l, m, j)];
      });
    }
    exec_.sync_cluster();  // every CTA of the cluster runs, and its memory is ready
    for (int64_t l = 0; l < plan_.count; ++l) {
      if (needs_state_row(l)) send_state_row(l);
      if (needs_prediction_row(0) && l == 0) send_prediction_row(0);
    }
    exec_.sync_cluster();
    for (int64_t l = 0; l < plan_.count; ++l) {
      if (needs_state_row(l)) combine(l, kState);
      if (needs_prediction_row(0) && l == 0) combine(0, kPrediction);
      if (plan(l).fed != kNowhere) entries(l, [&](int m, int64_t j) { keep_fed(l, m, j, fed_softmax(l, m, j)); });
      if (plan(l).moved != kNowhere && !run_.differences) entries(l, [&](int m, int64_t j) { feed_first(l, m, j); });
    }
  }

  PC_HD void load_weight(int64_t l) const {
    const int rows = static_cast<int>(columns(l)), inputs = static_cast<int>(plan(l - 1).width);
    Bf16* to = here<Bf16>(plan(l).weight);
    const float* weight = node(l).weight + from(l) * inputs;
    exec_.each(rows * inputs, [&](int i) { to[i / inputs * plan(l).pitch + i % inputs] = to_bf16(weight[i]); });
  }

  PC_HD bool needs_state_row(int64_t l) const {
    return plan(l).fed != kNowhere || (is_row_family(node(l).energy) && !node(l).clamped);
  }
  PC_HD bool needs_prediction_row(int64_t l) const { return is_softmax(node(l).activation) || is_row_family(node(l).energy); }
  PC_HD bool needs_dot(int64_t l) const {
    return is_softmax(node(l).activation) || (is_row_family(node(l).energy) && node(l).clamped);
  }
  PC_HD void send_state_row(int64_t l) const {
    send_softmax(l, kState, true, [&](int m, int64_t j) { return phi(l, m, j); });
  }
  // of a, where it is the activation that normalises; else of mu
  PC_HD void send_prediction_row(int64_t l) const {
    const bool raw = is_softmax(node(l).activation);
    send_softmax(l, kPrediction, !raw, [&](int m, int64_t j) { return raw ? a(l, m, j) : mu(l, m, j); });
  }

  // -------------------------------------------------------------------------------------------------------------------
  // a round

  PC_HD bool in(int64_t l, int64_t round) const { return plan(l).round == round; }
  PC_HD bool refreshes(int64_t l, int64_t t) const { return t > 0 && moves(l - 1, t - 1); }  // a_l has changed

  PC_HD void step(int64_t t, int64_t round) const {
    for (int64_t l = 1; l < plan_.count; ++l) {
      if (in(l, round) && refreshes(l, t)) send_moved(l);
    }
    exec_.sync_cluster();
    for (int64_t l = 1; l < plan_.count; ++l) {
      if (in(l, round) && refreshes(l, t)) predict(l);
    }
    errors(t, round);
    if (t == run_.steps) return exec_.sync_cluster();  // the next round gathers where this one did
    for (int64_t part = 0; part < plan_.parts; ++part) {
      if (part > 0) exec_.sync_cluster();
      for (int64_t l = 1; l < plan_.count; ++l) {
        if (in(l, round) && moves(l - 1, t)) send_feedback(l, part);
      }
      exec_.sync_cluster();
      for (int64_t l = 1; l < plan_.count; ++l) {
        if (in(l, round) && moves(l - 1, t)) move_part(l - 1, l, part);
      }
    }
    for (int64_t l = 1; l < plan_.count; ++l) {
      if (in(l, round) && last(l) && moves(l, t)) move_columns(l, 0, plan(l).slice, [](int, int64_t) { return 0.0f; });
    }
    refresh_rows(t, round);
  }

  // to all CTAs, eight columns at a time; each begins with another one, so that not all write to the same
  PC_HD void send_moved(int64_t l) const {
    const LayerPlan &p = plan(l), &below = plan(l - 1);
    const Bf16* own = here<Bf16>(below.moved);
    const int64_t first = from(l - 1);
    const int eights = static_cast<int>(below.first[exec_.cta + 1] - first) / 8, each = kTile * eights;
    exec_.each(kCluster * each, [&](int i) {
      const int to = (exec_.cta + i / each) % kCluster, m = i % each / eights, j = i % eights * 8;
      Bf16* gather = there<Bf16>(to, p.gather) + m * p.pitch + first + j;
      *reinterpret_cast<Eight*>(gather) = *reinterpret_cast<const Eight*>(own + m * below.slice + j);
    });
  }

  PC_HD void predict(int64_t l) const {
    const LayerPlan& p = plan(l);
    float* out = here<float>(p.a);
    const float* bias = node(l).bias;
    const int64_t own = columns(l);
    const int64_t tiles = (own + 7) / 8;
    exec_.product(here<Bf16>(p.gather), p.pitch, here<Bf16>(p.weight), p.pitch, plan(l - 1).padded, tiles,
                  [](int64_t tile) { return 8 * tile; },
                  [&](int m, int64_t j, float x) {
                    float& to = out[m * p.slice + j];
                    to = run_.differences ? to + x : x + (bias != nullptr && j < own ? bias[from(l) + j] : 0.0f);
                  });
  }

  // delta of the layers of a round, from the present a and phi
  PC_HD void errors(int64_t t, int64_t round) const {
    bool exchange = false, sum = false;
    for (int64_t l = 1; l < plan_.count; ++l) {
      if (!in(l, round) || !needs_prediction_row(l)) continue;
      send_prediction_row(l);
      exchange = true, sum = sum || needs_dot(l);
    }
    if (exchange) exec_.sync_cluster();
    for (int64_t l = 1; l < plan_.count; ++l) {
      if (!in(l, round) || !needs_prediction_row(l)) continue;
      combine(l, kPrediction);
      if (needs_dot(l)) send_dot(l);
    }
    if (sum) exec_.sync_cluster();
    for (int64_t l = 1; l < plan_.count; ++l) {
      if (!in(l, round)) continue;
      if (needs_dot(l)) combine(l, kDot);
      Bf16* own = here<Bf16>(plan(l).delta);
      float* out = t == run_.steps ? node(l).delta : nullptr;
      entries(l, [&](int m, int64_t j) {
        const float found = delta(l, m, j);
        own[m * plan(l).delta_pitch + j] = to_bf16(found);
        if (out != nullptr && written(m)) out[place(l, m, j)] = found;
      });
    }
  }

  PC_HD void send_dot(int64_t l) const {
    const ClusterNode& d = node(l);
    send_sum(l, kDot, [&](int m, int64_t j) {
      if (is_row_family(d.energy)) return phi(l, m, j);  // the target's mass
      const float value = mu(l, m, j), state = phi(l, m, j);
      if (d.energy == Energy::categorical_probs) return value - state;
      return value * entry_of<kGradMu>(d.energy, d.clamped, state, value, log_var(l, j)).grad_mu;
    });
  }

  PC_HD float delta(int64_t l, int m, int64_t j) const {
    const ClusterNode& d = node(l);
    const bool keep = kept(l, m, j);
    const float value = mu(l, m, j), state = keep ? phi(l, m, j) : value;  // an entry without a part has no error
    if (is_softmax(d.activation)) {  // all entries of a normalised row hang together, those without a part too
      const float dot = stat(l, kDot, m).sum;
      if (d.energy == Energy::categorical_probs) return CategoricalProbs::softmax_delta(state, value, dot);
      const float grad = entry_of<kGradMu>(d.energy, d.clamped, state, value, log_var(l, j)).grad_mu;
      return Softmax::vjp(value, keep ? grad : 0.0f, dot);
    }
    if (!keep) return 0.0f;
    const float grad = is_row_family(d.energy) ? categorical_grad(l, m, state, value)
                                               : entry_of<kGradMu>(d.energy, d.clamped, state, value, log_var(l, j)).grad_mu;
    return pulled(d.activation, a(l, m, j), value, grad);
  }

  // q - p. The ratio is rounded once more than in node_lines.h, which exchanges one more sum for a fixed point that is exactly
  // zero: bfloat16 would not show it.
  PC_HD float categorical_grad(int64_t l, int m, float state, float value) const {
    const RowPair bottom = stat(l, kPrediction, m);
    const float q = exp(value - bottom.max) / bottom.sum;
    if (node(l).clamped) return Categorical::target<kGradMu>(state, q, 0.0f, stat(l, kDot, m).sum).grad_mu;
    const RowPair top = stat(l, kState, m);
    const float p = exp(state - top.max) / top.sum;
    const float ratio = (state - value) - (top.max - bottom.max) - (log(top.sum) - log(bottom.sum));
    return Categorical::free<kGradMu>(p, q, ratio).grad_mu;
  }

  // this CTA's share of W_l^T delta_l, a part of every owner's columns at a time
  PC_HD void send_feedback(int64_t l, int64_t part) const {
    const LayerPlan &p = plan(l), &below = plan(l - 1);
    const int64_t each = p.part / 8, begin = part * p.part;
    const auto column = [&](int64_t tile) {  // of node l-1; past the owner's slice: none
      const int64_t owner = tile / each, within = begin + tile % each * 8;
      return below.first[owner] + within < below.first[owner + 1] ? below.first[owner] + within : kNowhere;
    };
    exec_.product_transposed(here<Bf16>(p.delta), p.delta_pitch, here<Bf16>(p.weight), p.pitch,
                             plan(l).first[exec_.cta + 1] - from(l), kCluster * each, column, [&](int m, int64_t k, int64_t tile, float x) {
                               const int owner = static_cast<int>(tile / each);
                               float* receive = there<float>(owner, p.receive) + exec_.cta * kTile * p.part;
                               receive[m * p.part + (k - below.first[owner] - begin)] = x;
                             });
  }

  // moves the columns of node l whose feedback from layer `above` has come, a part
  PC_HD void move_part(int64_t l, int64_t above, int64_t part) const {
    const int64_t width = plan(above).part, begin = part * width;
    const float* receive = here<float>(plan(above).receive);
    move_columns(l, begin, begin + width, [&](int m, int64_t j) {
      float back = 0;
      for (int c = 0; c < kCluster; ++c) back += receive[(c * kTile + m) * width + (j - begin)];
      return back;
    });
  }

  template <class Back>
  PC_HD void move_columns(int64_t l, int64_t begin, int64_t end, const Back& feedback) const {
    const ClusterNode& d = node(l);
    const LayerPlan& p = plan(l);
    const float floor = d.energy == Energy::categorical_probs ? static_cast<float>(kProbabilityFloor) : -INFINITY;
    entries(l, begin, end, [&](int m, int64_t j) {
      if (!kept(l, m, j) || held(l, m, j)) return;
      float& state = here<float>(p.phi)[m * p.slice + j];
      const float value = mu(l, m, j), back = feedback(m, j), before = state;
      float u = direction(l, m, j, value, back);
      if (p.velocity != kNowhere) {
        float& velocity = here<float>(p.velocity)[m * p.slice + j];
        velocity = u = run_.momentum * velocity + u;
      }
      const float to = before - d.lr * u;
      state = to < floor ? floor : to;
      if (p.moved == kNowhere || is_softmax(d.feed)) return;
      const Activation feed = static_cast<Activation>(d.feed);
      const float now = activated(feed, state);
      here<Bf16>(p.moved)[m * p.slice + j] = to_bf16(run_.differences ? now - activated(feed, before) : now);
    });
  }

  PC_HD float direction(int64_t l, int m, int64_t j, float value, float back) const {
    const ClusterNode& d = node(l);
    const float state = phi(l, m, j);
    if (d.natural) return (state - value) + back;
    const float own = entry_of<kGradPhi>(d.energy, false, state, value, log_var(l, j)).grad_phi;
    if (last(l)) return own;
    const Activation feed = static_cast<Activation>(d.feed);
    return own + pulled(feed, state, activated(feed, state), back);
  }

  // row statistics of the states that have moved, and what they feed on
  PC_HD void refresh_rows(int64_t t, int64_t round) const {
    bool any = false;
    for (int64_t l = 0; l < plan_.count; ++l) any = any || row_moved(l, t, round);
    if (!any) return;
    for (int64_t l = 0; l < plan_.count; ++l) {
      if (row_moved(l, t, round)) send_state_row(l);
    }
    exec_.sync_cluster();
    for (int64_t l = 0; l < plan_.count; ++l) {
      if (!row_moved(l, t, round)) continue;
      combine(l, kState);
      if (plan(l).fed != kNowhere) entries(l, [&](int m, int64_t j) { feed_softmax(l, m, j); });
    }
  }
  PC_HD bool row_moved(int64_t l, int64_t t, int64_t round) const {
    return needs_state_row(l) && moves(l, t) && plan(last(l) ? l : l + 1).round == round;
  }
  PC_HD float fed_softmax(int64_t l, int m, int64_t j) const {
    const RowPair row = stat(l, kState, m);
    return kept(l, m, j) ? exp(phi(l, m, j) - row.max) / row.sum : 0.0f;
  }
  PC_HD void keep_fed(int64_t l, int m, int64_t j, float value) const { here<float>(plan(l).fed)[m * plan(l).slice + j] = value; }
  PC_HD void feed_first(int64_t l, int m, int64_t j) const {  // entries that never move are fed on, too
    const int feed = node(l).feed;
    const float v = is_softmax(feed) ? fed_softmax(l, m, j) : activated(static_cast<Activation>(feed), phi(l, m, j));
    here<Bf16>(plan(l).moved)[m * plan(l).slice + j] = to_bf16(v);
  }
  PC_HD void feed_softmax(int64_t l, int m, int64_t j) const {
    const LayerPlan& p = plan(l);
    const float now = fed_softmax(l, m, j), before = here<float>(p.fed)[m * p.slice + j];
    here<Bf16>(p.moved)[m * p.slice + j] = to_bf16(run_.differences ? now - before : now);
    keep_fed(l, m, j, now);
  }

  // -------------------------------------------------------------------------------------------------------------------
  // after the last move: the first layer's delta, which no product needs, and the states

  PC_HD void finish() const {
    if (needs_dot(0)) {
      send_dot(0);
      exec_.sync_cluster();
      combine(0, kDot);
    }
    for (int64_t l = 0; l < plan_.count; ++l) {
      entries(l, [&](int m, int64_t j) {
        if (!written(m)) return;
        if (l == 0) node(0).delta[place(0, m, j)] = delta(0, m, j);
        if (node(l).clamped) return;
        const float state = phi(l, m, j);
        node(l).phi[place(l, m, j)] = state;
        if (!(state - state == 0.0f)) exec_.lower(run_.diverged, l + 1);
      });
    }
    exec_.sync_cluster();  // no CTA leaves while another may still write to it
  }

};

}  // namespace pc
