// SPDX-License-Identifier: MIT
// Schedule (a) on the GPU: two launches of tiles a move, rows where they are needed. What a block does: layers_body.h, which the
// CPU tests run; here is what a block is made of: 4 warps, a tile of 32 x 32, products on tensor cores (WMMA, which hides how
// lanes share a tile) or, in float32, by FMA; operands come by cp.async, four stages: a launch waits for memory, not for arithmetic.
#include <mma.h>

#include "common.cuh"
#include "infer_layers.h"
#include "layer_ops.h"
#include "layers_body.h"
#include "lowest.cuh"

namespace pc {
namespace {

constexpr int kTileThreads = 128, kStages = 4, kPad = 16;  // bytes between rows in shared memory, so that they start in different banks
constexpr int kSumPitch = kColumnsOfTile + 4;

template <class T>
struct Stages {
  static constexpr int kInner = 128 / static_cast<int>(sizeof(T));  // of the products in a stage; divides kPadding
  static constexpr int kLeft = kInner + kPad / static_cast<int>(sizeof(T));            // pitch of rows of kInner
  static constexpr int kAcross = kColumnsOfTile + kPad / static_cast<int>(sizeof(T));  // and of kColumnsOfTile
  static constexpr int kRight = kColumnsOfTile * kLeft > kInner * kAcross ? kColumnsOfTile * kLeft : kInner * kAcross;
  T left[kStages][kRowsOfTile * kLeft];
  T right[kStages][kRight];
};

template <class T>
struct alignas(128) Shared {
  Stages<T> stages;
  alignas(128) float sums[kRowsOfTile * kSumPitch];
};

__device__ __forceinline__ void copy_16(void* shared, const void* global) {
  const auto to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(global) : "memory");
}

// rows x columns entries, by all threads
template <class T>
__device__ __forceinline__ void copy_tile(T* to, int to_pitch, const T* from, int64_t pitch, int rows, int columns) {
  constexpr int kEach = 16 / sizeof(T);
  const int across = columns / kEach;
  for (int i = static_cast<int>(threadIdx.x); i < rows * across; i += kTileThreads) {
    const int row = i / across, column = i % across * kEach;
    copy_16(to + row * to_pitch + column, from + row * pitch + column);
  }
}

template <class T>
struct Block {
  Shared<T>& shared;

  // sums = left (32 x inner) times right: (32 x inner) transposed, or (Across) (inner x 32); inner is a multiple of kPadding
  template <bool Across>
  __device__ __forceinline__ void multiply(const T* left, int64_t left_pitch, const T* right, int64_t right_pitch, int64_t inner,
                                           Products products) const {
    if constexpr (sizeof(T) == 2) multiply_by<Halves, Across>(left, left_pitch, right, right_pitch, inner);
    else if (products == Products::tf32) multiply_by<Tensor32, Across>(left, left_pitch, right, right_pitch, inner);
    else multiply_by<Exact<Products::fp32>, Across>(left, left_pitch, right, right_pitch, inner);
  }
  // the same (not across) in float32, of operands rounded as the precision has it in the forward pass
  __device__ __forceinline__ void multiply_rounded(const T* left, int64_t left_pitch, const T* right, int64_t right_pitch, int64_t inner,
                                                   Products products) const {
    if (products == Products::bf16) multiply_by<Exact<Products::bf16>, false>(left, left_pitch, right, right_pitch, inner);
    else if (products == Products::tf32) multiply_by<Exact<Products::tf32>, false>(left, left_pitch, right, right_pitch, inner);
    else multiply_by<Exact<Products::fp32>, false>(left, left_pitch, right, right_pitch, inner);
  }
  template <class Accumulator, bool Across>
  __device__ __forceinline__ void multiply_by(const T* left, int64_t left_pitch, const T* right, int64_t right_pitch, int64_t inner) const {
    constexpr int kInner = Stages<T>::kInner;
    const int count = static_cast<int>(inner / kInner);
    const auto fetch = [&](int k) {
      Stages<T>& s = shared.stages;
      const int stage = k % kStages;
      if (k < count) {
        copy_tile(s.left[stage], Stages<T>::kLeft, left + k * kInner, left_pitch, kRowsOfTile, kInner);
        if constexpr (Across) {
          copy_tile(s.right[stage], Stages<T>::kAcross, right + k * kInner * right_pitch, right_pitch, kInner, kColumnsOfTile);
        } else {
          copy_tile(s.right[stage], Stages<T>::kLeft, right + k * kInner, right_pitch, kColumnsOfTile, kInner);
        }
      }
      asm volatile("cp.async.commit_group;" ::: "memory");
    };
    Accumulator accumulator;
    for (int k = 0; k + 1 < kStages; ++k) fetch(k);
    for (int k = 0; k < count; ++k) {
      asm volatile("cp.async.wait_group %0;" ::"n"(kStages - 2) : "memory");
      __syncthreads();  // stage k has come, and what the next fetch overwrites has been used by all
      fetch(k + kStages - 1);
      accumulator.template add<Across>(shared.stages, k % kStages);
    }
    accumulator.store(shared.sums);
    __syncthreads();
  }

