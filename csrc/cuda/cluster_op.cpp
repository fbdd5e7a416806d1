// SPDX-License-Identifier: MIT
// torch.ops.pc_kernels_native.infer_cluster: the forward pass and all moves of a chain (phis, deltas, and the lowest node with a
// state that is not finite, from 1; 0: none); and cluster_refusal, which says without running why a chain cannot have it. Only in
// builds with CUDA.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <memory>
#include <tuple>

#include "chain_call.h"
#include "infer_cluster.h"

namespace pc {
namespace {

std::tuple<std::vector<Tensor>, std::vector<Tensor>, Tensor> infer_cluster_op(
    Tensors weights, const Optionals& biases, const Names& activations, const Names& energies, const Names& feeds,
    const Names& rules, const c10::List<double>& lrs, const Optionals& log_vars, const Tensor& x, const Optionals& starts,
    const Optionals& masks, const Optionals& holds, const Flags& clamped, at::IntArrayRef moves_from, int64_t steps,
    double momentum, bool differences) {
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  TORCH_CHECK_VALUE(steps >= 0, "steps: wanted a whole number >= 0, got ", steps);
  TORCH_CHECK_VALUE(x.dim() == 2 && x.size(1) <= INT32_MAX, "x: wanted (batch, width), got ", x.sizes());
  ChainCall call = describe_call({weights, biases, activations, energies, feeds, rules, lrs, log_vars, starts, masks, holds, clamped,
                                  moves_from}, x.size(0));
  for (size_t l = 0; l < call.nodes.size(); ++l) check_inputs(weights[l], l == 0 ? x.size(1) : call.widths[l - 1]);
  const auto run = std::make_unique<ClusterRun>();
  const int64_t count = static_cast<int64_t>(call.nodes.size());
  const std::string why =
      describe_cluster(call.nodes.data(), call.widths.data(), count, call.batch, steps, momentum, differences, *run);
  TORCH_CHECK_VALUE(why.empty(), "weights: wanted a chain for the cluster-resident kernel, got one that it cannot run: ", why);
  const c10::cuda::CUDAGuard guard(call.device);
  const Tensor diverged = at::zeros({}, at::TensorOptions().dtype(at::kLong).device(call.device));
  const Tensor first_a = at::empty({call.batch, call.widths[0]}, x.options());
  run->x = floats(call, "x", x, x.sizes()), run->inputs = static_cast<int>(x.size(1)), run->first_a = first_a.data_ptr<float>();
  run->diverged = diverged.data_ptr<int64_t>();
  const char* error = infer_cluster(*run, c10::cuda::getCurrentCUDAStream(call.device.index()).stream());
  TORCH_CHECK(error == nullptr, "pc_kernels infer: the CUDA launch failed: ", error);
  return {call.phi, call.delta, diverged};
}

std::string cluster_refusal(at::IntArrayRef widths, const Names& activations, const Names& energies, const Names& feeds,
                            const Names& rules, const Flags& clamped, double momentum) {
  std::vector<ChainNode> nodes(widths.size());
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
      "float[] lrs, Tensor?[] log_vars, Tensor x, Tensor?[] starts, Tensor?[] masks, Tensor?[] holds, bool[] clamped, "
      "int[] moves_from, int steps, float momentum, bool differences) -> (Tensor[], Tensor[], Tensor)");
  m.def(
      "cluster_refusal(int[] widths, str[] activations, str[] energies, str[] feeds, str[] rules, bool[] clamped, "
      "float momentum) -> str",
      &pc::cluster_refusal);
}

TORCH_LIBRARY_IMPL(pc_kernels_native, CUDA, m) { m.impl("infer_cluster", &pc::infer_cluster_op); }
