// SPDX-License-Identifier: MIT
// What the cluster kernel is told, and the formulas of one entry of a node as it needs them; host and device.
#pragma once

#include <string>
#include <type_traits>

#include "../pc_math.h"
#include "bfloat16.h"
#include "cluster_plan.h"

namespace pc {

// One layer and the node that it predicts; pointers to global memory, float32, rows of `width`; null means none.
struct ChainNode {
  Activation activation;
  Energy energy;
  int feed;            // an Activation; not read of the last node
  bool natural, clamped;
  float lr;
  int64_t moves_from;  // the first move in which phi changes; more than any step: never

  const float *weight, *bias;  // (width, width below), (width,)
  const float* start;          // (batch, width): phi at t = 0, or the target; null: the forward pass gives it
  const int64_t* index;        // (batch,): the target as classes
  const float* log_var;        // (width,)
  const uint8_t *mask, *hold;  // 1 = takes part; 1 = held
  int64_t mask_sample, hold_sample;

  float *phi, *delta;  // (batch, width), out; phi of a free node only
};

struct ClusterRun {
  ClusterPlan plan;
  ChainNode nodes[kMaxLayers];
  const float* x;  // (batch, inputs)
  float* first_a;  // (batch, width): room for the first layer's pre-activations, which never change
  int64_t batch, steps;
  int inputs;
  float momentum;
  bool differences;  // bf16_delta: products of dv are added to the exact first a. Else (bf16) a is computed anew from v
  int64_t* diverged;  // one number, 0 before: becomes the lowest node (from 1) with a state that is not finite
};

PC_HD bool is_row_family(Energy energy) { return energy == Energy::categorical; }
PC_HD bool is_softmax(int activation) { return activation == static_cast<int>(Activation::softmax); }
PC_HD bool is_softmax(Activation activation) { return activation == Activation::softmax; }

// Why the kernel cannot run such a node; empty: it can.
inline std::string refusal(const ChainNode& node, bool last) {
  if (node.energy == Energy::categorical && is_softmax(node.activation)) {
    return "softmax before a categorical node, whose softmax it has already, is not written in it";
  }
  const bool softmax_feed = !last && is_softmax(node.feed);
  if (node.energy == Energy::gaussian_full) return "gaussian_full nodes are not written in it";
  if (node.clamped) return last ? "" : "an inner node that is held as a whole is not written in it";
  if (softmax_feed && !node.natural) return "the Euclidean step of a node that feeds on its softmax is not written in it";
  if (node.energy == Energy::categorical && !node.natural) return "the Euclidean step of a categorical node is not written in it";
  return "";
}

inline LayerShape shape_of(const ChainNode& node, int64_t width, bool last) {
  const bool fed = !last && !node.clamped && is_softmax(node.feed);
  return {width, !node.clamped, fed || is_softmax(node.activation) || is_row_family(node.energy), fed};
}

// Fills in `run`; why the kernel cannot have the chain, or an empty string. widths[l]: of node l.
inline std::string describe_cluster(const ChainNode* nodes, const int64_t* widths, int64_t count, int64_t batch, int64_t steps,
                                    double momentum, bool differences, ClusterRun& run) {
  if (count < 2) return "a single layer has no products to repeat";
  LayerShape shapes[kMaxLayers];
  for (int64_t l = 0; l < count && l < kMaxLayers; ++l) {
    const bool last = l + 1 == count;
    const std::string why = refusal(nodes[l], last);
    if (!why.empty()) return "node " + std::to_string(l + 1) + ": " + why;
    run.nodes[l] = nodes[l];
    shapes[l] = shape_of(nodes[l], widths[l], last);
  }
  run.batch = batch, run.steps = steps, run.momentum = static_cast<float>(momentum), run.differences = differences;
  return plan_cluster(shapes, count, momentum != 0, run.plan);
}

// Whether the run is of single entries without masks, held entries, variances or turns at the memory, each block of columns with a
// warp of its own. The one row that there may be is a categorical target that one warp has whole.
inline bool is_bare(const ClusterRun& run) {
  bool bare = run.plan.rounds == 1 && run.plan.parts == 1;
  int warps = 0;
  for (int l = 0; l < run.plan.count; ++l) {
    const ChainNode& d = run.nodes[l];
    const LayerPlan& p = run.plan.layers[l];
    const bool last = l + 1 == run.plan.count, feeds = !last && !d.clamped;
    bare = bare && d.mask == nullptr && d.hold == nullptr && d.log_var == nullptr;
    bare = bare && !is_softmax(d.activation) && !(feeds && is_softmax(d.feed));
    bare = bare && (!is_row_family(d.energy) || (last && d.clamped && p.narrow && p.padded == kUnit));
    warps += p.slice / kUnit;
  }
  return bare && warps <= kWarpsOfCta;
}

// ---------------------------------------------------------------------------------------------------------------------
// four entries, so that the family is looked up once for all of them; a softmax, which needs the row, gives NaN

using Four = float[4];

template <class F>
PC_HD float value_of(float a) {
  if constexpr (std::is_same_v<F, Softmax>) return NAN;
  else return F::value(a);
}
template <class F>
PC_HD float pulled_by(float a, float mu, float grad) {
  if constexpr (std::is_same_v<F, Softmax>) return NAN;
  else return F::vjp(a, mu, grad);
}

PC_HD void activate(Activation activation, const Four& a, Four& mu) {
  switch (activation) {
#define PC_CASE(name, type)                                     \
  case Activation::name:                                        \
    for (int i = 0; i < 4; ++i) mu[i] = value_of<type>(a[i]);   \
    return;
    PC_ACTIVATIONS(PC_CASE)
#undef PC_CASE
  }
  for (int i = 0; i < 4; ++i) mu[i] = NAN;
}

// grad becomes J^T grad
PC_HD void pull(Activation activation, const Four& a, const Four& mu, Four& grad) {
  switch (activation) {
#define PC_CASE(name, type)                                                          \
  case Activation::name:                                                             \
    for (int i = 0; i < 4; ++i) grad[i] = pulled_by<type>(a[i], mu[i], grad[i]);     \
    return;
    PC_ACTIVATIONS(PC_CASE)
#undef PC_CASE
  }
  for (int i = 0; i < 4; ++i) grad[i] = NAN;
}

// dE/dphi or dE/dmu of an entry of a family of single entries
template <int W, class F>
PC_HD float grad_of(bool clamped, float phi, float mu, float log_var) {
  if constexpr (!std::is_base_of_v<Elementwise, F>) {
    return NAN;
  } else {
    if constexpr (F::kOwnTarget && (W & kGradPhi) == 0) {
      if (clamped) return F::template target<W>(phi, mu).grad_mu;
    }
    const Local<float> found = F::template free<W>(phi, mu, log_var);
    return W == kGradPhi ? found.grad_phi : found.grad_mu;
  }
}

template <int W>
PC_HD void grads_of(Energy energy, bool clamped, const Four& phi, const Four& mu, const Four& log_var, Four& grad) {
  switch (energy) {
#define PC_CASE(name, type)                                                                               \
  case Energy::name:                                                                                      \
    for (int i = 0; i < 4; ++i) grad[i] = grad_of<W, type>(clamped, phi[i], mu[i], log_var[i]); \
    return;
    PC_ENERGIES(PC_CASE)
#undef PC_CASE
  }
  for (int i = 0; i < 4; ++i) grad[i] = NAN;
}

// which way phi moves, without momentum; `back`, W^T delta of the layer above, is used up. last: nobody is above
PC_HD void direction(const ChainNode& d, bool last, const Four& state, const Four& value, const Four& log_var, Four& back, Four& way) {
  if (d.natural) {
    for (int i = 0; i < 4; ++i) way[i] = (state[i] - value[i]) + back[i];
    return;
  }
  grads_of<kGradPhi>(d.energy, false, state, value, log_var, way);
  if (last) return;
  const Activation feed = static_cast<Activation>(d.feed);
  if (feed != Activation::identity) {
    Four fed;
    activate(feed, state, fed);
    pull(feed, state, fed, back);
  }
  for (int i = 0; i < 4; ++i) way[i] += back[i];
}

// now, phi after a move, becomes what the node passes on, or by how much that has changed since `before`
PC_HD void feed_of(const ChainNode& d, bool differences, Four& before, Four& now) {
  const Activation feed = static_cast<Activation>(d.feed);
  if (feed != Activation::identity) {
    Four from;
    for (int i = 0; i < 4; ++i) from[i] = now[i];
    activate(feed, from, now);
    for (int i = 0; i < 4; ++i) from[i] = before[i];
    activate(feed, from, before);
  }
  for (int i = 0; i < 4; ++i) now[i] = differences ? now[i] - before[i] : now[i];
}

PC_HD float floor_of(Energy energy) {
  return energy == Energy::categorical_probs ? static_cast<float>(kProbabilityFloor) : -INFINITY;
}

// one entry

PC_HD float activated(Activation activation, float a) {
  Four in = {a, a, a, a}, mu;
  activate(activation, in, mu);
  return mu[0];
}
PC_HD float pulled(Activation activation, float a, float mu, float grad) {
  const Four in = {a, a, a, a}, values = {mu, mu, mu, mu};
  Four grads = {grad, grad, grad, grad};
  pull(activation, in, values, grads);
  return grads[0];
}
PC_HD float grad_mu_of(Energy energy, bool clamped, float phi, float mu, float log_var) {
  const Four states = {phi, phi, phi, phi}, values = {mu, mu, mu, mu}, log_vars = {log_var, log_var, log_var, log_var};
  Four grads;
  grads_of<kGradMu>(energy, clamped, states, values, log_vars, grads);
  return grads[0];
}

}  // namespace pc