  // f(row, column, four sums) for the tile's quads
  template <class F>
  __device__ __forceinline__ void quads(const F& f) const {
    for (int i = static_cast<int>(threadIdx.x); i < kRowsOfTile * kColumnsOfTile / 4; i += kTileThreads) {
      const int row = i / (kColumnsOfTile / 4), column = i % (kColumnsOfTile / 4) * 4;
      const float4 got = *reinterpret_cast<const float4*>(shared.sums + row * kSumPitch + column);
      const Four x = {got.x, got.y, got.z, got.w};
      f(row, column, x);
    }
  }

  // a warp's 16 x 16 part of the tile
  template <int K, class Element, class Load>
  struct Part {
    nvcuda::wmma::fragment<nvcuda::wmma::accumulator, 16, 16, K, float> sums;

    __device__ __forceinline__ Part() { nvcuda::wmma::fill_fragment(sums, 0.0f); }
    static __device__ __forceinline__ int row() { return static_cast<int>(threadIdx.x) / kWarp / 2 * 16; }
    static __device__ __forceinline__ int column() { return static_cast<int>(threadIdx.x) / kWarp % 2 * 16; }
    template <bool Across>
    __device__ __forceinline__ void add(const Stages<T>& s, int stage) {
      using namespace nvcuda::wmma;
      using Order = std::conditional_t<Across, row_major, col_major>;
      constexpr int kPitch = Across ? Stages<T>::kAcross : Stages<T>::kLeft;
#pragma unroll
      for (int k = 0; k < Stages<T>::kInner; k += K) {
        fragment<matrix_a, 16, 16, K, Element, row_major> left;
        load_matrix_sync(left, Load::cast(s.left[stage] + row() * Stages<T>::kLeft + k), Stages<T>::kLeft);
        Load::round(left);
        fragment<matrix_b, 16, 16, K, Element, Order> right;
        load_matrix_sync(right, Load::cast(s.right[stage] + (Across ? k * kPitch + column() : column() * kPitch + k)), kPitch);
        Load::round(right);
        mma_sync(sums, left, right, sums);
      }
    }
    __device__ __forceinline__ void store(float* to) const {
      nvcuda::wmma::store_matrix_sync(to + row() * kSumPitch + column(), sums, kSumPitch, nvcuda::wmma::mem_row_major);
    }
  };
  struct AsBfloat16 {
    static __device__ __forceinline__ const __nv_bfloat16* cast(const T* at) { return reinterpret_cast<const __nv_bfloat16*>(at); }
    template <class Fragment>
    static __device__ __forceinline__ void round(Fragment&) {}
  };
  struct AsTensor32 {
    static __device__ __forceinline__ const float* cast(const T* at) { return reinterpret_cast<const float*>(at); }
    template <class Fragment>
    static __device__ __forceinline__ void round(Fragment& of) {
      for (int i = 0; i < of.num_elements; ++i) of.x[i] = nvcuda::wmma::__float_to_tf32(of.x[i]);
    }
  };
  using Halves = Part<16, __nv_bfloat16, AsBfloat16>;
  using Tensor32 = Part<8, nvcuda::wmma::precision::tf32, AsTensor32>;

  template <Products P>
  struct Exact {  // a thread's 4 x 2 part, by FMA, of operands rounded as P says
    float sums[4][2] = {};

