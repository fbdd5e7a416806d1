// SPDX-License-Identifier: MIT
// The cluster-resident kernel: T moves of a tile of 8 samples by the CTAs of a cluster; host and device.
//
// `Exec` is one CTA: its number, its shared memory and that of its peers, its threads (each, warps, rows, multiply) and the
// barriers of the CTA and of the cluster. On the GPU it is csrc/cuda/infer_cluster.cu's, on the CPU a test's. Where things lie:
// cluster_plan.h. In what order things happen, per round:
//     the new dv is sent to every CTA | a, delta of the layers | part by part: W^T delta is sent to its owners | they move phi
// with a cluster barrier at each bar: after it what was sent has arrived, and what was read may be overwritten.
#pragma once

#include "cluster_exchange.h"

namespace pc {

template <class Exec>
class ClusterBody : private ClusterExchange<Exec, false> {
 public:
  PC_HD ClusterBody(const Exec& exec, const ClusterRun& run, int64_t tile) : ClusterExchange<Exec, false>(exec, run, tile), rows_(false) {
    for (int l = 0; l < plan_.count; ++l) rows_ = rows_ || !plain(l) || needs_state_row(l);
  }

  PC_HD void solve() {
    this->begin();
    const int64_t steady = from_when_steady();
    const bool lists = plan_.rounds == 1 && plan_.parts == 1 && steady < run_.steps && list_jobs(steady);
    for (int64_t t = 0; t <= run_.steps; ++t) {
      for (int round = 0; round < plan_.rounds; ++round) step(t, round, lists && t >= steady && t < run_.steps);
    }
    finish();
  }

 private:
  using Base = ClusterExchange<Exec, false>;
  using Base::exec_, Base::run_, Base::plan_, Base::plan, Base::node, Base::last, Base::written, Base::from, Base::columns;
  using Base::moves, Base::place, Base::kept, Base::held, Base::real, Base::blocks, Base::held_columns, Base::phi, Base::mu;
  using Base::a, Base::log_var, Base::at, Base::column, Base::get, Base::put, Base::entries, Base::jobs, Base::plain;
  using Base::needs_state_row, Base::needs_prediction_row, Base::needs_dot, Base::send_state_row, Base::send_prediction_row;
  using Base::send_dot, Base::combine, Base::softmax_mu, Base::delta, Base::fed_softmax, Base::in, Base::refreshes, Base::sends;
  using Base::feeds_back, Base::sent_by_moves, Base::from_when_steady, Base::send_moved, Base::send_block, Base::send_share;
  using Base::send_feedback, Base::from_shares, Base::added_up;
  using typename Base::Sums;
  template <class T>
  PC_HD T* here(int offset) const { return Base::template here<T>(offset); }
  template <class T>
  PC_HD T* there(int cta, int offset) const { return Base::template there<T>(cta, offset); }

  // -------------------------------------------------------------------------------------------------------------------
  // a round

  // jobs of a layer in a round of move t
  PC_HD int predicts(int64_t t, int round, int l) const { return in(l, round) && refreshes(l, t) ? blocks(l) : 0; }
  PC_HD int corrects(int64_t t, int round, int l) const { return in(l, round) && plain(l) && !refreshes(l, t) ? blocks(l) : 0; }
  PC_HD int moves_below(int64_t t, int round, int part, int l) const { return in(l, round) && moves(l - 1, t) ? move_jobs(l, part) : 0; }
  PC_HD int moves_last(int64_t t, int round, int l) const { return in(l, round) && last(l) && moves(l, t) ? blocks(l) : 0; }

  PC_HD bool list_jobs(int64_t t) const {
    bool fits = this->list(kSend, [&](int l) { return sends(t, 0, l); });
    fits = this->list(kPredict, [&](int l) { return predicts(t, 0, l); }) && fits;
    fits = this->list(kCorrect, [&](int l) { return corrects(t, 0, l); }) && fits;
    fits = this->list(kFeedback, [&](int l) { return feeds_back(t, 0, l); }) && fits;
    fits = this->list(kMove, [&](int l) { return moves_below(t, 0, 0, l); }) && fits;
    return this->list(kMoveLast, [&](int l) { return moves_last(t, 0, l); }) && fits;
  }

  PC_HD void step(int64_t t, int round, bool listed) const {
    jobs(kSend, listed, [&](int l) { return sends(t, round, l); },
         [&](int l, int job) { plan(l).narrow ? send_share(l, job) : send_moved(l, job); });
    exec_.sync_cluster();
    jobs(kPredict, listed, [&](int l) { return predicts(t, round, l); }, [&](int l, int job) { predict(t, l, job); });
    if (rows_) {
      exec_.sync();
      row_errors(t, round);
    }
    jobs(kCorrect, listed, [&](int l) { return corrects(t, round, l); }, [&](int l, int job) { correct(t, l, job); });
    if (t == run_.steps) return exec_.sync_cluster();  // the next round gathers where this one did
    exec_.sync();
    for (int part = 0; part < plan_.parts; ++part) {
      if (part > 0) exec_.sync_cluster();
      jobs(kFeedback, listed, [&](int l) { return feeds_back(t, round, l); }, [&](int l, int job) { send_feedback(l, part, job); });
      exec_.sync_cluster();
      jobs(kMove, listed, [&](int l) { return moves_below(t, round, part, l); },
           [&](int l, int job) { plan(l).narrow ? move_under_narrow(l, job) : move_received(l, part, job); });
    }
    jobs(kMoveLast, listed, [&](int l) { return moves_last(t, round, l); }, [&](int l, int job) { move_last(l, job); });
    exec_.sync();
    if (rows_) refresh_rows(t, round);
  }

