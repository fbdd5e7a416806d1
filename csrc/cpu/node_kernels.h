// SPDX-License-Identifier: MIT
// Kernels for one sample of one node, shared by the layer ops and the T-step engine. Sums have a fixed order.
#pragma once

#include "../pc_math.h"

namespace pc {

// One sample of one node.
template <class T>
struct View {
  int64_t rows, width, phi_width;
  const T *phi, *mu, *log_var;
  const int64_t* index;
  const uint8_t *mask, *hold;
  T *grad_phi, *grad_mu;
  T* room;  // `row_room` entries, for row families
  T prior = 0;  // of gaussian_full, as in LayerDesc
};

// What a row family needs beside its inputs and outputs: three rows, of as many as are worked on together.
PC_HD int64_t row_room(int64_t width) { return 3 * width * rows_at_once(width); }

template <class V>
PC_HD V* at(V* pointer, int64_t offset) {
  return pointer == nullptr ? nullptr : pointer + offset;
}

// What is computed (kDeltas: energy and dE/dmu); kTarget...: phi is the target.
enum class Form { kErrors, kEnergy, kGradPhi, kGradMu, kDeltas, kTargetErrors, kTargetEnergy, kTargetGradMu };

// x <- 0 where the flags (null: none) equal `flag`
template <class T>
void zero_where(uint8_t flag, const uint8_t* flags, int64_t n, T* x) {
  if (flags == nullptr || x == nullptr) return;
  PC_INDEPENDENT
  for (int64_t i = 0; i < n; ++i) x[i] = pick(flags[i] ^ flag, x[i], T(0));
}

// The energy, and on the way what `form` asks for.
template <class T>
double run_node(Energy energy, const View<T>& v, Form form);

// What a node steps along, g of n entries: dE/dphi, or phi - mu where `natural`, plus the feedback (null: none).
template <class T>
void direction(Energy energy, bool natural, View<T> v, int64_t n, const T* feedback, T* g);

// The entries that move, in `flags`; null when all do.
const uint8_t* moving(const uint8_t* mask, const uint8_t* hold, int64_t n, uint8_t* flags);

// u <- momentum u + g, phi <- max(phi - lr u, floor) where `moves` (null: everywhere); velocity null: u = g.
template <class T>
void move_row(int64_t n, const T* g, const uint8_t* moves, T lr, T momentum, T floor, T* phi, T* velocity);

}  // namespace pc
