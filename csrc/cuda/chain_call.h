// SPDX-License-Identifier: MIT
// What both of the backend's ways to infer take from torch: the tensors of a chain, checked, as descriptors.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include "../describe.h"
#include "cluster_nodes.h"

namespace pc {

struct ChainCall : Call {
  std::vector<ChainNode> nodes;
  std::vector<int64_t> widths;
  std::vector<Tensor> phi, delta;
};

struct ChainRequest {
  Tensors weights;
  const Optionals& biases;
  const Names &activations, &energies, &feeds, &rules;
  const c10::List<double>& lrs;
  const Optionals& log_vars;
  const Optionals& starts;  // none: the forward pass gives the states
  const Optionals &masks, &holds;
  const Flags& clamped;
  at::IntArrayRef moves_from;
};

inline const float* floats(ChainCall& call, const char* argument, const std::optional<Tensor>& given, at::IntArrayRef shape) {
  if (!given.has_value()) return nullptr;
  check_like(argument, *given, call);
  TORCH_CHECK_VALUE(given->sizes() == shape, argument, ": wanted shape ", shape, ", got ", given->sizes());
  return call.keep(*given).data_ptr<float>();
}

inline int64_t state_width(const ChainNode& node, int64_t width) {  // of phi: the target of a pair is one number
  return node.clamped && node.energy == Energy::gaussian_full ? width / 2 : width;
}

inline void check_inputs(const Tensor& weight, int64_t inputs) {
  TORCH_CHECK_VALUE(weight.size(1) == inputs, "weights: wanted (width, ", inputs, "), as the node below passes on, got ", weight.sizes());
}

inline void check_counts(const ChainRequest& request) {
  const size_t count = request.weights.size();
  TORCH_CHECK_VALUE(count > 0, "weights: wanted at least one layer, got none");
  const std::pair<const char*, size_t> sizes[] = {
      {"biases", request.biases.size()},     {"activations", request.activations.size()}, {"energies", request.energies.size()},
      {"feeds", request.feeds.size()},       {"rules", request.rules.size()},             {"lrs", request.lrs.size()},
      {"log_vars", request.log_vars.size()}, {"starts", request.starts.size()},           {"masks", request.masks.size()},
      {"holds", request.holds.size()},       {"clamped", request.clamped.size()},         {"moves_from", request.moves_from.size()}};
  for (const auto& [argument, size] : sizes) check_count(argument, size, count);
}

inline void set_start(ChainCall& call, ChainNode& node, const Tensor& start, int64_t width, bool last) {
  if (start.is_floating_point()) {
    node.start = floats(call, "starts", start, {call.batch, state_width(node, width)});
    return;
  }
  TORCH_CHECK_VALUE(node.clamped && last && node.energy == Energy::categorical && start.scalar_type() == at::kLong &&
                        start.sizes() == at::IntArrayRef({call.batch}),
                    "starts: wanted floating point, or class indices (", call.batch,
                    ") int64 for a clamped categorical output, got ", start.scalar_type(), " of shape ", start.sizes());
  node.index = checked_indices(call, start, width);
}

inline void add_node(ChainCall& call, const ChainRequest& request, size_t l) {
  ChainNode node{};
  const bool last = l + 1 == request.weights.size();
  const Tensor& weight = request.weights[l];
  TORCH_CHECK_VALUE(weight.dim() == 2, "weights: wanted (width, width of the layer below), got ", weight.sizes());
  const int64_t width = weight.size(0);
  node.activation = activation_of("activations", request.activations[l]);
  node.energy = energy_of(request.energies[l]);
  const std::string feed = request.feeds[l];
  node.feed = feed == "sample" ? -1 : static_cast<int>(activation_of("feeds", feed));  // of gaussian_full, which is refused
  node.natural = natural_of(request.rules[l], node.energy);
  node.clamped = request.clamped[l];
  node.lr = static_cast<float>(request.lrs[l]);
  node.moves_from = request.moves_from[l];
  node.weight = floats(call, "weights", weight, weight.sizes());
  node.bias = floats(call, "biases", request.biases[l], {width});
  node.log_var = floats(call, "log_vars", request.log_vars[l], {width});
  TORCH_CHECK_VALUE((node.energy == Energy::gaussian_diag) == (node.log_var != nullptr),
                    "log_vars: wanted a tensor for gaussian_diag and None elsewhere");
  TORCH_CHECK_VALUE(request.starts[l].has_value() || !node.clamped, "starts: wanted the target of node ", l + 1, ", which is clamped");
  if (request.starts[l].has_value()) set_start(call, node, *request.starts[l], width, last);
  const int64_t states = node.index == nullptr ? state_width(node, width) : width;
  set_mask(call, "masks", request.masks[l], {call.batch, states}, node.mask, node.mask_sample);
  set_mask(call, "holds", request.holds[l], {call.batch, states}, node.hold, node.hold_sample);
  const auto options = at::TensorOptions().dtype(at::kFloat).device(call.device);
  call.delta.push_back(at::empty({call.batch, width}, options));
  call.phi.push_back(node.clamped ? at::empty({0}, options) : at::empty({call.batch, width}, options));
  node.delta = call.delta.back().data_ptr<float>();
  node.phi = node.clamped ? nullptr : call.phi.back().data_ptr<float>();
  call.nodes.push_back(node);
  call.widths.push_back(width);
}

inline ChainCall describe_call(const ChainRequest& request, int64_t batch) {
  check_counts(request);
  ChainCall call;
  call.device = request.weights[0].device(), call.batch = batch;
  for (size_t l = 0; l < request.weights.size(); ++l) add_node(call, request, l);
  return call;
}

}  // namespace pc
