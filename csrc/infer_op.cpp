// SPDX-License-Identifier: MIT
// torch.ops.pc_kernels_native.infer: schema, checks, and the way from tensors to the engine's descriptor.
//
// Callers from Python come through pc_kernels.inference, which has checked everything with better messages; these checks are
// for callers from C++ and for torch.ops: what would read or write out of bounds, or silently compute something else.
#include "infer.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <cmath>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "cpu/chain_kernels.h"
#include "describe.h"

namespace pc {
namespace {

// The op's arguments.
struct Request {
  const Tensor& x;
  Tensors weights;
  const Optionals& biases;
  const Names &activations, &energies, &feeds, &rules;
  const c10::List<double>& lr_scales;
  const Optionals &log_vars, &phis, &masks, &holds, &noise;
  const Flags& clamped;
  const c10::List<double>& priors;
  double lr;
};

// The chain of one call, and the contiguous copies that its pointers look into.
struct Chain : Call {
  std::vector<LayerDesc> layers;
  std::vector<Tensor> phi, delta;
};

const void* optional_tensor(Chain& chain, const char* argument, const std::optional<Tensor>& given, at::IntArrayRef shape) {
  if (!given.has_value()) return nullptr;
  check_like(argument, *given, chain);
  TORCH_CHECK_VALUE(given->sizes() == shape, argument, ": wanted shape ", shape, ", got ", given->sizes());
  return chain.keep(*given).data_ptr();
}

void set_target(Chain& chain, LayerDesc& layer, const std::optional<Tensor>& phi, bool last) {
  const std::optional<Tensor>& given = phi;
  TORCH_CHECK_VALUE(given.has_value() || !layer.clamped, "phis: wanted the target of a clamped node, got None");
  if (!given.has_value()) return;
  if (given->is_floating_point()) {
    const bool halves = layer.clamped && layer.energy == Energy::gaussian_full;
    layer.given = optional_tensor(chain, "phis", given, {chain.batch, halves ? layer.width / 2 : layer.width});
    return;
  }
  TORCH_CHECK_VALUE(layer.clamped && last && layer.energy == Energy::categorical && given->scalar_type() == at::kLong,
                    "phis: wanted floating point, got ", given->scalar_type(),
                    "; class indices (int64) are for a clamped categorical output");
  TORCH_CHECK_VALUE(given->sizes() == at::IntArrayRef({chain.batch}), "phis: wanted class indices (", chain.batch, "), got ",
                    given->sizes());
  layer.index = checked_indices(chain, *given, layer.width);
}

bool is_state(Energy energy) {  // whether a target has the form of the state, so that the feed applies to it
  return energy == Energy::gaussian || energy == Energy::gaussian_diag || energy == Energy::laplace ||
         energy == Energy::categorical_probs;
}

void add_layer(Chain& chain, const Request& request, size_t l, int64_t inputs) {
  LayerDesc layer{};
  const Tensor& weight = request.weights[l];
  check_like("weights", weight, chain);
  TORCH_CHECK_VALUE(weight.dim() == 2 && weight.size(1) == inputs, "weights: wanted (width, ", inputs, "), got ", weight.sizes());
  const bool last = l + 1 == request.weights.size();
  layer.width = weight.size(0);
  layer.inputs = inputs;
  layer.weight = chain.keep(weight).data_ptr();
  layer.bias = optional_tensor(chain, "biases", request.biases[l], {layer.width});
  layer.activation = activation_of("activations", request.activations[l]);
  layer.energy = energy_of(request.energies[l]);
  layer.feed = request.feeds[l] == "sample" ? kSampleFeed : static_cast<int>(activation_of("feeds", request.feeds[l]));
  layer.natural = natural_of(request.rules[l], layer.energy);
  layer.lr = request.lr * request.lr_scales[l];
  TORCH_CHECK_VALUE(layer.energy != Energy::gaussian_full || layer.width % 2 == 0,
                    "weights: wanted an even width for gaussian_full, got ", layer.width);
  TORCH_CHECK_VALUE(layer.feed != kSampleFeed || layer.energy == Energy::gaussian_full,
                    "feeds: wanted 'sample' for gaussian_full only");
  TORCH_CHECK_VALUE((layer.energy == Energy::gaussian_diag) == static_cast<std::optional<Tensor>>(request.log_vars[l]).has_value(),
                    "log_vars: wanted a tensor for gaussian_diag and None elsewhere");
  layer.log_var = optional_tensor(chain, "log_vars", request.log_vars[l], {layer.width});
  layer.clamped = request.clamped[l];
  layer.prior = layer.clamped ? 0.0 : static_cast<double>(request.priors[l]);
  TORCH_CHECK_VALUE(layer.prior == 0 || layer.energy == Energy::gaussian_full, "priors: wanted 0 except for gaussian_full");
  layer.passes_target = layer.clamped && !is_state(layer.energy);
  set_target(chain, layer, request.phis[l], last);
  const int64_t phi_width = layer.clamped && layer.energy == Energy::gaussian_full ? layer.width / 2 : layer.width;
  set_mask(chain, "masks", request.masks[l], {chain.batch, phi_width}, layer.mask, layer.mask_sample);
  set_mask(chain, "holds", request.holds[l], {chain.batch, phi_width}, layer.hold, layer.hold_sample);
  layer.noise = optional_tensor(chain, "noise", request.noise[l], {chain.batch, layer.width / 2});
  const bool samples = layer.feed == kSampleFeed && !layer.clamped && !last;
  TORCH_CHECK_VALUE(request.noise[l].has_value() || !samples, "noise: wanted a tensor for a node that feeds on its sample, got None");
  const auto options = at::TensorOptions().dtype(chain.dtype);
  chain.delta.push_back(at::empty({chain.batch, layer.width}, options));
  layer.delta = chain.delta.back().data_ptr();
  chain.phi.push_back(at::empty({layer.clamped ? 0 : chain.batch * layer.width}, options));
  if (!layer.clamped) {
    chain.phi.back() = chain.phi.back().view({chain.batch, layer.width});
    layer.phi = chain.phi.back().data_ptr();
  }
  chain.layers.push_back(layer);
}

void check_counts(const Request& request) {
  const size_t count = request.weights.size();
  TORCH_CHECK_VALUE(count > 0, "weights: wanted at least one layer, got none");
  const std::pair<const char*, size_t> sizes[] = {
      {"biases", request.biases.size()},       {"activations", request.activations.size()},
      {"energies", request.energies.size()},   {"feeds", request.feeds.size()},
      {"rules", request.rules.size()},         {"lr_scales", request.lr_scales.size()},
      {"log_vars", request.log_vars.size()},   {"phis", request.phis.size()},
      {"masks", request.masks.size()},         {"holds", request.holds.size()},
      {"noise", request.noise.size()},         {"clamped", request.clamped.size()},
      {"priors", request.priors.size()}};
  for (const auto& [argument, size] : sizes) check_count(argument, size, count);
}

Chain describe_chain(const Request& request) {
  check_counts(request);
  Chain chain;
  chain.dtype = request.x.scalar_type();
  TORCH_CHECK_TYPE(chain.dtype == at::kFloat || chain.dtype == at::kDouble, "x: wanted float32 or float64, got ", chain.dtype);
  TORCH_CHECK_VALUE(request.x.dim() == 2, "x: wanted (batch, features), got ", request.x.sizes());
  chain.batch = request.x.size(0);
  int64_t inputs = request.x.size(1);
  for (size_t l = 0; l < request.weights.size(); ++l) {
    add_layer(chain, request, l, inputs);
    const LayerDesc& layer = chain.layers.back();
    const bool half = layer.feed == kSampleFeed || (layer.clamped && layer.energy == Energy::gaussian_full);
    inputs = half ? layer.width / 2 : layer.width;
  }
  return chain;
}

// Moves until the cone is fully open; the last one repeats.
std::vector<Move> moves_of(const Chain& chain, int64_t steps) {
  std::vector<char> free, source;
  for (const LayerDesc& layer : chain.layers) {
    free.push_back(!layer.clamped);
    source.push_back(layer.clamped || layer.given || layer.energy == Energy::categorical_probs || layer.prior != 0);
  }
  Cone cone(free, source);
  std::vector<Move> moves;
  const int64_t opening = 2 * static_cast<int64_t>(chain.layers.size()) + 1;
  for (int64_t t = 0; t < std::max<int64_t>(1, std::min(steps, opening)); ++t) moves.push_back(cone.advance());
  return moves;
}

bool has_bf16() {  // of all CPUs with bfloat16 products; those with AMX have it, too
#if defined(__x86_64__) && defined(__GNUC__)
  return __builtin_cpu_supports("avx512bf16");
#else
  return false;
#endif
}

Tensor status_of(const InferOutcome& outcome) {
  constexpr int64_t kCpp = 2;  // index in pc_kernels.dispatch.BACKENDS
  Tensor status = at::empty({5}, at::TensorOptions().dtype(at::kLong));
  int64_t* out = status.data_ptr<int64_t>();
  out[0] = outcome.steps, out[1] = outcome.products, out[2] = kCpp, out[3] = outcome.layer, out[4] = outcome.step;
  return status;
}

// (steps + 1, layers, batch) summed over the batch in order: the same bits whatever the tiles and threads
Tensor batch_means(const Tensor& energies, const Chain& chain) {
  const int64_t rows = energies.size(0), count = energies.size(1), batch = chain.batch;
  Tensor out = at::empty({rows, count}, at::TensorOptions().dtype(at::kDouble));
  const double* from = energies.data_ptr<double>();
  double* to = out.data_ptr<double>();
  for (int64_t i = 0; i < rows * count; ++i) {
    double sum = 0;
    for (int64_t b = 0; b < batch; ++b) sum += from[i * batch + b];
    to[i] = batch ? sum / batch : 0;
  }
  return out.to(chain.dtype);
}

std::tuple<std::vector<Tensor>, std::vector<Tensor>, Tensor, Tensor> infer(
    const Tensor& x, Tensors weights, const Optionals& biases, const Names& activations, const Names& energies,
    const Names& feeds, const Names& rules, const c10::List<double>& lr_scales, const Optionals& log_vars,
    const Optionals& phis, const Optionals& masks, const Optionals& holds, const Optionals& noise, const Flags& clamped,
    const c10::List<double>& priors, int64_t steps, double lr, double momentum, double tol, std::string_view precision, bool trace) {
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  const bool bf16_delta = precision == "bf16_delta";
  TORCH_CHECK_VALUE(precision == "fp32" || (bf16_delta && has_bf16() && x.scalar_type() == at::kFloat),
                    "precision: wanted 'fp32', or 'bf16_delta' in float32 on a CPU with AVX512_BF16, got '",
                    std::string(precision), "'");
  TORCH_CHECK_VALUE(steps >= 0, "steps: wanted a whole number >= 0, got ", steps);
  TORCH_CHECK_VALUE(std::isfinite(lr) && std::isfinite(momentum), "lr, momentum: wanted finite numbers");
  Chain chain = describe_chain({x, weights, biases, activations, energies, feeds, rules, lr_scales, log_vars, phis, masks, holds,
                                noise, clamped, priors, lr});
  const std::vector<Move> moves = moves_of(chain, steps);
  const int64_t count = static_cast<int64_t>(chain.layers.size());
  const Tensor samples = at::empty({trace ? steps + 1 : 0, count, chain.batch}, at::TensorOptions().dtype(at::kDouble));
  InferDesc run{};
  run.x = chain.keep(x).data_ptr();
  run.batch = chain.batch;
  run.layers = chain.layers.data();
  run.count = count;
  run.steps = steps;
  run.momentum = momentum;
  run.tol = tol;
  run.moves = moves.data();
  run.bf16_delta = bf16_delta;
  run.move_count = static_cast<int64_t>(moves.size());
  run.energies = trace ? samples.data_ptr<double>() : nullptr;
  InferOutcome outcome;
  outcome.steps = steps, outcome.products = 0;
  if (chain.batch > 0) outcome = chain.dtype == at::kFloat ? infer_cpu<float>(run) : infer_cpu<double>(run);
  return {chain.phi, chain.delta, batch_means(samples, chain), status_of(outcome)};
}

}  // namespace
}  // namespace pc

TORCH_LIBRARY_FRAGMENT(pc_kernels_native, m) {
  m.def(
      "infer(Tensor x, Tensor[] weights, Tensor?[] biases, str[] activations, str[] energies, str[] feeds, str[] rules, "
      "float[] lr_scales, Tensor?[] log_vars, Tensor?[] phis, Tensor?[] masks, Tensor?[] holds, Tensor?[] noise, "
      "bool[] clamped, float[] priors, int steps, float lr, float momentum, float tol, str precision, bool trace) "
      "-> (Tensor[], Tensor[], Tensor, Tensor)");
  m.def("has_bf16() -> bool", &pc::has_bf16);  // whether this CPU runs `bf16_delta`
}

TORCH_LIBRARY_IMPL(pc_kernels_native, CPU, m) { m.impl("infer", &pc::infer); }

// Inference records no gradient; torch's stand-in for a missing derivative would cost a microsecond of every call.
TORCH_LIBRARY_IMPL(pc_kernels_native, Autograd, m) { m.impl("infer", torch::CppFunction::makeFallthrough()); }
