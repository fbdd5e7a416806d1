// SPDX-License-Identifier: MIT
// The weights of a chain, packed once per call for all tiles and steps.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <type_traits>
#include <utility>
#include <vector>

#include "../infer.h"
#include "product.h"

namespace pc {

template <class T>
struct Weights {
  std::vector<Weight<T>> layers;
  at::Tensor panels, pairs;
};

// run(layer, panel) for all panels of `columns(layer)` columns, the first layer left out: its weight is used once, as it is.
template <class Columns, class Run>
void for_each_panel(const InferDesc& run, const Columns& columns, const Run& pack) {
  std::vector<std::pair<int64_t, int64_t>> work;
  for (int64_t l = 1; l < run.count; ++l) {
    for (int64_t p = 0; p < panel_count(columns(run.layers[l])); ++p) work.emplace_back(l, p);
  }
  at::parallel_for(0, static_cast<int64_t>(work.size()), 2, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) pack(work[i].first, work[i].second);
  });
}

// The transposes in float32; with `bf16_delta` only for the first pre-activations.
inline void pack_panels(const InferDesc& run, Weights<float>& weights) {
  int64_t size = 0;
  std::vector<int64_t> first(run.count);
  for (int64_t l = 1; l < run.count; ++l) first[l] = size, size += run.layers[l].width * run.layers[l].inputs;
  weights.panels = at::empty({size}, at::TensorOptions().dtype(at::kFloat));
  float* panels = weights.panels.data_ptr<float>();
  for (int64_t l = 1; l < run.count; ++l) weights.layers[l].panels = panels + first[l];
  for_each_panel(run, [](const LayerDesc& layer) { return layer.width; }, [&](int64_t l, int64_t p) {
    const Weight<float>& w = weights.layers[l];
    pack_panel(w.rows, w.width, w.inputs, p, panels + first[l]);
  });
}

// Both orientations in bfloat16.
inline void pack_pairs(const InferDesc& run, Weights<float>& weights) {
  int64_t size = 0;
  std::vector<int64_t> forward(run.count), backward(run.count);
  for (int64_t l = 1; l < run.count; ++l) {
    const LayerDesc& layer = run.layers[l];
    forward[l] = size, size += layer.width * paired(layer.inputs);
    backward[l] = size, size += layer.inputs * paired(layer.width);
  }
  weights.pairs = at::empty({size}, at::TensorOptions().dtype(at::kBFloat16));
  at::BFloat16* pairs = weights.pairs.data_ptr<at::BFloat16>();
  for (int64_t l = 1; l < run.count; ++l) {
    weights.layers[l].forward_pairs = pairs + forward[l];
    weights.layers[l].backward_pairs = pairs + backward[l];
  }
  for_each_panel(run, [](const LayerDesc& layer) { return layer.width; }, [&](int64_t l, int64_t p) {
    const Weight<float>& w = weights.layers[l];
    pack_pair_panel(w.rows, w.inputs, w.width, 1, w.inputs, p, pairs + forward[l]);
  });
  for_each_panel(run, [](const LayerDesc& layer) { return layer.inputs; }, [&](int64_t l, int64_t p) {
    const Weight<float>& w = weights.layers[l];
    pack_pair_panel(w.rows, w.width, w.inputs, w.inputs, 1, p, pairs + backward[l]);
  });
}

template <class T>
Weights<T> pack(const InferDesc& run) {
  Weights<T> out;
  for (int64_t l = 0; l < run.count; ++l) {
    const LayerDesc& layer = run.layers[l];
    out.layers.push_back({layer.width, layer.inputs, static_cast<const T*>(layer.weight), nullptr, nullptr, nullptr});
  }
  if constexpr (std::is_same_v<T, float>) {
    pack_panels(run, out);
    if (run.bf16_delta) pack_pairs(run, out);
  }
  return out;
}

}  // namespace pc
