// SPDX-License-Identifier: MIT
// Four neighbouring entries of a line in one access; host and device. float32 or bfloat16 in memory, float32 in registers.
#pragma once

#include "bfloat16.h"

namespace pc {

constexpr int kQuad = 4;

struct Quad {
  float x[kQuad];
};
struct Flags {
  bool on[kQuad];
};
template <class S>
struct alignas(kQuad * sizeof(S)) Packed {
  S x[kQuad];
};

template <class S>
PC_HD S* at(S* pointer, int64_t offset) {
  return pointer == nullptr ? nullptr : pointer + offset;
}

// Whether entries i, i + 4, ... of the array can be had in one access each; nothing stands in the way of a null array.
template <class S>
PC_HD bool packs(const S* array) {
  return reinterpret_cast<uintptr_t>(array) % sizeof(Packed<S>) == 0;
}

// Entries i..i+3 of an array of n; those past its end are 0. wide: all arrays pack and n is a multiple of four.
template <class S>
PC_HD Quad load(const S* array, int64_t i, int64_t n, bool wide) {
  Quad out{};
  if (wide) {
    const Packed<S> got = *reinterpret_cast<const Packed<S>*>(array + i);
    for (int j = 0; j < kQuad; ++j) out.x[j] = widen(got.x[j]);
  } else {
    for (int j = 0; j < kQuad; ++j) out.x[j] = i + j < n ? widen(array[i + j]) : 0.0f;
  }
  return out;
}

// null: nothing is wanted
template <class S>
PC_HD void store(const Quad& from, S* array, int64_t i, int64_t n, bool wide) {
  if (array == nullptr) return;
  if (wide) {
    Packed<S> put;
    for (int j = 0; j < kQuad; ++j) narrow(from.x[j], put.x[j]);
    *reinterpret_cast<Packed<S>*>(array + i) = put;
  } else {
    for (int j = 0; j < kQuad; ++j) {
      if (i + j < n) narrow(from.x[j], array[i + j]);
    }
  }
}

// Which of the entries are there and flagged; null: every one that is there.
PC_HD Flags flagged(const uint8_t* flags, uint8_t as, int64_t i, int64_t n, bool wide) {
  Flags out;
  if (flags != nullptr && wide) {
    const Packed<uint8_t> got = *reinterpret_cast<const Packed<uint8_t>*>(flags + i);
    for (int j = 0; j < kQuad; ++j) out.on[j] = got.x[j] == as;
  } else {
    for (int j = 0; j < kQuad; ++j) out.on[j] = i + j < n && (flags == nullptr || flags[i + j] == as);
  }
  return out;
}

}  // namespace pc
