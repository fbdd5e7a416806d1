// SPDX-License-Identifier: MIT
// torch.ops.pc_kernels_native.infer_cluster: all moves of a chain whose first pre-activations and states are given (phis,
// deltas, and the lowest node with a state that is not finite, from 1; 0: none); and
// cluster_refusal, which says without running why a chain cannot have it. Only in builds with CUDA.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <memory>
#include <tuple>

#include "../describe.h"
#include "infer_cluster.h"

namespace pc {
namespace {

struct ClusterCall : Call {
  std::vector<ClusterNode> nodes;
  std::vector<int64_t> widths;
  std::vector<Tensor> phi, delta;
};

struct ClusterRequest {
  Tensors weights;
  const Optionals& biases;
  const Names &activations, &energies, &feeds, &rules;
  const c10::List<double>& lrs;
  const Optionals& log_vars;
  Tensors starts, first_a;
  const Optionals &masks, &holds;
  const Flags& clamped;
  at::IntArrayRef moves_from;
};

const float* floats(ClusterCall& call, const char* argument, const std::optional<Tensor>& given, at::IntArrayRef shape) {
  if (!given.has_value()) return nullptr;
  check_like(argument, *given, call);
  TORCH_CHECK_VALUE(given->sizes() == shape, argument, ": wanted shape ", shape, ", got ", given->sizes());
  return call.keep(*given).data_ptr<float>();
}

void check_counts(const ClusterRequest& request) {
  const size_t count = request.weights.size();
  TORCH_CHECK_VALUE(count > 0, "weights: wanted at least one layer, got none");
  const std::pair<const char*, size_t> sizes[] = {
      {"biases", request.biases.size()},     {"activations", request.activations.size()}, {"energies", request.energies.size()},
      {"feeds", request.feeds.size()},       {"rules", request.rules.size()},             {"lrs", request.lrs.size()},
      {"log_vars", request.log_vars.size()}, {"starts", request.starts.size()},           {"first_a", request.first_a.size()},
      {"masks", request.masks.size()},       {"holds", request.holds.size()},             {"clamped", request.clamped.size()},
      {"moves_from", request.moves_from.size()}};
  for (const auto& [argument, size] : sizes) check_count(argument, size, count);
}

void set_start(ClusterCall& call, ClusterNode& node, const Tensor& start, int64_t width, bool last) {
  if (start.is_floating_point()) {
    node.start = floats(call, "starts", start, {call.batch, width});
    return;
  }
  TORCH_CHECK_VALUE(node.clamped && last && node.energy == Energy::categorical && start.scalar_type() == at::kLong &&
                        start.sizes() == at::IntArrayRef({call.batch}),
                    "starts: wanted floating point, or class indices (", call.batch,
                    ") int64 for a clamped categorical output, got ", start.scalar_type(), " of shape ", start.sizes());
  node.index = checked_indices(call, start, width);
}

void add_node(ClusterCall& call, const ClusterRequest& request, size_t l) {
  ClusterNode node{};
  const bool last = l + 1 == request.weights.size();
  const Tensor& weight = request.weights[l];
  TORCH_CHECK_VALUE(weight.dim() == 2 && (l == 0 || weight.size(1) == call.widths.back()),
                    "weights: wanted (width, width of the layer below), got ", weight.sizes());
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
  node.first_a = floats(call, "first_a", request.first_a[l], {call.batch, width});
  node.log_var = floats(call, "log_vars", request.log_vars[l], {width});
  TORCH_CHECK_VALUE((node.energy == Energy::gaussian_diag) == (node.log_var != nullptr),
                    "log_vars: wanted a tensor for gaussian_diag and None elsewhere");
  if (node.energy != Energy::gaussian_full) set_start(call, node, request.starts[l], width, last);
  set_mask(call, "masks", request.masks[l], {call.batch, width}, node.mask, node.mask_sample);
  set_mask(call, "holds", request.holds[l], {call.batch, width}, node.hold, node.hold_sample);
  const auto options = at::TensorOptions().dtype(at::kFloat).device(call.device);
  call.delta.push_back(at::empty({call.batch, width}, options));
  call.phi.push_back(node.clamped ? at::empty({0}, options) : at::empty({call.batch, width}, options));
  node.delta = call.delta.back().data_ptr<float>();
  node.phi = node.clamped ? nullptr : call.phi.back().data_ptr<float>();
  call.nodes.push_back(node);
  call.widths.push_back(width);
}

ClusterCall describe_call(const ClusterRequest& request) {
  check_counts(request);
  ClusterCall call;
  call.device = request.weights[0].device();
  TORCH_CHECK_VALUE(request.first_a[0].dim() == 2, "first_a: wanted (batch, width), got ", request.first_a[0].sizes());
  call.batch = request.first_a[0].size(0);
  for (size_t l = 0; l < request.weights.size(); ++l) add_node(call, request, l);
  return call;
}

std::tuple<std::vector<Tensor>, std::vector<Tensor>, Tensor> infer_cluster_op(
    Tensors weights, const Optionals& biases, const Names& activations, const Names& energies, const Names& feeds,
    const Names& rules, const c10::List<double>& lrs, const Optionals& log_vars, Tensors starts, Tensors first_a,
    const Optionals& masks, const Optionals& holds, const Flags& clamped, at::IntArrayRef moves_from, int64_t steps,
    double momentum, bool differences) {
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  TORCH_CHECK_VALUE(steps >= 0, "steps: wanted a whole number >= 0, got ", steps);
  const ClusterCall call = describe_call({weights, biases, activations, energies, feeds, rules, lrs, log_vars, starts, first_a,
                                          masks, holds, clamped, moves_from});
  const auto run = std::make_unique<ClusterRun>();
  const int64_t count = static_cast<int64_t>(call.nodes.size());
  const std::string why =
      describe_cluster(call.nodes.data(), call.widths.data(), count, call.batch, steps, momentum, differences, *run);
  TORCH_CHECK_VALUE(why.empty(), "weights: wanted a chain for the cluster-resident kernel, got one that it cannot run: ", why);
  const c10::cuda::CUDAGuard guard(call.device);
  const Tensor diverged = at::zeros({}, at::TensorOptions().dtype(at::kLong).device(call.device));
  run->diverged = diverged.data_ptr<int64_t>();
  const char* error = infer_cluster(*run, c10::cuda::getCurrentCUDAStream(call.device.index()).stream());
  TORCH_CHECK(error == nullptr, "pc_kernels infer: the CUDA launch failed: ", error);
  return {call.phi, call.delta, diverged};
}

std::string cluster_refusal(at::IntArrayRef widths, const Names& activations, const Names& energies, const Names& feeds,
                            const Names& rules, const Flags& clamped, double momentum) {
  std::vector<ClusterNode> nodes(widths.size());
  check_count("activations", activations.size(), nodes.size());
  check_count("energies", energies.size(), nodes.size());
  check_count("feeds", feeds.size(), nodes.size());
  check_count("rules", rules.size(), nodes.size());
  check_count("clamped", clamped.size(), nodes.size());
  for (size_t l = 0; l < nodes.size(); ++l) {
    nodes[l].activation = activation_of("activations", activations[l]);
    nodes[l].energy = energy_of(energies[l]);
    const std::string feed = feeds[l];
    nodes[l].feed = feed == "sample" ? -1 : static_cast<int>(activation_of("feeds", feed));
    nodes[l].natural = natural_of(rules[l], nodes[l].energy);
    nodes[l].clamped = clamped[l];
  }
  const auto run = std::make_unique<ClusterRun>();
  return describe_cluster(nodes.data(), widths.data(), static_cast<int64_t>(nodes.size()), 1, 0, momentum, true, *run);
}

}  // namespace
}  // namespace pc

TORCH_LIBRARY_FRAGMENT(pc_kernels_native, m) {
  m.def(
      "infer_cluster(Tensor[] weights, Tensor?[] biases, str[] activations, str[] energies, str[] feeds, str[] rules, "
      "float[] lrs, Tensor?[] log_vars, Tensor[] starts, Tensor[] first_a, Tensor?[] masks, Tensor?[] holds, bool[] clamped, "
      "int[] moves_from, int steps, float momentum, bool differences) -> (Tensor[], Tensor[], Tensor)");
  m.def(
      "cluster_refusal(int[] widths, str[] activations, str[] energies, str[] feeds, str[] rules, bool[] clamped, "
      "float momentum) -> str",
      &pc::cluster_refusal);
}

TORCH_LIBRARY_IMPL(pc_kernels_native, CUDA, m) { m.impl("infer_cluster", &pc::infer_cluster_op); }
