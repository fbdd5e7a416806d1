// SPDX-License-Identifier: MIT
// The launcher of infer_cluster.cu: raw device pointers and a stream, no torch.
#pragma once

#include "cluster_nodes.h"

namespace pc {

// All moves of all samples in one launch, on the current device, for a run that `describe_cluster` has filled in.
// Returns null, or why not: a chip without clusters (before sm_90), or what the CUDA runtime said.
const char* infer_cluster(const ClusterRun& run, void* stream);

}  // namespace pc