  PC_HD void predict(int64_t t, int l, int block) const {
    const LayerPlan& p = plan(l);
    if (p.narrow) return exec_.quads([&](int c, int m) { advance(t, l, block * kUnit + c, m, from_shares(l, block * kUnit + c, m).x); });
    const Bf16* weight = here<Bf16>(p.weight) + block * kUnit * p.pitch;
    exec_.multiply(weight, p.pitch, here<Bf16>(p.gather), plan(l - 1).padded,
                                   [&](int c, int m, const Four& x) { advance(t, l, block * kUnit + c, m, x); });
  }
  // a of four entries has changed by x, or is x but for the bias
  PC_HD void advance(int64_t t, int l, int j, int m, const Four& x) const {
    float* buffer = here<float>(plan(l).a);
    const float* bias = run_.differences ? nullptr : node(l).bias;
    Four now;
    get(buffer, j, m, now);
    for (int i = 0; i < 4; ++i) {
      if (!run_.differences) now[i] = bias != nullptr && real(l, column(j, i)) ? bias[from(l) + column(j, i)] : 0.0f;
      now[i] += x[i];
    }
    put(buffer, j, m, now);
    if (is_softmax(node(l).activation)) return;
    Four value;
    activate(node(l).activation, now, value);
    put(here<float>(plan(l).mu), j, m, value);
    if (plain(l)) plain_errors(t, l, j, m, now, value);
  }

  // delta of the layers whose entries take part in each other's
  PC_HD void row_errors(int64_t t, int round) const {
    const auto whole = [&](int l) { return in(l, round) && needs_prediction_row(l); };
    bool any = false, sum = false;
    for (int l = 1; l < plan_.count; ++l) {
      if (!whole(l)) continue;
      send_prediction_row(l);
      any = any || !plan(l).narrow, sum = sum || (needs_dot(l) && !plan(l).narrow);
    }
    if (any) exec_.sync_cluster();
    for (int l = 1; l < plan_.count; ++l) {
      if (!whole(l)) continue;
      combine(l, kPrediction);
      if (is_softmax(node(l).activation)) softmax_mu(l);
      if (needs_dot(l)) send_dot(l);
    }
    if (sum) exec_.sync_cluster();
    for (int l = 1; l < plan_.count; ++l) {
      if (whole(l)) row_delta(t, l);
    }
  }
  PC_HD void row_delta(int64_t t, int l) const {
    if (needs_dot(l)) combine(l, kDot);
    Bf16* own = here<Bf16>(plan(l).delta);
    float* out = t == run_.steps ? node(l).delta : nullptr;
    entries(l, [&](int m, int j) {
      const float found = delta(l, m, j);
      own[at(j, m)] = to_bf16(found);
      if (out != nullptr && written(l, m)) out[place(l, m, j)] = found;
    });
  }
  // a block that `advance` has not left behind: a has stayed, but phi may have moved
  PC_HD void correct(int64_t t, int l, int block) const {
    exec_.quads([&](int c, int m) {
      Four pre, value;
      get(here<float>(plan(l).a), block * kUnit + c, m, pre);
      get(here<float>(plan(l).mu), block * kUnit + c, m, value);
      plain_errors(t, l, block * kUnit + c, m, pre, value);
    });
  }
  // delta of four entries that hang together with no others
  PC_HD void plain_errors(int64_t t, int l, int j, int m, const Four& pre, const Four& value) const {
    const ChainNode& d = node(l);
    Four state, grad, variance = {0, 0, 0, 0};
    get(here<float>(plan(l).phi), j, m, state);
    bool keep[4];
    for (int i = 0; i < 4; ++i) {
      keep[i] = real(l, column(j, i)) && kept(l, m + i % 2, column(j, i));
      if (!keep[i]) state[i] = value[i];
      if (d.log_var != nullptr && keep[i]) variance[i] = log_var(l, column(j, i));
    }
    grads_of<kGradMu>(d.energy, d.clamped, state, value, variance, grad);
    pull(d.activation, pre, value, grad);
    for (int i = 0; i < 4; ++i) grad[i] = keep[i] ? grad[i] : 0.0f;
    put(here<Bf16>(plan(l).delta), j, m, grad);
    if (t != run_.steps) return;
    for (int i = 0; i < 4; ++i) {
      if (real(l, column(j, i)) && written(l, m + i % 2)) d.delta[place(l, m + i % 2, column(j, i))] = grad[i];
    }
  }

  // -------------------------------------------------------------------------------------------------------------------
  // moves

