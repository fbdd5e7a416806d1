// SPDX-License-Identifier: MIT
// Teams of threads with reductions in a fixed order, and the check of a launch.
#pragma once

#include <cuda_runtime.h>

#include "node_table.h"

namespace pc {

struct Sum {
  template <class T>
  __device__ T operator()(T a, T b) const { return a + b; }
};
struct Most {
  __device__ float operator()(float a, float b) const { return a > b ? a : b; }
};

template <class T, class Op>
__device__ __forceinline__ T across_warp(T x, Op op) {  // the same pairs for every lane: all get the same bits
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) x = op(x, __shfl_xor_sync(0xffffffffu, x, step));
  return x;
}

// A warp, or the whole block. `room` has a place for each warp, in shared memory.
struct Team {
  int rank, size;
  double* room;

  template <class T, class Op>
  __device__ __forceinline__ T reduce(T x, Op op) const {
    x = across_warp(x, op);
    if (size == kWarp) return x;
    T* place = reinterpret_cast<T*>(room);
    __syncthreads();  // the last reduction has been read by all
    if (threadIdx.x % kWarp == 0) place[threadIdx.x / kWarp] = x;
    __syncthreads();
    x = place[0];
    for (int warp = 1; warp < kWarps; ++warp) x = op(x, place[warp]);
    return x;
  }
  __device__ __forceinline__ double sum(double x) const { return reduce(x, Sum()); }
  __device__ __forceinline__ float max(float x) const { return reduce(x, Most()); }
};

// The teams of this thread.
struct Teams {
  int warp;
  double* room;

  __device__ __forceinline__ Team line(bool by_warp) const {
    const int thread = static_cast<int>(threadIdx.x);
    return by_warp ? Team{thread % kWarp, kWarp, room} : Team{thread, kThreads, room};
  }
  __device__ __forceinline__ double sum_of_warps(double x) const {  // x is the same in all lanes of a warp
    __syncthreads();
    if (threadIdx.x % kWarp == 0) room[warp] = x;
    __syncthreads();
    double total = 0;
    for (int i = 0; i < kWarps; ++i) total += room[i];
    return total;
  }
};

inline const char* launch_error() {
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace pc
