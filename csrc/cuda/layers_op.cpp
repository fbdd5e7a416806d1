// SPDX-License-Identifier: MIT
// torch.ops.pc_kernels_native.infer_layers: the forward pass and all moves of a chain by schedule (a): phis, deltas, energies
// (steps + 1, nodes, batch) where traced, and the lowest node with a state that is not finite, from 1; 0: none. Only in builds
// with CUDA.
#include <ATen/core/Tensor.h>
#include <ATen/ops/zeros.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <memory>
#include <tuple>

#include "chain_call.h"
#include "infer_layers.h"

namespace pc {
namespace {

Products products_of(const std::string& precision) {
  if (precision == "fp32") return Products::fp32;
  if (precision == "tf32") return Products::tf32;
  if (precision == "bf16") return Products::bf16;
  TORCH_CHECK_VALUE(precision == "bf16_delta", "precision: wanted fp32, tf32, bf16 or bf16_delta, got ", precision);
  return Products::bf16_delta;
}

void add_nodes(ChainCall& call, const Optionals& noise, LayersRun& run) {
  const size_t count = call.nodes.size();
  TORCH_CHECK_VALUE(count <= kMaxLayers, "weights: wanted at most ", kMaxLayers, " layers, got ", count);
  check_count("noise", noise.size(), count);
  for (size_t l = 0; l < count; ++l) {
    LayersNode& node = run.nodes[l];
    static_cast<ChainNode&>(node) = call.nodes[l];
    node.noise = floats(call, "noise", noise[l], {call.batch, call.widths[l] / 2});
    const bool samples = is_sample(node.feed) && !node.clamped && l + 1 < count;
    TORCH_CHECK_VALUE(!samples || noise[l].has_value(), "noise: wanted a tensor for node ", l + 1, ", which feeds on its sample");
  }
}

std::tuple<std::vector<Tensor>, std::vector<Tensor>, Tensor, Tensor> infer_layers_op(
    Tensors weights, const Optionals& biases, const Names& activations, const Names& energies, const Names& feeds,
    const Names& rules, const c10::List<double>& lrs, const Optionals& log_vars, const Tensor& x, const Optionals& starts,
    const Optionals& masks, const Optionals& holds, const Optionals& noise, const Flags& clamped, at::IntArrayRef moves_from,
    int64_t steps, double momentum, std::string precision, bool trace) {
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  TORCH_CHECK_VALUE(steps >= 0, "steps: wanted a whole number >= 0, got ", steps);
  const auto run = std::make_unique<LayersRun>();
  TORCH_CHECK_VALUE(x.dim() == 2, "x: wanted (batch, width), got ", x.sizes());
  ChainCall call = describe_call({weights, biases, activations, energies, feeds, rules, lrs, log_vars, starts, masks, holds, clamped,
                                  moves_from}, x.size(0));
  add_nodes(call, noise, *run);
  run->count = static_cast<int64_t>(call.nodes.size()), run->batch = call.batch, run->steps = steps;
  run->products = products_of(precision), run->momentum = static_cast<float>(momentum), run->momentum_on = momentum != 0;
  const std::string why = plan_layers(x.size(1), call.widths.data(), *run);
  TORCH_CHECK_VALUE(why.empty(), "weights: wanted a chain for the layers' kernels, got one that they cannot run: ", why);
  for (size_t l = 0; l < call.nodes.size(); ++l) check_inputs(weights[l], run->plan[l].inputs);
  run->x = floats(call, "x", x, x.sizes());
  const c10::cuda::CUDAGuard guard(call.device);
  const auto on = at::TensorOptions().device(call.device);
  const Tensor work = at::zeros({run->bytes}, on.dtype(at::kByte)), diverged = at::zeros({}, on.dtype(at::kLong));
  const Tensor energy = at::zeros({trace ? steps + 1 : 0, run->count, run->batch}, on.dtype(at::kFloat));
  run->work = static_cast<char*>(work.data_ptr()), run->diverged = diverged.data_ptr<int64_t>();
  run->energy = trace ? energy.data_ptr<float>() : nullptr;
  const char* error = infer_layers(*run, c10::cuda::getCurrentCUDAStream(call.device.index()).stream());
  TORCH_CHECK(error == nullptr, "pc_kernels infer: the CUDA launch failed: ", error);
  return {call.phi, call.delta, energy, diverged};
}

}  // namespace
}  // namespace pc

TORCH_LIBRARY_FRAGMENT(pc_kernels_native, m) {
  m.def(
      "infer_layers(Tensor[] weights, Tensor?[] biases, str[] activations, str[] energies, str[] feeds, str[] rules, "
      "float[] lrs, Tensor?[] log_vars, Tensor x, Tensor?[] starts, Tensor?[] masks, Tensor?[] holds, "
      "Tensor?[] noise, bool[] clamped, int[] moves_from, int steps, float momentum, str precision, bool trace) "
      "-> (Tensor[], Tensor[], Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(pc_kernels_native, CUDA, m) { m.impl("infer_layers", &pc::infer_layers_op); }
