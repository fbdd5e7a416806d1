// SPDX-License-Identifier: MIT
// bfloat16 as bits, host and device alike, so that both round the same way.
#pragma once

#include "../pc_numerics.h"

namespace pc {

struct Bf16 {
  uint16_t bits;
};

PC_HD uint32_t bits_of(float x) {
  uint32_t u;
  memcpy(&u, &x, sizeof u);
  return u;
}
PC_HD float float_of(uint32_t u) {
  float x;
  memcpy(&x, &u, sizeof x);
  return x;
}

PC_HD float widen(float x) { return x; }
PC_HD float widen(Bf16 x) { return float_of(static_cast<uint32_t>(x.bits) << 16); }

// to the nearest, ties to even; NaN stays NaN
PC_HD Bf16 to_bf16(float x) {
  const uint32_t u = bits_of(x);
  if ((u & 0x7fffffffu) > 0x7f800000u) return {static_cast<uint16_t>(0x7fc0u)};
  return {static_cast<uint16_t>((u + 0x7fffu + ((u >> 16) & 1u)) >> 16)};
}

PC_HD void narrow(float x, float& out) { out = x; }
PC_HD void narrow(float x, Bf16& out) { out = to_bf16(x); }

}  // namespace pc