    static __device__ __forceinline__ int row() { return static_cast<int>(threadIdx.x) / 16 * 4; }
    static __device__ __forceinline__ int column(int i) { return static_cast<int>(threadIdx.x) % 16 + 16 * i; }
    template <bool Across>
    __device__ __forceinline__ void add(const Stages<T>& s, int stage) {
#pragma unroll 8
      for (int k = 0; k < Stages<T>::kInner; ++k) {
        float left[4], right[2];
        for (int i = 0; i < 4; ++i) left[i] = operand<P>(widen(s.left[stage][(row() + i) * Stages<T>::kLeft + k]));
        for (int i = 0; i < 2; ++i) {
          right[i] = operand<P>(widen(s.right[stage][Across ? k * Stages<T>::kAcross + column(i) : column(i) * Stages<T>::kLeft + k]));
        }
        for (int i = 0; i < 4; ++i) {
          for (int j = 0; j < 2; ++j) sums[i][j] = fmaf(left[i], right[j], sums[i][j]);
        }
      }
    }
    __device__ __forceinline__ void store(float* to) const {
      for (int i = 0; i < 4; ++i) {
        for (int j = 0; j < 2; ++j) to[(row() + i) * kSumPitch + column(j)] = sums[i][j];
      }
    }
  };
};

// ---------------------------------------------------------------------------------------------------------------------
// kernels

template <class T>
__global__ void __launch_bounds__(kTileThreads, 4) tiles_kernel(const __grid_constant__ LayersRun run, Phase phase, int64_t t) {
  __shared__ Shared<T> shared;
  const Block<T> block{shared};
  const LayersBody<T> body{run, t};
  body.find(phase, blockIdx.x, [&](int64_t l, int64_t tile) {
    if (phase == Phase::predict) body.predict(block, l, tile);
    else body.update(block, l, tile);
  });
}

struct RowTeam {  // a warp
  int rank, size;
  __device__ __forceinline__ double sum(double x) const { return across_warp(x, Sum()); }
  __device__ __forceinline__ float max(float x) const { return across_warp(x, Most()); }
  __device__ __forceinline__ void sync() const { __syncwarp(); }
};

template <class T>
__global__ void __launch_bounds__(kWarp * kRowsOfBlock, 2) rows_kernel(const __grid_constant__ LayersRun run, Phase phase, int64_t t) {
  const LayersBody<T> body{run, t};
  const RowTeam team{static_cast<int>(threadIdx.x) % kWarp, kWarp};
  body.find(phase, blockIdx.x, [&](int64_t l, int64_t some) {
    const int64_t m = some * kRowsOfBlock + threadIdx.x / kWarp;
    if (m >= run.batch) return;
    if (phase == Phase::predict_rows) body.predict_row(team, l, m);
    else body.update_row(team, l, m);
  });
}

// One block a row of weights, or of x.
template <class T>
__global__ void copy_in_kernel(const __grid_constant__ LayersRun run, int64_t weights) {
  const LayersBody<T> body{run, 0};
  int64_t row = blockIdx.x;
  if (row >= weights) {
    for (int64_t k = threadIdx.x; k < run.plan[0].inputs; k += blockDim.x) body.copy_x(row - weights, k);
    return;
  }
  int64_t l = 0;
  for (; row >= run.plan[l].width; ++l) row -= run.plan[l].width;
  for (int64_t k = threadIdx.x; k < run.plan[l].inputs; k += blockDim.x) body.copy_weight(l, row, k);
}

template <class T>
__global__ void __launch_bounds__(kTileThreads, 4) start_kernel(const __grid_constant__ LayersRun run, int64_t l) {
  __shared__ Shared<float> shared;
  LayersBody<T>{run, 0}.start(Block<float>{shared}, l, blockIdx.x);
}

template <class T>
__global__ void __launch_bounds__(kWarp * kRowsOfBlock, 2) start_rows_kernel(const __grid_constant__ LayersRun run, int64_t l) {
  const int64_t m = int64_t{blockIdx.x} * kRowsOfBlock + threadIdx.x / kWarp;
  if (m < run.batch) LayersBody<T>{run, 0}.start_row(RowTeam{static_cast<int>(threadIdx.x) % kWarp, kWarp}, l, m);
}

template <class T>
__global__ void copy_out_kernel(const __grid_constant__ LayersRun run) {
  const LayersBody<T> body{run, run.steps};
  const int64_t l = blockIdx.x / run.batch, m = blockIdx.x % run.batch;
  if (run.nodes[l].clamped) return;
  bool finite = true;
  for (int64_t j = threadIdx.x; j < run.plan[l].width; j += blockDim.x) finite = body.copy_out(l, m, j) && finite;
  if (!finite) lower(run.diverged, l + 1);
}

// ---------------------------------------------------------------------------------------------------------------------
// launches

int64_t blocks_of(const LayersRun& run, Phase phase, int64_t t) {
  int64_t blocks = 0;
  for (int64_t l = 0; l < run.count; ++l) blocks += blocks_of(run, phase, l, t);
  return blocks;
}

template <class T>
struct Launches {
  const LayersRun& run;
  cudaStream_t stream;

