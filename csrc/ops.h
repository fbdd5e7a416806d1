// SPDX-License-Identifier: MIT
// What a kernel launcher is told: pointers and sizes, no torch. The CPU and CUDA launchers take the same descriptor.
#pragma once

#include <cstdint>

#include "pc_math.h"

namespace pc {

// One node. T (float, double) is the working type of every `void`. A sample is `rows` rows of mu's `width` entries; phi has
// rows of half the width for a clamped `gaussian_full` node. All tensors are contiguous; a null pointer means "none".
struct NodeDesc {
  Energy energy;
  bool clamped;          // phi is the target
  int64_t rows, width;
  int64_t phi_sample, mu_sample;  // entries from one sample to the next

  const void* phi;       // state or target; null for a target of class indices
  const void* mu;
  const int64_t* index;  // (batch, rows): the target of a clamped `categorical` node as class indices, in [0, width)
  const void* log_var;   // (rows, width), shared by the batch: `gaussian_diag`
  const uint8_t* mask;   // 1 = takes part; of phi's shape (mu's for class indices)
  int64_t mask_sample;   // entries to the next sample's mask, 0 where the batch shares one
  const uint8_t* hold;   // 1 = held; of phi's shape
  int64_t hold_sample;

  // outputs of layer_errors; null: not wanted
  void* grad_phi;        // of a free node
  void* grad_mu;

  // update_phi only
  bool natural;          // direction (phi - mu) + feedback in place of dE/dphi + feedback
  void* state;           // phi, to be moved
  void* velocity;
  const void* feedback;
  double lr;             // of this node: lr * lr_scale
};

// energy[node * batch + sample] (null: not wanted) and, where asked for, the gradients.
template <class T>
void layer_errors_cpu(const NodeDesc* nodes, int64_t count, int64_t batch, T* energy);

// One move of every node.
template <class T>
void update_phi_cpu(const NodeDesc* nodes, int64_t count, int64_t batch, double momentum);

}  // namespace pc
