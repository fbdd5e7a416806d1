// SPDX-License-Identifier: MIT
// torch.ops.pc_kernels_native: schemas, checks, and the way from tensors to descriptors; and the Python module pc_kernels._C.
//
// Callers from Python come through pc_kernels.functional, which has checked everything with better messages. The checks here
// are for callers from C++ and for torch.ops: what would read or write out of bounds, or silently compute something else.
#include "ops.h"

#include <ATen/MemoryOverlap.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <pybind11/pybind11.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <iterator>
#include <optional>
#include <sstream>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "describe.h"
#if defined(PC_WITH_CUDA)
#include "cuda/launch.h"
#endif

namespace pc {
namespace {

// ---------------------------------------------------------------------------------------------------------------------
// from tensors to descriptors

// The nodes of one call.
struct NodeCall : Call {
  std::vector<NodeDesc> nodes;
};

void set_log_var(Call& call, NodeDesc& node, const std::optional<Tensor>& given, at::IntArrayRef shape) {
  const bool wanted = node.energy == Energy::gaussian_diag;
  TORCH_CHECK_VALUE(given.has_value() == wanted, "log_vars: wanted ", wanted ? "a tensor" : "None", " for '",
                    kEnergyNames[static_cast<int>(node.energy)], "', got ", wanted ? "None" : "a tensor");
  if (!wanted) return;
  check_like("log_vars", *given, call);
  TORCH_CHECK_VALUE(broadcasts(given->sizes(), shape.slice(1)), "log_vars: wanted a shape that broadcasts to ", shape.slice(1),
                    ", got ", given->sizes());
  node.log_var = call.keep(given->expand(shape.slice(1))).data_ptr();
}

void set_index(Call& call, NodeDesc& node, const Tensor& target, const Tensor& mu) {
  TORCH_CHECK_VALUE(node.clamped && node.energy == Energy::categorical && target.scalar_type() == at::kLong,
                    "phis: wanted a floating-point tensor, got ", target.scalar_type(),
                    "; class indices (int64) are for a clamped categorical node");
  TORCH_CHECK_VALUE(target.sizes() == mu.sizes().slice(0, mu.dim() - 1), "phis: wanted class indices of shape ",
                    mu.sizes().slice(0, mu.dim() - 1), ", got ", target.sizes());
  node.index = checked_indices(call, target, node.width);
}

void check_state_shape(const NodeDesc& node, const Tensor& phi, const Tensor& mu) {
  std::vector<int64_t> shape = mu.sizes().vec();
  if (node.energy == Energy::gaussian_full) {
    TORCH_CHECK_VALUE(node.width % 2 == 0, "mus: wanted an even width for gaussian_full (means, log variances), got ",
                      node.width);
    if (node.clamped) shape.back() /= 2;
  }
  TORCH_CHECK_VALUE(phi.sizes() == shape, "phis: wanted shape ", shape, ", got ", phi.sizes());
}

struct Extras {  // what the three ops share beside phis and mus
  const Names& energies;
  const Optionals &log_vars, &masks, &holds;
};

void add_node(NodeCall& call, const Tensor& phi, const Tensor& mu, const Extras& extras, size_t l, bool clamped) {
  NodeDesc node{};
  node.energy = energy_of(extras.energies[l]);
  node.clamped = clamped;
  check_like("mus", mu, call);
  const bool by_row = node.energy == Energy::categorical || node.energy == Energy::gaussian_full;
  TORCH_CHECK_VALUE(mu.dim() >= (by_row ? 2 : 1) && mu.size(0) == call.batch, "mus: wanted (batch, ..., width) of batch ",
                    call.batch, ", got ", mu.sizes());
  node.width = mu.dim() > 1 ? mu.size(-1) : 1;
  node.mu_sample = 1;
  for (const int64_t size : mu.sizes().slice(1)) node.mu_sample *= size;
  node.rows = node.width == 0 ? 0 : node.mu_sample / node.width;
  node.mu = call.keep(mu).data_ptr();
  const bool indexed = !phi.is_floating_point();
  if (indexed) {
    set_index(call, node, phi, mu);
    node.phi_sample = 0;
  } else {
    check_like("phis", phi, call);
    check_state_shape(node, phi, mu);
    node.phi = call.keep(phi).data_ptr();
    node.phi_sample = node.clamped && node.energy == Energy::gaussian_full ? node.mu_sample / 2 : node.mu_sample;
  }
  const Tensor& like = indexed ? mu : phi;
  set_log_var(call, node, extras.log_vars[l], like.sizes());
  set_mask(call, "masks", extras.masks[l], like.sizes(), node.mask, node.mask_sample);
  set_mask(call, "holds", extras.holds[l], like.sizes(), node.hold, node.hold_sample);
  call.nodes.push_back(node);
}

NodeCall describe(Tensors phis, Tensors mus, const Extras& extras, const Flags* clamped) {
  const size_t count = phis.size();
  TORCH_CHECK_VALUE(count > 0, "phis: wanted at least one node, got none");
  check_count("mus", mus.size(), count);
  check_count("energies", extras.energies.size(), count);
  check_count("log_vars", extras.log_vars.size(), count);
  check_count("masks", extras.masks.size(), count);
  check_count("holds", extras.holds.size(), count);
  if (clamped) check_count("clamped", clamped->size(), count);
  NodeCall call;
  call.dtype = mus[0].scalar_type();
  call.device = mus[0].device();
  const at::ScalarType second = call.device.is_cpu() ? at::kDouble : at::kBFloat16;
  TORCH_CHECK_TYPE(call.dtype == at::kFloat || call.dtype == second, "mus: wanted float32 or ", second, " on ", call.device,
                   ", got ", call.dtype);
  TORCH_CHECK_VALUE(mus[0].dim() >= 1, "mus: wanted (batch, ..., width), got a scalar");
  call.batch = mus[0].size(0);
  call.nodes.reserve(count);
  for (size_t l = 0; l < count; ++l) add_node(call, phis[l], mus[l], extras, l, clamped && (*clamped)[l]);
  return call;
}

template <class T>
T* entries_of(const Tensor& tensor) {
  return tensor.numel() == 0 ? nullptr : tensor.data_ptr<T>();
}

// The energies (nodes, batch); no entries where they are not wanted (on the CPU).
Tensor run_errors(const NodeCall& call, bool with_energy = true) {
  const int64_t count = static_cast<int64_t>(call.nodes.size());
  const at::ScalarType dtype = call.dtype == at::kDouble ? at::kDouble : at::kFloat;
  Tensor energy = at::empty({with_energy ? count : 0, call.batch}, at::TensorOptions().dtype(dtype).device(call.device));
  if (call.batch == 0) return energy;
#if defined(PC_WITH_CUDA)
  if (call.device.is_cuda()) {
    errors_on_device(call.nodes, call.batch, call, energy.data_ptr<float>());
    return energy;
  }
#endif
  if (call.dtype == at::kFloat) {
    layer_errors_cpu(call.nodes.data(), count, call.batch, entries_of<float>(energy));
  } else {
    layer_errors_cpu(call.nodes.data(), count, call.batch, entries_of<double>(energy));
  }
  return energy;
}

// ---------------------------------------------------------------------------------------------------------------------
// the ops

std::tuple<Tensor, std::vector<Tensor>, std::vector<Tensor>> layer_errors(
    Tensors phis, Tensors mus, const Names& energies, const Optionals& log_vars, const Optionals& masks,
    const Optionals& holds, const Flags& clamped) {
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  NodeCall call = describe(phis, mus, {energies, log_vars, masks, holds}, &clamped);
  std::vector<Tensor> grad_phi, grad_mu;
  const auto options = at::TensorOptions().dtype(call.dtype).device(call.device);
  for (size_t l = 0; l < call.nodes.size(); ++l) {
    NodeDesc& node = call.nodes[l];
    grad_mu.push_back(at::empty(mus[l].sizes(), options));
    node.grad_mu = grad_mu.back().data_ptr();
    grad_phi.push_back(node.clamped ? at::zeros(phis[l].sizes(), options) : at::empty(phis[l].sizes(), options));
    if (!node.clamped) node.grad_phi = grad_phi.back().data_ptr();
  }
  Tensor energy = run_errors(call);
  return {energy, grad_phi, grad_mu};
}

Tensor layer_energies(Tensors phis, Tensors mus, const Names& energies, const Optionals& log_vars, const Optionals& masks,
                      const Optionals& holds, const Flags& clamped) {
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  return run_errors(describe(phis, mus, {energies, log_vars, masks, holds}, &clamped));
}

// The part of layer_errors that a step needs, on the CPU: dE/dmu, and the energies where they are wanted.
std::tuple<Tensor, std::vector<Tensor>> layer_deltas(Tensors phis, Tensors mus, const Names& energies, const Optionals& log_vars,
                                                     const Optionals& masks, const Optionals& holds, const Flags& clamped,
                                                     bool with_energy) {
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  NodeCall call = describe(phis, mus, {energies, log_vars, masks, holds}, &clamped);
  std::vector<Tensor> grad_mu;
  for (size_t l = 0; l < call.nodes.size(); ++l) {
    grad_mu.push_back(at::empty(mus[l].sizes(), at::TensorOptions().dtype(call.dtype).device(call.device)));
    call.nodes[l].grad_mu = grad_mu.back().data_ptr();
  }
  const Tensor energy = run_errors(call, with_energy);
  return {energy, grad_mu};
}

// A tensor to be changed in place: itself where it is contiguous, else a copy that `finish` writes back.
struct InPlace {
  std::vector<std::pair<Tensor, Tensor>> copies;  // original, copy
  void* pointer(const char* argument, const Tensor& tensor) {
    TORCH_CHECK_VALUE(at::has_internal_overlap(tensor) != at::MemOverlap::Yes, argument,
                      ": wanted a tensor whose entries each have their own memory, got an expanded one; call .clone()");
    if (tensor.is_contiguous()) return tensor.data_ptr();
    copies.emplace_back(tensor, tensor.contiguous());
    return copies.back().second.data_ptr();
  }
  void finish() {
    for (auto& [original, copy] : copies) original.copy_(copy);
  }
};

void check_same(const char* argument, const Tensor& tensor, const Tensor& phi, const Call& call) {
  check_like(argument, tensor, call);
  TORCH_CHECK_VALUE(tensor.sizes() == phi.sizes(), argument, ": wanted shape ", phi.sizes(), ", got ", tensor.sizes());
}

struct Motion {
  const Optionals& feedback;
  const Names& rules;
  double lr;
  Tensors velocities;
  const c10::List<double>& lr_scales;
};

void check_motion(const Motion& motion, double momentum, size_t count) {
  check_count("feedback", motion.feedback.size(), count);
  check_count("rules", motion.rules.size(), count);
  check_count("lr_scales", motion.lr_scales.size(), count);
  if (!motion.velocities.empty()) check_count("velocities", motion.velocities.size(), count);
  TORCH_CHECK_VALUE(std::isfinite(motion.lr), "lr: wanted a finite number, got ", motion.lr);
  TORCH_CHECK_VALUE(std::isfinite(momentum), "momentum: wanted a finite number, got ", momentum);
}

// Checks first, all of them: a bad node must not leave its predecessors moved.
void set_motion(NodeCall& call, Tensors phis, const Motion& motion, InPlace& in_place) {
  for (size_t l = 0; l < call.nodes.size(); ++l) {
    NodeDesc& node = call.nodes[l];
    TORCH_CHECK_VALUE(!node.index, "phis: wanted states, got class indices");
    node.natural = natural_of(motion.rules[l], node.energy);
    node.lr = motion.lr * motion.lr_scales[l];
    const std::optional<Tensor> feedback = motion.feedback[l];
    if (feedback.has_value()) {
      check_same("feedback", *feedback, phis[l], call);
      node.feedback = call.keep(*feedback).data_ptr();
    }
    node.state = in_place.pointer("phis", phis[l]);
    node.phi = node.state;
    if (motion.velocities.empty()) continue;
    check_same("velocities", motion.velocities[l], phis[l], call);
    node.velocity = in_place.pointer("velocities", motion.velocities[l]);
  }
}

void run_update(const NodeCall& call, double momentum) {
  const int64_t count = static_cast<int64_t>(call.nodes.size());
#if defined(PC_WITH_CUDA)
  if (call.device.is_cuda()) return update_on_device(call.nodes, call.batch, call, momentum);
#endif
  if (call.dtype == at::kFloat) {
    update_phi_cpu<float>(call.nodes.data(), count, call.batch, momentum);
  } else {
    update_phi_cpu<double>(call.nodes.data(), count, call.batch, momentum);
  }
}

void update_phi_(Tensors phis, Tensors mus, const Optionals& feedback, const Names& energies, const Names& rules, double lr,
                 double momentum, Tensors velocities, const c10::List<double>& lr_scales, const Optionals& log_vars,
                 const Optionals& masks, const Optionals& holds) {
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  const Motion motion{feedback, rules, lr, velocities, lr_scales};
  check_motion(motion, momentum, phis.size());
  NodeCall call = describe(phis, mus, {energies, log_vars, masks, holds}, nullptr);
  InPlace in_place;
  set_motion(call, phis, motion, in_place);
  if (call.batch == 0) return;
  for (const Tensor& phi : phis) phi.unsafeGetTensorImpl()->bump_version();
  for (const Tensor& velocity : velocities) velocity.unsafeGetTensorImpl()->bump_version();
  run_update(call, momentum);
  in_place.finish();
}

// ---------------------------------------------------------------------------------------------------------------------
// the module

template <size_t N>
pybind11::tuple tuple_of(const char* const (&names)[N]) {
  pybind11::tuple out(N);
  for (size_t i = 0; i < N; ++i) out[i] = names[i];
  return out;
}

#define PC_TEXT_(x) #x
#define PC_TEXT(x) PC_TEXT_(x)

pybind11::dict build_info() {
  pybind11::dict info;
  info["version"] = PC_TEXT(PC_KERNELS_VERSION);
  info["torch"] = PC_TEXT(PC_KERNELS_TORCH);
#if defined(__clang__)
  info["compiler"] = "clang " __clang_version__;
#elif defined(__GNUC__)
  info["compiler"] = "g++ " __VERSION__;
#else
  info["compiler"] = "unknown";
#endif
  pybind11::list architectures, backends;
  backends.append("cpp");
#if defined(PC_WITH_CUDA)
  backends.append("cuda");
  std::stringstream listed(PC_TEXT(PC_KERNELS_CUDA_ARCHITECTURES));
  for (std::string one; std::getline(listed, one, '_');) architectures.append(one);
#endif
  info["cuda_architectures"] = architectures;
  info["backends"] = backends;
  return info;
}

}  // namespace
}  // namespace pc

