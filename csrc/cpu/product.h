// SPDX-License-Identifier: MIT
// The two matrix products of a layer for a tile of samples, on a micro-kernel from torch (oneDNN's brgemm, BLAS
// where a machine has none, and for float64). Everything is row-major; a tile is `m` rows.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/native/CPUBlas.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/mm.h>

#include <algorithm>
#include <cstdint>

namespace pc {

constexpr int64_t kPanel = 64;  // columns of one micro-kernel call: 4 vectors of 16 floats

// One layer's weight (width, inputs), and its transpose in panels: [panel][inputs][columns of the panel].
template <class T>
struct Weight {
  int64_t width, inputs;
  const T* rows;
  const T* panels;  // null for float64, whose product takes the transpose as it stands
  const at::BFloat16 *forward_pairs, *backward_pairs;  // W^T and W for `bf16_delta`, or null
};

inline int64_t panel_count(int64_t width) { return (width + kPanel - 1) / kPanel; }

// Panel p of W^T. Reads a line of each row at a time, so that every line is read once.
template <class T>
void pack_panel(const T* rows, int64_t width, int64_t inputs, int64_t p, T* panels) {
  const int64_t first = p * kPanel, columns = std::min(kPanel, width - first);
  T* panel = panels + first * inputs;
  constexpr int64_t kLine = 16;
  for (int64_t k0 = 0; k0 < inputs; k0 += kLine) {
    const int64_t k1 = std::min(inputs, k0 + kLine);
    for (int64_t j = 0; j < columns; ++j) {
      const T* row = rows + (first + j) * inputs;
      for (int64_t k = k0; k < k1; ++k) panel[k * columns + j] = row[k];
    }
  }
}

// Rows of a bfloat16 operand come in pairs: [panel][inner / 2][columns of the panel][2], a missing last row as zeros.
inline int64_t paired(int64_t inner) { return (inner + 1) / 2 * 2; }

// Panel p of the (inner, outer) matrix whose entry (k, j) is w[k * step_k + j * step_j].
inline void pack_pair_panel(const float* w, int64_t inner, int64_t outer, int64_t step_k, int64_t step_j, int64_t p,
                            at::BFloat16* pairs) {
  const int64_t first = p * kPanel, columns = std::min(kPanel, outer - first);
  at::BFloat16* panel = pairs + first * paired(inner);
  for (int64_t k = 0; k < paired(inner); ++k) {
    at::BFloat16* row = panel + k / 2 * columns * 2 + k % 2;
    for (int64_t j = 0; j < columns; ++j) row[2 * j] = k < inner ? w[k * step_k + (first + j) * step_j] : 0.0f;
  }
}

// out (m, outer) = left (m, inner) times such pairs, added to out if asked
inline void multiply_pairs(int64_t m, int64_t inner, int64_t outer, const at::BFloat16* left, int64_t ldl,
                           const at::BFloat16* pairs, bool add, float* out, int64_t ldo) {
  for (int64_t first = 0; first < outer; first += kPanel) {
    const int64_t columns = std::min(kPanel, outer - first), inner2 = paired(inner);
    at::native::cpublas::brgemm(m, columns, inner2, ldl, columns, ldo, add, left, pairs + first * inner2, out + first, true);
  }
}

// out (m, width) = v (m, inputs) W^T
inline void forward(const Weight<float>& w, int64_t m, const float* v, int64_t ldv, float* out, int64_t ldo) {
  for (int64_t first = 0; first < w.width; first += kPanel) {
    const int64_t columns = std::min(kPanel, w.width - first);
    at::native::cpublas::brgemm(m, columns, w.inputs, ldv, columns, ldo, false, v, w.panels + first * w.inputs, out + first);
  }
}

// out (m, inputs) = delta (m, width) W
inline void backward(const Weight<float>& w, int64_t m, const float* delta, int64_t ldd, float* out, int64_t ldo) {
  for (int64_t first = 0; first < w.inputs; first += kPanel) {
    const int64_t columns = std::min(kPanel, w.inputs - first);
    at::native::cpublas::brgemm(m, columns, w.width, ldd, w.inputs, ldo, false, delta, w.rows + first, out + first);
  }
}

// out (m, width) = x (m, inputs) W^T for a product that is done once: W as it stands is the left factor and the tile is
// transposed instead, since packing W would cost more than the product. room: m * (inputs + kPanel).
inline void forward_once(const Weight<float>& w, int64_t m, const float* x, int64_t ldx, float* out, int64_t ldo, float* room) {
  float *columns = room, *block = room + m * w.inputs;
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t k = 0; k < w.inputs; ++k) columns[k * m + i] = x[i * ldx + k];
  }
  for (int64_t first = 0; first < w.width; first += kPanel) {
    const int64_t rows = std::min(kPanel, w.width - first);
    at::native::cpublas::brgemm(rows, m, w.inputs, w.inputs, m, m, false, w.rows + first * w.inputs, columns, block);
    for (int64_t i = 0; i < m; ++i) {
      for (int64_t j = 0; j < rows; ++j) out[i * ldo + first + j] = block[j * m + i];
    }
  }
}

// float64 goes through torch's own product on views of the tile; brgemm has no such micro-kernel.
inline at::Tensor view_of(const double* data, int64_t rows, int64_t columns, int64_t pitch) {
  return at::from_blob(const_cast<double*>(data), {rows, columns}, {pitch, 1}, at::TensorOptions().dtype(at::kDouble));
}
inline void forward(const Weight<double>& w, int64_t m, const double* v, int64_t ldv, double* out, int64_t ldo) {
  at::Tensor to = view_of(out, m, w.width, ldo);
  at::mm_out(to, view_of(v, m, w.inputs, ldv), view_of(w.rows, w.width, w.inputs, w.inputs).t());
}
inline void backward(const Weight<double>& w, int64_t m, const double* delta, int64_t ldd, double* out, int64_t ldo) {
  at::Tensor to = view_of(out, m, w.inputs, ldo);
  at::mm_out(to, view_of(delta, m, w.width, ldd), view_of(w.rows, w.width, w.inputs, w.inputs));
}
inline void forward_once(const Weight<double>& w, int64_t m, const double* x, int64_t ldx, double* out, int64_t ldo, double*) {
  forward(w, m, x, ldx, out, ldo);
}

}  // namespace pc
