// SPDX-License-Identifier: MIT
// Schedule (a): what a block does in each launch; host and device. See layers_plan.h. `Exec` is the block: its tile product and
// its threads. On the GPU it is infer_layers.cu's, on the CPU a test's.
#pragma once

#include "layers_plan.h"
#include "node_table.h"

namespace pc {

template <class T>  // of the operands
struct LayersBody {
  const LayersRun& run;
  int64_t t;

  PC_HD const NodePlan& plan(int64_t l) const { return run.plan[l]; }
  PC_HD const LayersNode& node(int64_t l) const { return run.nodes[l]; }
  PC_HD bool last(int64_t l) const { return l + 1 == run.count; }
  PC_HD bool differences() const { return in_differences(run.products); }
  template <class S>
  PC_HD S* array(int64_t offset) const { return offset < 0 ? nullptr : reinterpret_cast<S*>(run.work + offset); }

  // f(l, number within the layer) for the block-th block of a launch
  template <class F>
  PC_HD void find(Phase phase, int64_t block, const F& f) const {
    for (int64_t l = 0; l < run.count; ++l) {
      const int64_t some = blocks_of(run, phase, l, t);
      if (block < some) return f(l, block);
      block -= some;
    }
  }

  // -------------------------------------------------------------------------------------------------------------------
  // four neighbours (m, j) to (m, j + 3) of an array with padded rows

  PC_HD static void get(const float* from, Four& x) {
    const Packed<float> got = *reinterpret_cast<const Packed<float>*>(from);
    for (int i = 0; i < 4; ++i) x[i] = got.x[i];
  }
  template <class S>
  PC_HD static void put(S* to, const Four& x) {
    Packed<S> packed;
    for (int i = 0; i < 4; ++i) narrow(x[i], packed.x[i]);
    *reinterpret_cast<Packed<S>*>(to) = packed;
  }
  PC_HD void log_vars(int64_t l, int64_t j, Four& x) const {
    const float* from = node(l).log_var;
    for (int i = 0; i < 4; ++i) x[i] = from != nullptr && j + i < plan(l).width ? from[j + i] : 0.0f;
  }
  PC_HD bool kept(int64_t l, int64_t m, int64_t j) const {
    return j < plan(l).width && (node(l).mask == nullptr || node(l).mask[m * node(l).mask_sample + j]);
  }
  PC_HD bool held(int64_t l, int64_t m, int64_t j) const {
    return node(l).hold != nullptr && node(l).hold[m * node(l).hold_sample + j];
  }

  // -------------------------------------------------------------------------------------------------------------------
  // before the first move: x and weights into their places, then the forward pass, layer by layer

  PC_HD void copy_x(int64_t m, int64_t k) const { array<float>(run.inputs)[m * plan(0).inputs_ld + k] = run.x[m * plan(0).inputs + k]; }
  PC_HD void copy_weight(int64_t l, int64_t row, int64_t k) const {
    const NodePlan& p = plan(l);
    const float w = node(l).weight[row * p.inputs + k];
    array<float>(p.exact)[row * p.inputs_ld + k] = w;
    if (p.weight >= 0 && p.weight != p.exact) narrow(w, array<T>(p.weight)[row * p.inputs_ld + k]);
  }
  PC_HD bool by_rows(int64_t l) const { return plan(l).rows_predict || plan(l).rows_update; }

