// SPDX-License-Identifier: MIT
// Where everything lies in the cluster-resident kernel: plain C++, no CUDA, no torch; also a kernel argument.
//
// A cluster of 8 CTAs runs a tile of 8 samples through all steps. Every node's columns are shared out over the CTAs in units of
// 16. A CTA holds of its columns of node l the rows of W_l, in bfloat16, and the state; W_l serves both products:
//     a_l += W_l dv_{l-1}       from all of dv_{l-1}, gathered from the cluster; gives the CTA's own columns of a_l
//     W_l^T delta_l             from its own columns of delta_l; gives a share of all of node l-1's columns, which the CTA that
//                               owns them receives from each CTA and adds up in their order
// Gathering and receiving take room for a layer's whole width. Where memory is short, layers take turns at it (rounds), and
// every CTA's columns of node l-1 are received in parts. A round costs a cluster barrier a step, each part two.
//
// A narrow last layer (classes, as a rule) is shared out by its inputs instead: every CTA holds all of the node and the columns of
// W_l that belong to its own columns of node l-1. It sends its share of W_l dv_{l-1} to all, and W_l^T delta_l stays at home.
//
// All buffers of node l are lines of 8 samples, a line a column: as tensor cores take them, and no two lanes in one bank.
// All CTAs have the same layout: an offset is good for remote shared memory too. Offsets and sizes are in bytes.
#pragma once

#include <algorithm>
#include <cstdint>
#include <string>

