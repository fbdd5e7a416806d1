// SPDX-License-Identifier: MIT
#include "describe.h"

#include <algorithm>

namespace pc {

namespace {

template <class Enum, size_t N>
Enum known(const char* argument, const char* const (&names)[N], const std::string& name) {
  std::string list;
  for (size_t i = 0; i < N; ++i) {
    if (name == names[i]) return static_cast<Enum>(i);
    list += (i ? ", " : "") + std::string(names[i]);
  }
  TORCH_CHECK_VALUE(false, argument, ": wanted one of ", list, ", got '", name, "'");
}

}  // namespace

Energy energy_of(const std::string& name) { return known<Energy>("energies", kEnergyNames, name); }

Activation activation_of(const char* argument, const std::string& name) {
  return known<Activation>(argument, kActivationNames, name);
}

bool natural_of(const std::string& rule, Energy energy) {
  if (rule == "euclidean") return false;
  TORCH_CHECK_VALUE(rule == "natural", "rules: wanted one of euclidean, natural, got '", rule, "'");
  TORCH_CHECK_VALUE(energy == Energy::categorical || energy == Energy::bernoulli,
                    "rules: wanted 'euclidean' for '", kEnergyNames[static_cast<int>(energy)],
                    "', got 'natural'; only categorical and bernoulli have a natural step");
  return true;
}

void check_count(const char* argument, size_t got, size_t wanted) {
  TORCH_CHECK_VALUE(got == wanted, argument, ": wanted ", wanted, " entries, one per node, got ", got);
}

namespace {
void check_device(const char* argument, const Tensor& tensor, const Call& call) {
  TORCH_CHECK_VALUE(tensor.device() == call.device, argument, ": wanted a tensor on ", call.device, ", got one on ",
                    tensor.device());
}
}  // namespace

void check_like(const char* argument, const Tensor& tensor, const Call& call) {
  TORCH_CHECK_TYPE(tensor.scalar_type() == call.dtype, argument, ": wanted ", call.dtype, " as the other tensors, got ",
                   tensor.scalar_type());
  check_device(argument, tensor, call);
}

bool broadcasts(at::IntArrayRef from, at::IntArrayRef to) {
  if (from.size() > to.size()) return false;
  for (size_t i = 1; i <= from.size(); ++i) {
    if (from[from.size() - i] != 1 && from[from.size() - i] != to[to.size() - i]) return false;
  }
  return true;
}

void set_mask(Call& call, const char* argument, const std::optional<Tensor>& given, at::IntArrayRef shape,
              const uint8_t*& pointer, int64_t& stride) {
  pointer = nullptr;
  stride = 0;
  if (!given.has_value()) return;
  TORCH_CHECK_TYPE(given->scalar_type() == at::kBool, argument, ": wanted a bool tensor, got ", given->scalar_type());
  check_device(argument, *given, call);
  TORCH_CHECK_VALUE(broadcasts(given->sizes(), shape), argument, ": wanted a ", c10::DeviceTypeName(call.device.type()),
                    " mask that broadcasts to ", shape, ", got ", given->sizes());
  std::vector<int64_t> full = shape.vec();
  const bool shared = given->dim() < static_cast<int64_t>(full.size()) || given->size(0) == 1;
  if (shared) full[0] = 1;
  const Tensor mask = call.keep(given->expand(full));
  pointer = reinterpret_cast<const uint8_t*>(mask.data_ptr<bool>());
  stride = shared ? 0 : mask.numel() / std::max<int64_t>(full[0], 1);
}

const int64_t* checked_indices(Call& call, const Tensor& target, int64_t classes) {
  check_device("phis", target, call);
  const Tensor indices = call.keep(target);
  const int64_t* index = indices.data_ptr<int64_t>();
  for (int64_t i = 0; i < (call.device.is_cpu() ? indices.numel() : 0); ++i) {
    TORCH_CHECK_VALUE(index[i] >= 0 && index[i] < classes, "phis: wanted class indices within 0..", classes - 1, ", got ",
                      index[i]);
  }
  return index;
}

}  // namespace pc
