// SPDX-License-Identifier: MIT
// Which entries a lane of a warp holds for mma.m16n8k16 with bfloat16 operands (PTX ISA, "Matrix Fragments for mma.m16n8k16");
// host and device, so that the CPU tests check the shares against the definition.
#pragma once

#include "bfloat16.h"

namespace pc {

PC_HD uint32_t pair_at(const Bf16* at) { return *reinterpret_cast<const uint32_t*>(at); }

// of a 16 x 16 left operand, row-major
PC_HD void load_left(uint32_t (&share)[4], const Bf16* from, int pitch, int lane) {
  const Bf16* at = from + (lane / 4) * pitch + (lane % 4) * 2;
  share[0] = pair_at(at), share[1] = pair_at(at + 8 * pitch);
  share[2] = pair_at(at + 8), share[3] = pair_at(at + 8 * pitch + 8);
}

// of a 16 x 8 right operand that lies transposed, as 8 rows of 16
PC_HD void load_right(uint32_t (&share)[2], const Bf16* from, int pitch, int lane) {
  const Bf16* at = from + (lane / 4) * pitch + (lane % 4) * 2;
  share[0] = pair_at(at), share[1] = pair_at(at + 8);
}

// The row of a 16 x 8 right operand, as it stands, whose address the lane gives to ldmatrix.x2.trans; lanes 16.. repeat.
PC_HD int matrix_row(int lane) { return lane % 16; }

// where the lane's i-th of four sums stands in the 16 x 8 result
PC_HD int sum_row(int lane, int i) { return lane / 4 + i / 2 * 8; }
PC_HD int sum_column(int lane, int i) { return lane % 4 * 2 + i % 2; }

}  // namespace pc
