// SPDX-License-Identifier: MIT
#include "launch.h"

#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "layer_ops.h"

namespace pc {
namespace {

Memory memory_of(const Call& call) { return call.dtype == at::kFloat ? Memory::float32 : Memory::bfloat16; }

void check_launch(const char* op, const char* error) {
  TORCH_CHECK(error == nullptr, "pc_kernels ", op, ": the CUDA launch failed: ", error);
}

}  // namespace

void errors_on_device(const std::vector<NodeDesc>& nodes, int64_t batch, const Call& call, float* energy) {
  const c10::cuda::CUDAGuard guard(call.device);
  void* stream = c10::cuda::getCurrentCUDAStream(call.device.index()).stream();
  const int64_t count = static_cast<int64_t>(nodes.size());
  check_launch("layer_errors", layer_errors_cuda(nodes.data(), count, batch, memory_of(call), energy, stream));
}

void update_on_device(const std::vector<NodeDesc>& nodes, int64_t batch, const Call& call, double momentum) {
  const c10::cuda::CUDAGuard guard(call.device);
  void* stream = c10::cuda::getCurrentCUDAStream(call.device.index()).stream();
  const int64_t count = static_cast<int64_t>(nodes.size());
  check_launch("update_phi_", update_phi_cuda(nodes.data(), count, batch, momentum, memory_of(call), stream));
}

}  // namespace pc