  template <class Exec>
  PC_HD void start(const Exec& exec, int64_t l, int64_t tile) const {
    const NodePlan& p = plan(l);
    const int64_t across = (p.width + kColumnsOfTile - 1) / kColumnsOfTile;
    const int64_t m = tile / across * kRowsOfTile, j = tile % across * kColumnsOfTile;
    const float* below = array<float>(l > 0 ? plan(l - 1).fed : run.inputs);
    exec.multiply_rounded(below + m * p.inputs_ld, p.inputs_ld, array<float>(p.exact) + j * p.inputs_ld, p.inputs_ld, p.inputs_ld, run.products);
    exec.quads([&](int row, int column, const Four& x) {
      if (m + row < run.batch && j + column < p.width) started(l, m + row, j + column, x);
    });
  }
  PC_HD void started(int64_t l, int64_t m, int64_t j, const Four& x) const {
    const NodePlan& p = plan(l);
    const float* bias = node(l).bias;
    Four a, mu, phi, v;
    for (int i = 0; i < 4; ++i) a[i] = j + i < p.width ? x[i] + (bias == nullptr ? 0.0f : bias[j + i]) : 0.0f;
    put(array<float>(p.a) + m * p.ld + j, a);
    if (by_rows(l)) return;
    activate(node(l).activation, a, mu);
    for (int i = 0; i < 4; ++i) phi[i] = j + i < p.width ? first_state(l, m, j + i, mu[i]) : 0.0f;
    put(array<float>(p.mu) + m * p.ld + j, mu), put(array<float>(p.phi) + m * p.ld + j, phi);
    if (p.passes == 0) return;
    if (!passes_target(node(l))) activate(static_cast<Activation>(node(l).feed), phi, v);
    for (int i = 0; i < 4; ++i) v[i] = j + i >= p.passes ? 0.0f : passes_target(node(l)) ? phi[i] : v[i];
    put(array<float>(p.fed) + m * p.passes_ld + j, v);
    if (!differences()) put(array<T>(p.v) + m * p.passes_ld + j, v);
  }
  PC_HD int64_t states(int64_t l) const {  // of phi: the target of a pair is one number
    return node(l).clamped && node(l).energy == Energy::gaussian_full ? plan(l).width / 2 : plan(l).width;
  }
  PC_HD float first_state(int64_t l, int64_t m, int64_t j, float mu) const {
    const LayersNode& d = node(l);
    const float state = d.start == nullptr ? mu : d.start[m * states(l) + j], floor = floor_of(d.energy);
    return !d.clamped && state < floor ? floor : state;
  }
  template <class Team>
  PC_HD void start_row(const Team& team, int64_t l, int64_t m) const {
    const LayersNode& d = node(l);
    const NodePlan& p = plan(l);
    const Line<float> line = this->line(l, m);
    float *mu = array<float>(p.mu) + m * p.ld, *phi = array<float>(p.phi) + m * p.ld;
    predict_mu(team, l, m);
    team.sync();
    for (int64_t j = team.rank; d.index == nullptr && j < states(l); j += team.size) phi[j] = first_state(l, m, j, mu[j]);
    team.sync();
    if (!passes_target(d)) {
      if (!last(l)) feed_row(team, l, m, line);
      return;
    }
    for (int64_t j = team.rank; j < p.passes; j += team.size) {
      array<float>(p.fed)[m * p.passes_ld + j] = phi[j];
      if (!differences()) narrow(phi[j], array<T>(p.v)[m * p.passes_ld + j]);
    }
  }
  template <class Team>
  PC_HD void predict_mu(const Team& team, int64_t l, int64_t m) const {
    const NodePlan& p = plan(l);
    const float* a = array<float>(p.a) + m * p.ld;
    float* mu = array<float>(p.mu) + m * p.ld;
    const bool softmax = is_softmax(node(l).activation);
    Line<float> whole{};
    whole.n = p.width;
    const RowSoftmax row = softmax ? row_softmax(team, whole, a) : RowSoftmax{};
    for (int64_t j = team.rank; j < p.width; j += team.size) mu[j] = softmax ? row.p(true, a[j]) : activated(node(l).activation, a[j]);
  }

  // -------------------------------------------------------------------------------------------------------------------
  // tiles

  template <class Exec>
  PC_HD void predict(const Exec& exec, int64_t l, int64_t tile) const {
    const int64_t across = (plan(l).width + kColumnsOfTile - 1) / kColumnsOfTile;
    const int64_t m = tile / across * kRowsOfTile, j = tile % across * kColumnsOfTile;
    const bool fresh = refreshed_at(run, l, t);
    if (fresh) {
      const int64_t pitch = plan(l).inputs_ld;
      exec.template multiply<false>(array<T>(plan(l - 1).v) + m * pitch, pitch, array<T>(plan(l).weight) + j * pitch, pitch, pitch, run.products);
    }
    exec.quads([&](int row, int column, const Four& x) {
      if (m + row < run.batch && j + column < plan(l).width) predicted(l, m + row, j + column, fresh, x);
    });
  }
  // a of four entries has changed by x, or is x but for the bias, or (not fresh) is as it was
  PC_HD void predicted(int64_t l, int64_t m, int64_t j, bool fresh, const Four& x) const {
    const NodePlan& p = plan(l);
    Four a, mu;
    get(array<float>(p.a) + m * p.ld + j, a);
    for (int i = 0; fresh && i < 4; ++i) {
      const float base = differences() ? a[i] : node(l).bias != nullptr && j + i < p.width ? node(l).bias[j + i] : 0.0f;
      a[i] = j + i < p.width ? base + x[i] : 0.0f;
    }
    if (fresh) put(array<float>(p.a) + m * p.ld + j, a);
    if (p.rows_predict) return;
    activate(node(l).activation, a, mu);
    put(array<float>(p.mu) + m * p.ld + j, mu);
    errors(l, m, j, a, mu);
  }
  PC_HD void errors(int64_t l, int64_t m, int64_t j, const Four& a, const Four& mu) const {
    const NodePlan& p = plan(l);
    Four phi, variance, grad;
    get(array<float>(p.phi) + m * p.ld + j, phi);
    log_vars(l, j, variance);
    for (int i = 0; i < 4; ++i) phi[i] = kept(l, m, j + i) ? phi[i] : mu[i];
    grads_of<kGradMu>(node(l).energy, node(l).clamped, phi, mu, variance, grad);
    pull(node(l).activation, a, mu, grad);
    for (int i = 0; i < 4; ++i) grad[i] = kept(l, m, j + i) ? grad[i] : 0.0f;
    if (p.delta >= 0) put(array<T>(p.delta) + m * p.ld + j, grad);
    for (int i = 0; t == run.steps && i < 4; ++i) {
      if (j + i < p.width) node(l).delta[m * p.width + j + i] = grad[i];
    }
  }