TORCH_LIBRARY(pc_kernels_native, m) {
  m.def(
      "layer_errors(Tensor[] phis, Tensor[] mus, str[] energies, Tensor?[] log_vars, Tensor?[] masks, Tensor?[] holds, "
      "bool[] clamped) -> (Tensor energy, Tensor[] grad_phi, Tensor[] grad_mu)");
  m.def(
      "layer_deltas(Tensor[] phis, Tensor[] mus, str[] energies, Tensor?[] log_vars, Tensor?[] masks, Tensor?[] holds, "
      "bool[] clamped, bool with_energy) -> (Tensor energy, Tensor[] grad_mu)");
  m.def(
      "layer_energies(Tensor[] phis, Tensor[] mus, str[] energies, Tensor?[] log_vars, Tensor?[] masks, Tensor?[] holds, "
      "bool[] clamped) -> Tensor");
  m.def(
      "update_phi_(Tensor(a!)[] phis, Tensor[] mus, Tensor?[] feedback, str[] energies, str[] rules, float lr, "
      "float momentum, Tensor(b!)[] velocities, float[] lr_scales, Tensor?[] log_vars, Tensor?[] masks, Tensor?[] holds) "
      "-> ()");
}

#define PC_LAYER_OPS(m)                            \
  m.impl("layer_errors", &pc::layer_errors);     \
  m.impl("layer_energies", &pc::layer_energies); \
  m.impl("update_phi_", &pc::update_phi_)

TORCH_LIBRARY_IMPL(pc_kernels_native, CPU, m) {
  PC_LAYER_OPS(m);
  m.impl("layer_deltas", &pc::layer_deltas);
}
#if defined(PC_WITH_CUDA)
TORCH_LIBRARY_IMPL(pc_kernels_native, CUDA, m) { PC_LAYER_OPS(m); }
#endif

PYBIND11_MODULE(_C, m) {
  m.doc() = "The compiled backend of pc_kernels; its ops are in torch.ops.pc_kernels_native.";
  m.def("build_info", &pc::build_info);
  m.def("energies", [] { return pc::tuple_of(pc::kEnergyNames); });
  m.def("activations", [] { return pc::tuple_of(pc::kActivationNames); });
}
