// SPDX-License-Identifier: MIT
// The lowest number that any thread names.
#pragma once

#include <cstdint>

namespace pc {

// *number becomes `to` where it is 0 (none yet) or more; whoever comes first, the lowest stays
__device__ __forceinline__ void lower(int64_t* number, int64_t to) {
  auto* word = reinterpret_cast<unsigned long long*>(number);
  const auto wanted = static_cast<unsigned long long>(to);
  unsigned long long found = *word;
  while (found == 0 || found > wanted) {
    const unsigned long long before = atomicCAS(word, found, wanted);
    if (before == found) return;
    found = before;
  }
}

}  // namespace pc