  const char* phase(Phase phase, int64_t t) const {
    const int64_t blocks = blocks_of(run, phase, t);
    if (blocks == 0) return nullptr;
    if (blocks > INT32_MAX) return "the batch is too large for one launch; split it";
    const bool rows = phase == Phase::predict_rows || phase == Phase::update_rows;
    const unsigned grid = static_cast<unsigned>(blocks);
    if (rows) rows_kernel<T><<<grid, kWarp * kRowsOfBlock, 0, stream>>>(run, phase, t);
    else tiles_kernel<T><<<grid, kTileThreads, 0, stream>>>(run, phase, t);
    return launch_error();
  }
  const char* copy_in() const {
    int64_t weights = 0;
    for (int64_t l = 0; l < run.count; ++l) weights += run.plan[l].width;
    const int64_t blocks = weights + run.batch;
    if (blocks > INT32_MAX) return "the batch is too large for one launch; split it";
    copy_in_kernel<T><<<static_cast<unsigned>(blocks), 256, 0, stream>>>(run, weights);
    return launch_error();
  }
  const char* start(int64_t l) const {
    const int64_t tiles = tiles_of(run, run.plan[l].width);
    if (tiles > INT32_MAX) return "the batch is too large for one launch; split it";
    start_kernel<T><<<static_cast<unsigned>(tiles), kTileThreads, 0, stream>>>(run, l);
    const char* error = launch_error();
    if (error != nullptr || !LayersBody<T>{run, 0}.by_rows(l)) return error;
    start_rows_kernel<T><<<static_cast<unsigned>(rows_of(run)), kWarp * kRowsOfBlock, 0, stream>>>(run, l);
    return launch_error();
  }
  const char* copy_out() const {
    copy_out_kernel<T><<<static_cast<unsigned>(run.count * run.batch), 256, 0, stream>>>(run);
    return launch_error();
  }
  const char* trace(const NodeDesc* nodes, int64_t t) const {
    if (run.energy == nullptr) return nullptr;
    return layer_errors_cuda(nodes, run.count, run.batch, Memory::float32, run.energy + t * run.count * run.batch, stream);
  }
  const char* all() const {
    NodeDesc nodes[kMaxLayers];
    nodes_of_trace(run, nodes);
    const char* error = copy_in();
    for (int64_t l = 0; l < run.count && error == nullptr; ++l) error = start(l);
    for (int64_t t = 0; t <= run.steps && error == nullptr; ++t) {
      error = phase(Phase::predict, t);
      if (error == nullptr) error = phase(Phase::predict_rows, t);
      if (error == nullptr) error = trace(nodes, t);
      if (t == run.steps) break;
      if (error == nullptr) error = phase(Phase::update, t);
      if (error == nullptr) error = phase(Phase::update_rows, t);
    }
    return error == nullptr ? copy_out() : error;
  }
};

}  // namespace

const char* infer_layers(const LayersRun& run, void* stream) {
  const auto on = static_cast<cudaStream_t>(stream);
  if (run.batch == 0) return nullptr;
  return halves(run.products) ? Launches<Bf16>{run, on}.all() : Launches<float>{run, on}.all();
}

}  // namespace pc
