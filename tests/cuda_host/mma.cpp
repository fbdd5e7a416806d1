// SPDX-License-Identifier: MIT
// mma.m16n8k16 and ldmatrix.x2.trans by their definitions in the PTX ISA, on the shares of csrc/cuda/mma_lanes.h.
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

// Lanes 0-7 give the rows of the first 8 x 8 matrix, lanes 8-15 those of the second; with .trans lane l gets the entries
// (2 (l % 4), l / 4) and (2 (l % 4) + 1, l / 4) of each.
void ldmatrix_x2_trans(uint32_t (&to)[32][2], const pc::Bf16* (&rows)[32]) {
  for (int lane = 0; lane < 32; ++lane) {
    for (int matrix = 0; matrix < 2; ++matrix) {
      const pc::Bf16* const* first = rows + 8 * matrix + 2 * (lane % 4);
      const uint32_t low = first[0][lane / 4].bits, high = first[1][lane / 4].bits;
      to[lane][matrix] = low | high << 16;
    }
  }
}

}  // namespace

// out (16, 8) <- left (16, 16; rows of left_pitch) times right: 8 rows of 16, transposed; or 16 rows of 8, as it stands
extern "C" void multiply_tile(const uint16_t* left, int left_pitch, const uint16_t* right, int right_pitch, bool stands, float* out) {
  const auto* a = reinterpret_cast<const pc::Bf16*>(left);
  const auto* b = reinterpret_cast<const pc::Bf16*>(right);
  uint32_t shares[32][4], pairs[32][2];
  const pc::Bf16* rows[32];
  for (int lane = 0; lane < 32; ++lane) {
    pc::load_left(shares[lane], a, left_pitch, lane);
    rows[lane] = b + pc::matrix_row(lane) * right_pitch;
    if (!stands) pc::load_right(pairs[lane], b, right_pitch, lane);
  }
  if (stands) ldmatrix_x2_trans(pairs, rows);
  float sums[32][4] = {};
  mma(sums, shares, pairs);
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < 4; ++i) out[pc::sum_row(lane, i) * 8 + pc::sum_column(lane, i)] = sums[lane][i];
  }
}

extern "C" void round_bf16(const float* from, int n, uint16_t* to) {
  for (int i = 0; i < n; ++i) to[i] = pc::to_bf16(from[i]).bits;
}
