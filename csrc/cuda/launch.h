// SPDX-License-Identifier: MIT
// The torch side of the CUDA launchers: device guard, current stream, the check of a launch. Only in builds with CUDA.
#pragma once

#include <vector>

#include "../describe.h"
#include "../ops.h"

namespace pc {

void errors_on_device(const std::vector<NodeDesc>& nodes, int64_t batch, const Call& call, float* energy);
void update_on_device(const std::vector<NodeDesc>& nodes, int64_t batch, const Call& call, double momentum);

}  // namespace pc