  template <class Exec>
  PC_HD void update(const Exec& exec, int64_t l, int64_t tile) const {
    const bool top = last(l);
    const int64_t columns = top ? plan(l).width : plan(l).passes, across = (columns + kColumnsOfTile - 1) / kColumnsOfTile;
    const int64_t m = tile / across * kRowsOfTile, j = tile % across * kColumnsOfTile;
    if (!top) {
      const NodePlan& above = plan(l + 1);
      exec.template multiply<true>(array<T>(above.delta) + m * above.ld, above.ld, array<T>(above.weight) + j, plan(l).passes_ld, above.ld,
                                   run.products);
    }
    exec.quads([&](int row, int column, const Four& x) {
      if (m + row >= run.batch || j + column >= columns) return;
      Four back;
      for (int i = 0; i < 4; ++i) back[i] = top ? 0.0f : x[i];
      if (!plan(l).rows_update) return move(l, m + row, j + column, back);
      if (!top) put(array<float>(plan(l).back) + (m + row) * plan(l).passes_ld + j + column, back);
    });
  }
  PC_HD void move(int64_t l, int64_t m, int64_t j, Four& back) const {
    const LayersNode& d = node(l);
    const NodePlan& p = plan(l);
    const int64_t at = m * p.ld + j;
    Four before, now, mu, variance, way;
    get(array<float>(p.phi) + at, before), get(array<float>(p.mu) + at, mu);
    log_vars(l, j, variance);
    direction(d, last(l), before, mu, variance, back, way);
    if (p.velocity >= 0) {
      Four u;
      get(array<float>(p.velocity) + at, u);
      for (int i = 0; i < 4; ++i) way[i] += run.momentum * u[i];
      put(array<float>(p.velocity) + at, way);
    }
    const float floor = floor_of(d.energy);
    for (int i = 0; i < 4; ++i) {
      const float to = before[i] - d.lr * way[i];
      now[i] = !kept(l, m, j + i) || held(l, m, j + i) ? before[i] : to < floor ? floor : to;
    }
    put(array<float>(p.phi) + at, now);
    if (p.passes == 0) return;
    feed_of(d, differences(), before, now);
    for (int i = 0; i < 4; ++i) now[i] = j + i < p.passes ? now[i] : 0.0f;
    put(array<T>(p.v) + m * p.passes_ld + j, now);
  }

  // -------------------------------------------------------------------------------------------------------------------
  // rows, by a team of threads each. team: rank, size, sum, max, and sync: what one wrote the others may read

  PC_HD Line<float> line(int64_t l, int64_t m) const {
    const LayersNode& d = node(l);
    const NodePlan& p = plan(l);
    Line<float> line{};
    line.n = p.width, line.lr = d.lr, line.natural = d.natural, line.momentum = run.momentum, line.floor = floor_of(d.energy);
    line.phi = line.state = array<float>(p.phi) + m * p.ld, line.mu = array<float>(p.mu) + m * p.ld;
    line.velocity = at(array<float>(p.velocity), m * p.ld);
    line.log_var = d.log_var, line.index = at(d.index, m);
    line.mask = at(d.mask, m * d.mask_sample), line.hold = at(d.hold, m * d.hold_sample);
    return line;
  }

  template <class Team>
  PC_HD void predict_row(const Team& team, int64_t l, int64_t m) const {
    const LayersNode& d = node(l);
    const NodePlan& p = plan(l);
    Line<float> line = this->line(l, m);
    const float *a = array<float>(p.a) + m * p.ld, *mu = array<float>(p.mu) + m * p.ld;
    float* grad = array<float>(p.grad) + m * p.ld;
    predict_mu(team, l, m);
    team.sync();
    line.grad_mu = grad;
    line_errors(team, d.energy, d.clamped, line);
    team.sync();
    const bool probabilities = d.energy == Energy::categorical_probs;
    double dot = 0;
    for (int64_t j = team.rank; is_softmax(d.activation) && j < p.width; j += team.size) {
      dot += !probabilities ? mu[j] * grad[j] : kept(l, m, j) ? mu[j] - line.phi[j] : 0.0f;
    }
    const float total = is_softmax(d.activation) ? static_cast<float>(team.sum(dot)) : 0.0f;
    T* operand = at(array<T>(p.delta), m * p.ld);
    for (int64_t j = team.rank; j < p.width; j += team.size) {
      float found = pulled(d.activation, a[j], mu[j], grad[j]);
      if (is_softmax(d.activation)) {
        found = probabilities ? CategoricalProbs::softmax_delta(kept(l, m, j) ? line.phi[j] : mu[j], mu[j], total)
                              : Softmax::vjp(mu[j], grad[j], total);
      }
      if (operand != nullptr) narrow(found, operand[j]);
      if (t == run.steps) d.delta[m * p.width + j] = found;
    }
  }

