// SPDX-License-Identifier: MIT
// Where everything lies in the cluster-resident kernel: plain C++, no CUDA, no torch; also a kernel argument.
//
// A cluster of 8 CTAs runs a tile of 16 samples through all steps. Every node's columns are shared out over the CTAs in units of
// 16. A CTA holds of its columns of node l the rows of W_l, in bfloat16, and the state; W_l serves both products:
//     a_l += dv_{l-1} W_l^T     from all of dv_{l-1}, gathered from the cluster; gives the CTA's own columns of a_l
//     W_l^T delta_l             from its own columns of delta_l; gives a share of all of node l-1's columns, which the CTA that
//                               owns them receives from each CTA and adds up in their order
// Gathering and receiving take room for a layer's whole width. Where memory is short, layers take turns at it (rounds), and
// every CTA's columns of node l-1 are received in parts. A round costs a cluster barrier a step, each part two.
// All CTAs have the same layout: an offset is good for remote shared memory too. Offsets and sizes are in bytes.
#pragma once

#include <algorithm>
#include <cstdint>
#include <string>

namespace pc {

constexpr int kCluster = 8, kTile = 16, kUnit = 16, kMaxLayers = 16;
constexpr int kSkew = 8;               // bfloat16 entries between rows, so that eight rows lie in different banks
constexpr int64_t kAlign = 128;
constexpr int64_t kSharedBytes = 226 * 1024;  // of the 227 KB that a CTA may have on sm_90; 1 KB in reserve
constexpr int kStats = 3;              // row statistics: of the state, of the prediction, a sum of both
constexpr int kParts[] = {1, 2, 4};
constexpr int64_t kNowhere = -1;

struct LayerShape {
  int64_t width;
  bool state;     // free: phi moves (else it is a target, read from global memory)
  bool softmax;   // some formula of it needs a row's maximum and sum
  bool keeps_fed; // feed = softmax: the last value fed is kept, since the state alone does not give it back
};

struct LayerPlan {
  int64_t width, padded;         // columns of the node; rounded up to units
  int64_t first[kCluster + 1];   // CTA c owns columns first[c] .. first[c+1]-1, padding among them
  int64_t slice;                 // the widest of these
  int64_t weight, pitch;         // slice rows of `pitch` bfloat16 entries; kNowhere for the first layer
  int64_t phi, velocity, a, fed; // kTile x slice float32; kNowhere: none. The first layer's a is constant, in global memory
  int64_t delta, delta_pitch;    // kTile rows of bfloat16; kNowhere for the first layer
  int64_t moved;                 // bf16 of dv (or v): kTile x slice; kNowhere: nobody feeds on the node, or it stays as it is
  int64_t stats;                 // kStats x (kCluster + 1) x kTile pairs (maximum, sum): of each CTA, of all
  int64_t round;                 // of the layer's products
  int64_t gather;                // all of dv_{l-1}: kTile rows of `pitch`
  int64_t receive, part;         // kCluster x kTile x part float32; part: columns of node l-1 received at a time
};

struct ClusterPlan {
  int64_t count, rounds, parts, bytes;
  bool momentum;
  LayerPlan layers[kMaxLayers];
};

namespace plan {

inline int64_t aligned(int64_t bytes) { return (bytes + kAlign - 1) / kAlign * kAlign; }

inline int64_t take(int64_t& end, int64_t bytes) {
  const int64_t from = end;
  end += aligned(bytes);
  return from;
}

inline void share_columns(LayerPlan& layer) {
  const int64_t units = (layer.width + kUnit - 1) / kUnit;
  layer.padded = units * kUnit;
  layer.slice = 0;
  for (int c = 0; c <= kCluster; ++c) layer.first[c] = units * c / kCluster * kUnit;
  for (int c = 0; c < kCluster; ++c) layer.slice = std::max(layer.slice, layer.first[c + 1] - layer.first[c]);
}

inline int64_t gather_bytes(const LayerPlan& layer) { return aligned(2 * kTile * layer.pitch); }
inline int64_t part_of(int64_t slice, int64_t parts) { return (slice / kUnit + parts - 1) / parts * kUnit; }
inline int64_t receive_bytes(const LayerPlan& layer) { return aligned(4 * kCluster * kTile * layer.part); }

// What a layer holds through all steps, from `end` on.
inline void place_resident(const LayerShape* shapes, int64_t l, ClusterPlan& plan, int64_t& end) {
  LayerPlan& layer = plan.layers[l];
  const LayerShape& shape = shapes[l];
  const int64_t entries = kTile * layer.slice;
  layer.pitch = l > 0 ? plan.layers[l - 1].padded + kSkew : 0;
  layer.weight = l > 0 ? take(end, 2 * layer.slice * layer.pitch) : kNowhere;
  layer.phi = shape.state ? take(end, 4 * entries) : kNowhere;
  layer.velocity = shape.state && plan.momentum ? take(end, 4 * entries) : kNowhere;
  layer.fed = shape.keeps_fed && shape.state ? take(end, 4 * entries) : kNowhere;
  layer.a = l > 0 ? take(end, 4 * entries) : kNowhere;
  layer.delta_pitch = layer.slice + kSkew;
  layer.delta = l > 0 ? take(end, 2 * kTile * layer.delta_pitch) : kNowhere;
  layer.moved = l + 1 < plan.count && shape.state ? take(end, 2 * entries) : kNowhere;
  layer.stats = shape.softmax ? take(end, 8 * kStats * (kCluster + 1) * kTile) : kNowhere;
}

// Layers 1.. in rounds from `from` on: first what a round gathers, then what it receives, so that a round may begin to
// gather while the last one is still being added up. false if even one layer at a time needs more than `room`; `most`: what the rounds take.
inline bool place_rounds(ClusterPlan& plan, int64_t parts, int64_t from, int64_t room, int64_t& most) {
  int64_t gathers = 0, receives = 0, widest_gather = 0, widest_receive = 0;
  plan.parts = parts, plan.rounds = plan.count > 1 ? 1 : 0;
  for (int64_t l = 1; l < plan.count; ++l) {
    LayerPlan& layer = plan.layers[l];
    layer.part = part_of(plan.layers[l - 1].slice, parts);
    const int64_t gather = gather_bytes(layer), receive = receive_bytes(layer);
    const int64_t would = std::max(widest_gather, gathers + gather) + std::max(widest_receive, receives + receive);
    if (gathers > 0 && would > room) ++plan.rounds, gathers = receives = 0;
    layer.round = plan.rounds - 1;
    layer.gather = from + gathers;
    layer.receive = receives;
    gathers += gather, receives += receive;
    widest_gather = std::max(widest_gather, gathers), widest_receive = std::max(widest_receive, receives);
  }
  for (int64_t l = 1; l < plan.count; ++l) plan.layers[l].receive += from + widest_gather;
  most = widest_gather + widest_receive;
  return most <= room;
}

}  // namespace plan

// The plan of a chain; returns why there is none, or an empty string.
inline std::string plan_cluster(const LayerShape* shapes, int64_t count, bool momentum, ClusterPlan& plan) {
  if (count < 1 || count > kMaxLayers) {
    return "it takes 1 to " + std::to_string(kMaxLayers) + " layers, and there are " + std::to_string(count);
  }
  plan = ClusterPlan{};
  plan.count = count, plan.momentum = momentum;
  int64_t end = 0;
  for (int64_t l = 0; l < count; ++l) {
    if (shapes[l].width < 1 || shapes[l].width > INT32_MAX) {
      return "layer " + std::to_string(l + 1) + " has no columns, or too many";
    }
    plan.layers[l].width = shapes[l].width;
    plan.layers[l].round = plan.layers[l].gather = plan.layers[l].receive = plan.layers[l].part = kNowhere;
    plan::share_columns(plan.layers[l]);
    plan::place_resident(shapes, l, plan, end);
  }
  int64_t most = 0;
  for (const int64_t parts : kParts) {
    const bool fits = plan::place_rounds(plan, parts, end, kSharedBytes - end, most);
    plan.bytes = end + most;
    if (fits) return "";
  }
  return "a CTA needs " + std::to_string(plan.bytes / 1024 + 1) + " KB of shared memory (" + std::to_string(end / 1024) +
         " KB of weights and states, " + std::to_string(most / 1024) + " KB to exchange a layer), and it has " +
         std::to_string(kSharedBytes / 1024) + " KB; narrower or fewer layers would fit";
}

}  // namespace pc
