// SPDX-License-Identifier: MIT
// The launchers of layer_ops.cu: raw device pointers and a stream, no torch. The CPU's stand in csrc/ops.h.
#pragma once

#include "../ops.h"

namespace pc {

enum class Memory : int { float32, bfloat16 };  // of every `void` of the nodes; arithmetic is float32, energies too

// All nodes in one launch (64 at most; more take one launch for each 64). The pointers of the nodes are device pointers,
// `stream` is a cudaStream_t. energy: (count, batch). Returns null, or what the CUDA runtime said of a launch that failed.
const char* layer_errors_cuda(const NodeDesc* nodes, int64_t count, int64_t batch, Memory memory, float* energy, void* stream);

// One move of every node, in place.
const char* update_phi_cuda(const NodeDesc* nodes, int64_t count, int64_t batch, double momentum, Memory memory, void* stream);

}  // namespace pc
