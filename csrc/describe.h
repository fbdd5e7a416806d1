// SPDX-License-Identifier: MIT
// From tensors to descriptors: what the ops share. TORCH_CHECK messages name the argument, what was wanted, what came.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <optional>
#include <string>
#include <vector>

#include "pc_math.h"

namespace pc {

using at::Tensor;
using Tensors = at::TensorList;
using Optionals = c10::List<std::optional<Tensor>>;
using Names = c10::List<std::string>;
using Flags = c10::List<bool>;

#define PC_ENTRY(name, type) #name,
inline constexpr const char* kEnergyNames[] = {PC_ENERGIES(PC_ENTRY)};
inline constexpr const char* kActivationNames[] = {PC_ACTIVATIONS(PC_ENTRY)};
#undef PC_ENTRY

Energy energy_of(const std::string& name);
Activation activation_of(const char* argument, const std::string& name);
bool natural_of(const std::string& rule, Energy energy);
void check_count(const char* argument, size_t got, size_t wanted);

// The contiguous tensors that descriptors point into, and what all tensors of a call have in common.
struct Call {
  std::vector<Tensor> kept;
  at::ScalarType dtype = at::kFloat;
  at::Device device = at::kCPU;
  int64_t batch = 0;

  Tensor keep(const Tensor& tensor) {
    kept.push_back(tensor.contiguous());
    return kept.back();
  }
};

void check_like(const char* argument, const Tensor& tensor, const Call& call);
bool broadcasts(at::IntArrayRef from, at::IntArrayRef to);

// A mask of bytes laid out like `shape`; the batch dimension stays unmaterialised where it is shared.
void set_mask(Call& call, const char* argument, const std::optional<Tensor>& given, at::IntArrayRef shape,
              const uint8_t*& pointer, int64_t& stride);

// Class indices, all within [0, classes). On a GPU nobody looks (that would wait for it): there the sample's energy is NaN.
const int64_t* checked_indices(Call& call, const Tensor& target, int64_t classes);

}  // namespace pc
