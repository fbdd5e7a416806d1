// SPDX-License-Identifier: MIT
// Which entries a lane of a warp holds for mma.m16n8k16 with bfloat16 operands, and which rows it names to ldmatrix (PTX ISA,
// "Matrix Fragments for mma.m16n8k16", "ldmatrix"); host and device, so that the CPU tests check the shares against the definition.
#pragma once

#include "bfloat16.h"

namespace pc {

struct MatrixRow {  // its first of eight entries
  int row, column;
};

// Of the left operand's four 8 x 8 matrices lane i gives a row of the (i / 8)-th. The operand is 16 x 16: as it lies in memory, or
// (across) its transpose, read by ldmatrix.trans.
PC_HD MatrixRow left_row(int lane, bool across) {
  const int within = lane % 8, low = lane / 8 % 2 * 8, high = lane / 16 * 8;
  return across ? MatrixRow{high + within, low} : MatrixRow{low + within, high};
}

// Of right operands that lie as lines of 8 (k x 8, read by ldmatrix.trans): one line a lane; four matrices are two operands.
PC_HD int right_line(int lane) { return lane; }

// where the lane's i-th of four sums stands in the 16 x 8 result
PC_HD int sum_row(int lane, int i) { return lane / 4 + i / 2 * 8; }
PC_HD int sum_column(int lane, int i) { return lane % 4 * 2 + i % 2; }

}  // namespace pc