  template <class Team>
  PC_HD void update_row(const Team& team, int64_t l, int64_t m) const {
    Line<float> line = this->line(l, m);
    if (!last(l)) {
      line.feedback = feedback(team, l, m);
      team.sync();
    }
    line_move(team, node(l).energy, line);
    if (last(l)) return;
    team.sync();
    feed_row(team, l, m, line);
  }
  // back through the feed: where to the node's own direction is added
  template <class Team>
  PC_HD const float* feedback(const Team& team, int64_t l, int64_t m) const {
    const LayersNode& d = node(l);
    const NodePlan& p = plan(l);
    const float *back = array<float>(p.back) + m * p.passes_ld, *phi = array<float>(p.phi) + m * p.ld, *v = array<float>(p.fed) + m * p.passes_ld;
    if (d.natural) return back;
    float* to = array<float>(p.grad) + m * p.ld;
    double dot = 0;
    for (int64_t j = team.rank; is_softmax(d.feed) && j < p.passes; j += team.size) dot += v[j] * back[j];
    const float total = is_softmax(d.feed) ? static_cast<float>(team.sum(dot)) : 0.0f;
    for (int64_t j = team.rank; j < p.passes; j += team.size) {
      if (is_sample(d.feed)) {
        to[j] = back[j], to[p.passes + j] = Sample::vjp_s(phi[p.passes + j], d.noise[m * p.passes + j], back[j]);
      } else {
        to[j] = is_softmax(d.feed) ? Softmax::vjp(v[j], back[j], total)
                                   : pulled(static_cast<Activation>(d.feed), phi[j], v[j], back[j]);
      }
    }
    return to;
  }
  template <class Team>
  PC_HD void feed_row(const Team& team, int64_t l, int64_t m, Line<float> line) const {
    const LayersNode& d = node(l);
    const NodePlan& p = plan(l);
    if (d.energy != Energy::categorical) line.mask = nullptr;  // elsewhere a hidden entry is passed on as it stands
    const RowSoftmax softmax = is_softmax(d.feed) ? row_softmax(team, line, line.phi) : RowSoftmax{};
    float* fed = array<float>(p.fed) + m * p.passes_ld;
    T* operand = array<T>(p.v) + m * p.passes_ld;
    for (int64_t j = team.rank; j < p.passes; j += team.size) {
      float now;
      if (is_sample(d.feed)) now = Sample::value(line.phi[j], line.phi[p.passes + j], d.noise[m * p.passes + j]);
      else if (is_softmax(d.feed)) now = softmax.p(line.mask == nullptr || line.mask[j], line.phi[j]);
      else now = activated(static_cast<Activation>(d.feed), line.phi[j]);
      narrow(differences() ? now - fed[j] : now, operand[j]);
      fed[j] = now;
    }
  }

  // -------------------------------------------------------------------------------------------------------------------
  // after the last move: entry (m, j) of a free node

  PC_HD bool copy_out(int64_t l, int64_t m, int64_t j) const {  // whether it is finite
    const float phi = array<float>(plan(l).phi)[m * plan(l).ld + j];
    node(l).phi[m * plan(l).width + j] = phi;
    return phi - phi == 0.0f;
  }
};

// The nodes as layer_errors takes them: for a trace, the energies of the present phi and mu.
inline void nodes_of_trace(const LayersRun& run, NodeDesc* nodes) {
  for (int64_t l = 0; l < run.count; ++l) {
    const LayersNode& d = run.nodes[l];
    const NodePlan& p = run.plan[l];
    nodes[l] = NodeDesc{};
    nodes[l].energy = d.energy, nodes[l].clamped = d.clamped, nodes[l].rows = 1, nodes[l].width = p.width;
    nodes[l].phi_sample = nodes[l].mu_sample = p.ld;
    nodes[l].phi = d.index == nullptr ? run.work + p.phi : nullptr, nodes[l].mu = run.work + p.mu, nodes[l].index = d.index;
    nodes[l].log_var = d.log_var, nodes[l].mask = d.mask, nodes[l].mask_sample = d.mask_sample;
  }
}

}  // namespace pc
