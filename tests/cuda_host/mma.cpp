// SPDX-License-Identifier: MIT
// mma.m16n8k16 and ldmatrix.x4 by their definitions in the PTX ISA, on the shares of csrc/cuda/mma_lanes.h.
#include "cuda/mma_lanes.h"

namespace {

float half_of(uint32_t pair, int which) { return pc::widen(pc::Bf16{static_cast<uint16_t>(pair >> (16 * which))}); }

// "groupID = %laneid >> 2, threadID_in_group = %laneid % 4" and the tables that follow it
void mma(float (&sums)[32][4], const uint32_t (&a)[32][4], const uint32_t (&b)[32][2]) {
  float left[16][16], right[16][8];
  for (int lane = 0; lane < 32; ++lane) {
    const int group = lane >> 2, thread = lane % 4;
    for (int i = 0; i < 8; ++i) {  // a_i
      const int row = i < 2 || (i >= 4 && i < 6) ? group : group + 8;
      const int column = thread * 2 + (i & 1) + (i < 4 ? 0 : 8);
      left[row][column] = half_of(a[lane][i / 2], i % 2);
    }
    for (int i = 0; i < 4; ++i) {  // b_i
      right[thread * 2 + (i & 1) + (i < 2 ? 0 : 8)][group] = half_of(b[lane][i / 2], i % 2);
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    const int group = lane >> 2, thread = lane % 4;
    for (int i = 0; i < 4; ++i) {  // c_i
      const int row = i < 2 ? group : group + 8, column = thread * 2 + (i & 1);
      for (int k = 0; k < 16; ++k) sums[lane][i] += left[row][k] * right[k][column];
    }
  }
}

// Lanes 8 i to 8 i + 7 give the rows of the i-th 8 x 8 matrix; lane l gets its entries (l / 4, 2 (l % 4)) and the next of each,
// with .trans (2 (l % 4), l / 4) and (2 (l % 4) + 1, l / 4).
void ldmatrix_x4(uint32_t (&to)[32][4], const pc::Bf16* (&rows)[32], bool trans) {
  for (int lane = 0; lane < 32; ++lane) {
    for (int matrix = 0; matrix < 4; ++matrix) {
      const pc::Bf16* const* row = rows + 8 * matrix;
      const int first = lane % 4 * 2, other = lane / 4;
      const uint32_t low = trans ? row[first][other].bits : row[other][first].bits;
      const uint32_t high = trans ? row[first + 1][other].bits : row[other][first + 1].bits;
      to[lane][matrix] = low | high << 16;
    }
  }
}

}  // namespace

// out (16, 8) <- left (16, 32), or (across) the transpose of (32, 16), rows of `pitch`, times lines (32, 8)
extern "C" void multiply_tile(const uint16_t* left, int pitch, bool across, const uint16_t* lines, float* out) {
  const auto* a = reinterpret_cast<const pc::Bf16*>(left);
  const auto* b = reinterpret_cast<const pc::Bf16*>(lines);
  uint32_t first[32][4], second[32][4], both[32][4], low[32][2], high[32][2];
  const pc::Bf16 *now[32], *then[32], *line[32];
  for (int lane = 0; lane < 32; ++lane) {
    const pc::MatrixRow row = pc::left_row(lane, across);
    now[lane] = a + row.row * pitch + row.column;
    then[lane] = now[lane] + 16 * (across ? pitch : 1);
    line[lane] = b + 8 * pc::right_line(lane);
  }
  ldmatrix_x4(first, now, across), ldmatrix_x4(second, then, across), ldmatrix_x4(both, line, true);
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < 2; ++i) low[lane][i] = both[lane][i], high[lane][i] = both[lane][2 + i];
  }
  float sums[32][4] = {};
  mma(sums, first, low), mma(sums, second, high);
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < 4; ++i) out[pc::sum_row(lane, i) * 8 + pc::sum_column(lane, i)] = sums[lane][i];
  }
}

extern "C" void round_bf16(const float* from, int n, uint16_t* to) {
  for (int i = 0; i < n; ++i) to[i] = pc::to_bf16(from[i]).bits;
}