  PC_HD int move_jobs(int l, int part) const {  // of the node below, which a layer's feedback moves
    if (plan(l).narrow) return part == 0 ? blocks(l - 1) : 0;
    const int left = held_columns(l - 1) - part * plan(l).part;
    return (left < plan(l).part ? (left > 0 ? left : 0) : plan(l).part) / kUnit;
  }
  PC_HD void move_received(int l, int part, int block) const {
    const LayerPlan& p = plan(l);
    const int begin = part * p.part;
    exec_.quads([&](int c, int m) {
      const auto sent = [&](int cta) { return p.first[cta + 1] > p.first[cta]; };
      Sums back = added_up(here<float>(p.receive), p.part, block * kUnit + c, m, sent);
      move(l - 1, begin + block * kUnit + c, m, back.x);
    });
    if (sent_by_moves(l)) send_block(l, begin + block * kUnit);
  }
  PC_HD void move_under_narrow(int l, int block) const {
    const LayerPlan& p = plan(l);
    exec_.multiply_across(here<Bf16>(p.weight) + block * kUnit, p.pitch, here<Bf16>(p.delta), p.padded, 1, [&](int c, int m, const Four& x) {
      Four back = {x[0], x[1], x[2], x[3]};
      move(l - 1, block * kUnit + c, m, back);
    });
  }
  PC_HD void move_last(int l, int block) const {
    exec_.quads([&](int c, int m) {
      Four none = {0, 0, 0, 0};
      move(l, block * kUnit + c, m, none);
    });
  }

  // phi of four entries; what is masked, held or padding stays
  PC_HD void move(int l, int j, int m, Four& back) const {
    const ChainNode& d = node(l);
    const LayerPlan& p = plan(l);
    const float floor = floor_of(d.energy);
    Four before, now, way, value, variance = {0, 0, 0, 0};
    get(here<float>(p.phi), j, m, before);
    get(here<float>(p.mu), j, m, value);
    for (int i = 0; i < 4; ++i) variance[i] = d.log_var != nullptr && real(l, column(j, i)) ? log_var(l, column(j, i)) : 0.0f;
    direction(d, last(l), before, value, variance, back, way);
    if (p.velocity != kNowhere) {
      Four velocity;
      get(here<float>(p.velocity), j, m, velocity);
      for (int i = 0; i < 4; ++i) way[i] += run_.momentum * velocity[i];
      put(here<float>(p.velocity), j, m, way);
    }
    for (int i = 0; i < 4; ++i) {
      const float to = before[i] - d.lr * way[i];
      const bool stays = !real(l, column(j, i)) || !kept(l, m + i % 2, column(j, i)) || held(l, m + i % 2, column(j, i));
      now[i] = stays ? before[i] : to < floor ? floor : to;
    }
    put(here<float>(p.phi), j, m, now);
    if (p.moved == kNowhere || is_softmax(d.feed)) return;
    feed_of(d, run_.differences, before, now);
    put(here<Bf16>(p.moved), j, m, now);
  }
  // row statistics of the states that have moved, and what they feed on
  PC_HD void refresh_rows(int64_t t, int round) const {
    bool any = false, across = false;
    for (int l = 0; l < plan_.count; ++l) {
      if (!row_moved(l, t, round)) continue;
      send_state_row(l);
      any = true, across = across || !plan(l).narrow;
    }
    if (!any) return;
    if (across) exec_.sync_cluster();
    for (int l = 0; l < plan_.count; ++l) {
      if (!row_moved(l, t, round)) continue;
      combine(l, kState);
      if (plan(l).fed != kNowhere) entries(l, [&](int m, int j) { feed_softmax(l, m, j); });
    }
  }
  PC_HD bool row_moved(int l, int64_t t, int round) const {
    return needs_state_row(l) && moves(l, t) && plan(last(l) ? l : l + 1).round == round;
  }
  PC_HD void feed_softmax(int l, int m, int j) const {
    float& before = here<float>(plan(l).fed)[at(j, m)];
    const float now = fed_softmax(l, m, j);
    here<Bf16>(plan(l).moved)[at(j, m)] = to_bf16(run_.differences ? now - before : now);
    before = now;
  }

  // -------------------------------------------------------------------------------------------------------------------
  // after the last move: the first layer's delta, which no product needs, and the states

  PC_HD void finish() const {
    if (needs_dot(0)) {
      send_dot(0);
      exec_.sync_cluster();
      combine(0, kDot);
    }
    for (int l = 0; l < plan_.count; ++l) {
      entries(l, [&](int m, int j) {
        if (!written(l, m)) return;
        if (l == 0) node(0).delta[place(0, m, j)] = delta(0, m, j);
        if (node(l).clamped) return;
        const float state = phi(l, m, j);
        node(l).phi[place(l, m, j)] = state;
        if (!(state - state == 0.0f)) exec_.lower(run_.diverged, l + 1);
      });
    }
    exec_.sync_cluster();  // no CTA leaves while another may still write to it
  }

  bool rows_;  // whether any node needs whole rows
};

}  // namespace pc
