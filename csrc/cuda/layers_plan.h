// SPDX-License-Identifier: MIT
// Schedule (a), for GPUs from sm_80 on and layers of any width: what a call is told, where everything lies in its workspace, and
// which tiles a launch has. Plain C++, no CUDA, no torch; also a kernel argument.
//
// A move is two launches of tiles over all layers, each product with its elementwise work fused:
//     predict   a_l = W_l v_{l-1} + b_l (or a_l += W_l dv_{l-1}), mu_l, delta_l    above every node that has moved
//     update    W_{l+1}^T delta_{l+1}; phi_l, v_l                                  of every node that moves
// A tile of one launch reads what the other wrote, and of its own nothing that another tile writes. Nodes that need whole rows
// (softmax, categorical, gaussian_full) leave their product in memory, and a launch of rows follows.
//
// Arrays are (batch, width) with padded leading dimensions; padding is zero and stays so. Offsets are in bytes.
#pragma once

#include <algorithm>
#include <cstdint>
#include <string>

#include "cluster_nodes.h"

namespace pc {

constexpr int kRowsOfTile = 32, kColumnsOfTile = 32;
constexpr int kPadding = 64;  // leading dimensions are multiples of it: of a tile's columns and of what a product takes at a time
constexpr int kRowsOfBlock = 8;  // a warp a row
constexpr int64_t kWorkAlign = 256;

enum class Products : int { fp32, tf32, bf16, bf16_delta };

struct LayersNode : ChainNode {
  const float* noise;  // (batch, width / 2) of a node that feeds on its sample
};

struct NodePlan {
  int64_t width, passes;      // of phi (mu); of what the node passes on
  int64_t ld, passes_ld;      // padded
  bool rows_predict, rows_update;
  int64_t phi, a, mu, back, velocity, fed, grad;  // float32; -1: none. back, fed: (batch, passes). grad: scratch of rows
  int64_t v, delta, weight;   // operands of products, of the precision's type; weight: (padded width, inputs_ld)
  int64_t inputs, inputs_ld;  // passes of the node below, or x's width
  int64_t exact;              // float32 weights for the forward pass; the operand itself where that is float32
};

struct LayersRun {
  int64_t count, batch, steps, bytes;
  const float* x;  // (batch, plan[0].inputs)
  int64_t inputs;  // where x lies, with padded rows
  Products products;
  bool momentum_on;
  float momentum;
  NodePlan plan[kMaxLayers];
  LayersNode nodes[kMaxLayers];
  char* work;
  float* energy;      // (steps + 1, count, batch); null: no trace
  int64_t* diverged;  // as ClusterRun's
};

PC_HD bool halves(Products products) { return products == Products::bf16 || products == Products::bf16_delta; }
PC_HD bool in_differences(Products products) { return products == Products::bf16_delta; }
PC_HD bool is_sample(int feed) { return feed < 0; }

// an operand of the forward pass: exact in bf16_delta, else rounded as in every later product
template <Products P>
PC_HD float operand(float x) {
  if constexpr (P == Products::bf16) return widen(to_bf16(x));
  if constexpr (P == Products::tf32) return float_of((bits_of(x) + 0x1000u) & ~0x1fffu);  // to nearest, ties away
  return x;
}

// A target that has another form than the state (data, not parameters) is passed on as it stands.
PC_HD bool passes_target(const ChainNode& node) {
  return node.clamped && (node.energy == Energy::categorical || node.energy == Energy::bernoulli || node.energy == Energy::gaussian_full ||
                          node.energy == Energy::poisson);
}

// ---------------------------------------------------------------------------------------------------------------------
// who is at work in move t (from 0; t = steps: what follows the last one)

PC_HD bool moves_at(const LayersRun& run, int64_t l, int64_t t) { return t < run.steps && t >= run.nodes[l].moves_from; }
PC_HD bool refreshed_at(const LayersRun& run, int64_t l, int64_t t) { return l > 0 && t > 0 && moves_at(run, l - 1, t - 1); }
// The first node's delta is nobody's operand: it is made at the end. A trace wants nothing here, it reads phi and mu.
PC_HD bool predicts_at(const LayersRun& run, int64_t l, int64_t t) {
  return t == 0 || t == run.steps || refreshed_at(run, l, t) || (l > 0 && moves_at(run, l, t - 1));
}

PC_HD int64_t tiles_of(const LayersRun& run, int64_t columns) {
  return (run.batch + kRowsOfTile - 1) / kRowsOfTile * ((columns + kColumnsOfTile - 1) / kColumnsOfTile);
}
PC_HD int64_t rows_of(const LayersRun& run) { return (run.batch + kRowsOfBlock - 1) / kRowsOfBlock; }

enum class Phase : int { predict, predict_rows, update, update_rows };

// blocks that a layer has in a launch
PC_HD int64_t blocks_of(const LayersRun& run, Phase phase, int64_t l, int64_t t) {
  const NodePlan& p = run.plan[l];
  switch (phase) {
    case Phase::predict: return predicts_at(run, l, t) ? tiles_of(run, p.width) : 0;
    case Phase::predict_rows: return predicts_at(run, l, t) && p.rows_predict ? rows_of(run) : 0;
    case Phase::update: return moves_at(run, l, t) ? tiles_of(run, l + 1 < run.count ? p.passes : p.width) : 0;
    case Phase::update_rows: return moves_at(run, l, t) && p.rows_update ? rows_of(run) : 0;
  }
  return 0;
}

// ---------------------------------------------------------------------------------------------------------------------
// the layout

inline int64_t up_to(int64_t size, int64_t multiple) { return (size + multiple - 1) / multiple * multiple; }

inline int64_t place(int64_t& end, bool wanted, int64_t bytes) {
  if (!wanted) return -1;
  const int64_t from = end;
  end += up_to(bytes, kWorkAlign);
  return from;
}

// Why a node cannot be had; empty: it can.
inline std::string layers_refusal(const LayersNode& node, bool last) {
  if (node.energy == Energy::categorical && is_softmax(node.activation)) {
    return "softmax before a categorical node, whose softmax it has already, is not written in it";
  }
  if (!last && is_sample(node.feed) && node.energy != Energy::gaussian_full) return "only gaussian_full nodes feed on a sample";
  return "";
}

// Fills in sizes and offsets; nodes, batch, steps, momentum and products are set. inputs: x's width; widths: per node.
inline std::string plan_layers(int64_t inputs, const int64_t* widths, LayersRun& run) {
  int64_t end = 0;
  const int64_t rows = up_to(run.batch, kRowsOfTile), size = halves(run.products) ? 2 : 4;
  for (int64_t l = 0; l < run.count; ++l) {
    const LayersNode& d = run.nodes[l];
    NodePlan& p = run.plan[l];
    const bool last = l + 1 == run.count, moves = !d.clamped, pair = d.energy == Energy::gaussian_full;
    const std::string why = layers_refusal(d, last);
    if (!why.empty()) return "node " + std::to_string(l + 1) + ": " + why;
    p.width = widths[l], p.passes = last ? 0 : pair && (d.clamped || is_sample(d.feed)) ? widths[l] / 2 : widths[l];
    p.ld = up_to(p.width, kPadding), p.passes_ld = up_to(p.passes, kPadding);
    p.inputs = l > 0 ? run.plan[l - 1].passes : inputs, p.inputs_ld = up_to(p.inputs, kPadding);
    if (l == 0) run.inputs = place(end, true, 4 * rows * p.inputs_ld);
    p.rows_predict = pair || d.energy == Energy::categorical || is_softmax(d.activation);
    p.rows_update = moves && (pair || (!last && (is_softmax(d.feed) || is_sample(d.feed))) || (d.energy == Energy::categorical && !d.natural));
    p.phi = place(end, true, 4 * rows * p.ld), p.a = place(end, true, 4 * rows * p.ld), p.mu = place(end, true, 4 * rows * p.ld);
    p.velocity = place(end, moves && run.momentum_on, 4 * rows * p.ld);
    p.grad = place(end, p.rows_predict || p.rows_update, 4 * rows * p.ld);
    p.back = place(end, p.rows_update && !last, 4 * rows * p.passes_ld);
    p.fed = place(end, !last, 4 * rows * p.passes_ld);
    p.v = place(end, !last, size * rows * p.passes_ld);
    p.delta = place(end, l > 0, size * rows * p.ld);
    p.weight = place(end, l > 0, size * p.ld * p.inputs_ld);
    p.exact = size == 4 && l > 0 ? p.weight : place(end, true, 4 * p.ld * p.inputs_ld);
  }
  run.bytes = end;
  return "";
}

}  // namespace pc
