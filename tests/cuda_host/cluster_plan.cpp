// SPDX-License-Identifier: MIT
// The cluster kernel's planner for Python.
#include "cuda/cluster_plan.h"

#include <cstring>

// 0 and the plan; or 1 and, in `why`, the reason
extern "C" int plan_cluster(const int64_t* widths, const bool* states, const bool* softmaxes, const bool* keeps,
                            int64_t count, bool momentum, pc::ClusterPlan* plan, char* why, int64_t room) {
  pc::LayerShape shapes[64];
  for (int64_t l = 0; l < count && l < 64; ++l) shapes[l] = {widths[l], states[l], softmaxes[l], keeps[l]};
  const std::string said = pc::plan_cluster(shapes, count, momentum, *plan);
  std::strncpy(why, said.c_str(), room - 1);
  return said.empty() ? 0 : 1;
}

extern "C" int64_t size_of_plan() { return sizeof(pc::ClusterPlan); }
