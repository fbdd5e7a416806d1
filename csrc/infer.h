// SPDX-License-Identifier: MIT
// What the T-step engine is told: plain pointers and sizes, no torch. The CPU and CUDA engines take the same descriptor.
#pragma once

#include <cstdint>

#include "pc_math.h"
#include "schedule.h"

namespace pc {

// One layer and the node that it predicts. Tensors are contiguous; T (float or double) is the working type of every `void`;
// a null pointer means "none". phi rows have half the width for a clamped `gaussian_full` node.
struct LayerDesc {
  int64_t width, inputs;  // D_l, V_{l-1}
  const void* weight;     // (width, inputs)
  const void* bias;       // (width,)
  Activation activation;
  Energy energy;
  int feed;      // an Activation or kSampleFeed; not read of the last node
  bool natural;  // step along (phi - mu) + feedback
  double lr;     // lr * lr_scale
  const void* log_var;  // (width,)
  double prior;         // the energy of a free gaussian_full node gains this times itself at mu = 0

  bool clamped;          // `given` or `index` is the target
  bool passes_target;    // a clamped inner node whose target stands in place of its feed
  const void* given;     // (batch, phi width): the state at t = 0, or the target; null: forward value
  const int64_t* index;  // (batch,): class indices as the target
  const uint8_t* mask;   // 1 = takes part; (1 or batch, phi width; width for class indices)
  int64_t mask_sample;   // entries to the next sample's mask, 0 where the batch shares one
  const uint8_t* hold;   // 1 = held
  int64_t hold_sample;
  const void* noise;  // (batch, width / 2) of a node that feeds on its sample

  void* phi;    // (batch, width) out, of a free node
  void* delta;  // (batch, width) out
};

struct InferDesc {
  const void* x;  // (batch, layers[0].inputs)
  int64_t batch;
  const LayerDesc* layers;
  int64_t count;
  int64_t steps;
  double momentum, tol;  // tol < 0: none
  const Move* moves;     // `steps` of them at most; after the last given one it repeats
  int64_t move_count;
  bool bf16_delta;   // float only: the first pre-activations exact, then bf16(dv) bf16(W)^T added; feedback from bf16 operands
  double* energies;  // (steps + 1, count, batch) or null: each sample's energies before each move and after the last
};

struct InferOutcome {
  int64_t steps = 0;     // of the slowest sample
  int64_t products = 0;  // matrix products of the tile that did most
  int64_t layer = 0;     // first non-finite state, 1-based; 0: none
  int64_t step = -1;     // its move, where energies were asked for
};

template <class T>
InferOutcome infer_cpu(const InferDesc& run);

}  // namespace pc