namespace pc {

constexpr int kWarpsOfCta = 16;
constexpr int kCluster = 8, kTile = 8, kUnit = 16, kMaxLayers = 16;
constexpr int kNarrow = 32;            // columns of a last layer that is shared out by its inputs
constexpr int kMostColumns = 1 << 20;  // of a layer: sizes then fit the types
constexpr int kSkew = 8;               // bfloat16 entries between rows of W, so that eight rows lie in different banks
constexpr int kAlign = 128;
constexpr int kSharedBytes = 226 * 1024;  // of the 227 KB that a CTA may have on sm_90; 1 KB in reserve
constexpr int kStats = 3;              // row statistics: of the state, of the prediction, a sum of both
constexpr int kParts[] = {1, 2, 4};
constexpr int kWorks = 6, kListed = 63;  // kinds of work in a round; jobs of one that are listed, if there are no more
constexpr int kNowhere = -1;

struct LayerShape {
  int64_t width;
  bool state;     // free: phi moves (else it is a target)
  bool softmax;   // some formula of it needs a row's maximum and sum
  bool keeps_fed; // feed = softmax: the last value fed is kept, since the state alone does not give it back
};

struct LayerPlan {
  int width, padded;         // columns of the node; rounded up to units
  bool narrow;               // every CTA holds all columns
  int first[kCluster + 1];   // else CTA c owns columns first[c] .. first[c+1]-1, padding among them
  int slice;                 // the most columns that a CTA holds
  int weight, pitch;         // slice rows of `pitch` bfloat16 entries; kNowhere for the first layer
  int phi, velocity, a, mu, fed;  // slice x kTile float32; kNowhere: none. The first layer's a is constant, in global memory
  int delta;                 // slice x kTile bfloat16; kNowhere for the first layer
  int moved;                 // the same of dv (or v); kNowhere: nobody feeds on the node, or it stays as it is
  int stats;                 // kStats x (kCluster + 1) x kTile pairs (maximum, sum): of each CTA, of all
  int round;                 // of the layer's products
  int gather;                // all of dv_{l-1}: its padded columns x kTile bfloat16; kNowhere where the layer is narrow
  int receive, part;         // kCluster x part x kTile float32; part: columns of node l-1 received at a time; likewise
  int shares;                // of a narrow layer: kCluster x padded x kTile float32
};

struct Job {
  short layer, number;
};
struct JobList {  // who does what in a step, found out once for all
  int count;
  Job jobs[kListed];
};

struct ClusterPlan {
  int count, rounds, parts, bytes;
  int lists;    // kWorks of JobList
  int forward;  // a layer's columns x kTile float32: what the forward pass hands on, before there are rounds
  bool momentum;
  LayerPlan layers[kMaxLayers];
};

namespace plan {

inline int64_t aligned(int64_t bytes) { return (bytes + kAlign - 1) / kAlign * kAlign; }

// room for `bytes` at the end; a layout that has grown too large is never used, so its offsets need not fit
inline int take(int64_t& end, int64_t bytes) {
  const int64_t from = end;
  end += aligned(bytes);
  return static_cast<int>(std::min<int64_t>(from, INT32_MAX));
}
inline int take_if(bool wanted, int64_t& end, int64_t bytes) { return wanted ? take(end, bytes) : kNowhere; }

inline void share_columns(LayerPlan& layer, bool narrow) {
  const int units = (layer.width + kUnit - 1) / kUnit;
  layer.padded = units * kUnit, layer.narrow = narrow;
  layer.slice = 0;
  for (int c = 0; c <= kCluster; ++c) layer.first[c] = narrow ? 0 : static_cast<int>(int64_t{units} * c / kCluster) * kUnit;
  for (int c = 0; c < kCluster; ++c) layer.slice = std::max(layer.slice, layer.first[c + 1] - layer.first[c]);
  if (narrow) layer.slice = layer.padded;
}

inline int part_of(int slice, int parts) { return (slice / kUnit + parts - 1) / parts * kUnit; }

// What a layer holds through all steps, from `end` on.
inline void place_resident(const LayerShape& shape, int l, ClusterPlan& plan, int64_t& end) {
  LayerPlan& layer = plan.layers[l];
  const LayerPlan* below = l > 0 ? &plan.layers[l - 1] : nullptr;
  const int64_t entries = int64_t{kTile} * layer.slice;
  layer.pitch = below == nullptr ? 0 : (layer.narrow ? below->slice : below->padded) + kSkew;
  layer.weight = take_if(l > 0, end, int64_t{2} * layer.slice * layer.pitch);
  layer.phi = take(end, 4 * entries);
  layer.velocity = take_if(shape.state && plan.momentum, end, 4 * entries);
  layer.fed = take_if(shape.keeps_fed && shape.state, end, 4 * entries);
  layer.a = take_if(l > 0, end, 4 * entries);
  layer.mu = take(end, 4 * entries);
  layer.delta = take_if(l > 0, end, 2 * entries);
  layer.moved = take_if(l + 1 < plan.count && shape.state, end, 2 * entries);
  layer.stats = take_if(shape.softmax, end, 8 * kStats * (kCluster + 1) * kTile);
  layer.shares = take_if(layer.narrow, end, 4 * kCluster * entries);
}

// Layers 1.. in rounds from `from` on: first what a round gathers, then what it receives, so that a round may begin to
// gather while the last one is still being added up. false if even one layer at a time needs more than `room`; `most`: what the rounds take.
inline bool place_rounds(ClusterPlan& plan, int parts, int64_t from, int64_t room, int64_t& most) {
  int64_t gathers = 0, receives = 0, widest_gather = 0, widest_receive = 0;
  plan.parts = parts, plan.rounds = plan.count > 1 ? 1 : 0;
  for (int l = 1; l < plan.count; ++l) {
    LayerPlan& layer = plan.layers[l];
    const LayerPlan& below = plan.layers[l - 1];
    layer.part = layer.narrow ? 0 : part_of(below.slice, parts);
    const int64_t gather = layer.narrow ? 0 : aligned(int64_t{2} * kTile * below.padded);
    const int64_t receive = layer.narrow ? 0 : aligned(int64_t{4} * kCluster * kTile * layer.part);
    const int64_t would = std::max(widest_gather, gathers + gather) + std::max(widest_receive, receives + receive);
    if (gathers > 0 && would > room) ++plan.rounds, gathers = receives = 0;
    layer.round = plan.rounds - 1;
    layer.gather = layer.narrow ? kNowhere : static_cast<int>(std::min<int64_t>(from + gathers, INT32_MAX));
    layer.receive = layer.narrow ? kNowhere : static_cast<int>(receives);
    gathers += gather, receives += receive;
    widest_gather = std::max(widest_gather, gathers), widest_receive = std::max(widest_receive, receives);
  }
  most = widest_gather + widest_receive;
  if (most > room) return false;
  for (int l = 1; l < plan.count; ++l) {
    if (!plan.layers[l].narrow) plan.layers[l].receive += static_cast<int>(from + widest_gather);
  }
  return true;
}

}  // namespace plan

// The plan of a chain; returns why there is none, or an empty string.
inline std::string plan_cluster(const LayerShape* shapes, int64_t count, bool momentum, ClusterPlan& plan) {
  if (count < 1 || count > kMaxLayers) {
    return "it takes 1 to " + std::to_string(kMaxLayers) + " layers, and there are " + std::to_string(count);
  }
  plan = ClusterPlan{};
  plan.count = static_cast<int>(count), plan.momentum = momentum;
  int64_t end = 0, most = 0;
  for (int l = 0; l < plan.count; ++l) {
    if (shapes[l].width < 1 || shapes[l].width > kMostColumns) {
      return "layer " + std::to_string(l + 1) + " has no columns, or too many";
    }
    LayerPlan& layer = plan.layers[l];
    layer.width = static_cast<int>(shapes[l].width);
    layer.round = layer.gather = layer.receive = layer.part = kNowhere;
    plan::share_columns(layer, l > 0 && l + 1 == plan.count && layer.width <= kNarrow);
    plan::place_resident(shapes[l], l, plan, end);
  }
  plan.lists = plan::take(end, kWorks * sizeof(JobList));
  plan.forward = static_cast<int>(std::min<int64_t>(end, INT32_MAX));
  int64_t forward = 0;
  for (int l = 0; l + 1 < plan.count; ++l) forward = std::max(forward, plan::aligned(int64_t{4} * kTile * plan.layers[l].padded));
  for (const int parts : kParts) {
    const bool fits = plan::place_rounds(plan, parts, end, kSharedBytes - end, most) && end + forward <= kSharedBytes;
    most = std::max(most, forward);
    plan.bytes = static_cast<int>(std::min<int64_t>(end + most, INT32_MAX));
    if (fits) return "";
  }
  return "a CTA needs " + std::to_string((end + most) / 1024 + 1) + " KB of shared memory (" + std::to_string(end / 1024) +
         " KB of weights and states, " + std::to_string(most / 1024) + " KB to exchange a layer), and it has " +
         std::to_string(kSharedBytes / 1024) + " KB; narrower or fewer layers would fit";
}

}  // namespace pc
