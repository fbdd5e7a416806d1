// SPDX-License-Identifier: MIT
// layer_errors and update_phi on the GPU: all nodes in one launch. Formulas: csrc/pc_math.h; loops: node_lines.h.
#include <algorithm>

#include "common.cuh"
#include "layer_ops.h"

namespace pc {
namespace {

template <class S>
__global__ void __launch_bounds__(kThreads, 2) errors_kernel(const __grid_constant__ NodeTable table) {
  __shared__ double room[kWarps];
  errors_of_block<S>(table, blockIdx.x, Teams{static_cast<int>(threadIdx.x) / kWarp, room});
}

template <class S>
__global__ void __launch_bounds__(kThreads, 2) move_kernel(const __grid_constant__ NodeTable table) {
  __shared__ double room[kWarps];
  move_of_block<S>(table, blockIdx.x, Teams{static_cast<int>(threadIdx.x) / kWarp, room});
}

// kernel(table) for each kNodesPerLaunch nodes
template <class Kernel>
const char* launch(Kernel kernel, const NodeDesc* nodes, int64_t count, int64_t batch, double momentum, float* energy,
                   void* stream) {
  for (int64_t from = 0; from < count && batch > 0; from += kNodesPerLaunch) {
    const int64_t some = std::min<int64_t>(kNodesPerLaunch, count - from);
    const NodeTable table = table_of(nodes + from, some, batch, at(energy, from * batch), momentum);
    const int64_t blocks = table.first[some];
    if (blocks > INT32_MAX) return "the batch is too large for one launch (more than 2^31 - 1 blocks); split it";
    kernel<<<static_cast<unsigned>(blocks), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(table);
    const char* error = launch_error();
    if (error != nullptr) return error;
  }
  return nullptr;
}

}  // namespace

const char* layer_errors_cuda(const NodeDesc* nodes, int64_t count, int64_t batch, Memory memory, float* energy, void* stream) {
  return launch(memory == Memory::float32 ? errors_kernel<float> : errors_kernel<Bf16>, nodes, count, batch, 0, energy, stream);
}

const char* update_phi_cuda(const NodeDesc* nodes, int64_t count, int64_t batch, double momentum, Memory memory, void* stream) {
  const auto kernel = memory == Memory::float32 ? move_kernel<float> : move_kernel<Bf16>;
  return launch(kernel, nodes, count, batch, momentum, nullptr, stream);
}

}  // namespace pc
