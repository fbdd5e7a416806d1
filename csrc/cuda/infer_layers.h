// SPDX-License-Identifier: MIT
// The launcher of schedule (a): plain pointers and a stream. Returns what CUDA says went wrong, or null.
#pragma once

#include "layers_plan.h"

namespace pc {

// All moves of `run`; its workspace is zero. For GPUs from compute capability 8.0 on.
const char* infer_layers(const LayersRun& run, void* stream);

}  // namespace pc
