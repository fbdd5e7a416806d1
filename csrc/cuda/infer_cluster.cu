// SPDX-License-Identifier: MIT
// The cluster-resident kernel (sm_90 and up): all T moves in one launch. What it computes, and in what order:
// cluster_body.h, which the CPU tests run; where things lie: cluster_plan.h. Here is what a CTA is made of: 8 warps,
// products on the tensor cores, peers' shared memory. Not yet run on hardware.
#include <cooperative_groups.h>
#include <cuda_runtime.h>

#include "cluster_body.h"
#include "infer_cluster.h"
#include "mma_lanes.h"

namespace pc {
namespace {

constexpr int kThreads = 256;

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900

constexpr int kLanes = 32, kWarps = kThreads / kLanes;

struct Warp {
  int rank, size;

  __device__ __forceinline__ float sum(float x) const {
#pragma unroll
    for (int step = kLanes / 2; step > 0; step /= 2) x += __shfl_xor_sync(0xffffffffu, x, step);
    return x;
  }
  __device__ __forceinline__ float max(float x) const {
#pragma unroll
    for (int step = kLanes / 2; step > 0; step /= 2) {
      const float other = __shfl_xor_sync(0xffffffffu, x, step);
      x = other > x ? other : x;
    }
    return x;
  }
};

// sums (16 x 8) += left (16 x 16) right (16 x 8), bfloat16 operands in the lanes' shares
__device__ __forceinline__ void multiply(float (&sums)[4], const uint32_t (&left)[4], uint32_t right0, uint32_t right1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(left[0]), "r"(left[1]), "r"(left[2]), "r"(left[3]), "r"(right0), "r"(right1));
}

struct Cta {
  int cta;
  char* memory;

  __device__ __forceinline__ char* base(int of) const {
    return of == cta ? memory : cooperative_groups::this_cluster().map_shared_rank(memory, of);
  }
  __device__ __forceinline__ void sync() const { __syncthreads(); }
  __device__ __forceinline__ void sync_cluster() const { cooperative_groups::this_cluster().sync(); }

  // the number becomes `to` where it is 0 (none yet) or more; whoever comes first, the lowest stays
  __device__ __forceinline__ void lower(int64_t* number, int64_t to) const {
    auto* word = reinterpret_cast<unsigned long long*>(number);
    const auto wanted = static_cast<unsigned long long>(to);
    unsigned long long found = *word;
    while (found == 0 || found > wanted) {
      const unsigned long long before = atomicCAS(word, found, wanted);
      if (before == found) return;
      found = before;
    }
  }

  template <class F>
  __device__ __forceinline__ void each(int count, const F& f) const {
    for (int i = static_cast<int>(threadIdx.x); i < count; i += kThreads) f(i);
    __syncthreads();
  }
  template <class F>
  __device__ __forceinline__ void rows(const F& f) const {
    const Warp warp{static_cast<int>(threadIdx.x) % kLanes, kLanes};
    for (int m = static_cast<int>(threadIdx.x) / kLanes; m < kTile; m += kWarps) f(m, warp);
    __syncthreads();
  }

  // f(m, column, sum over k < inner of left[m][k] right[column][k]) for the eight columns from column(tile) on of every tile
  template <class Column, class F>
  __device__ __forceinline__ void product(const Bf16* left, int64_t left_pitch, const Bf16* right, int64_t right_pitch,
                                          int64_t inner, int64_t tiles, const Column& column, const F& f) const {
    const int lane = static_cast<int>(threadIdx.x) % kLanes, end = static_cast<int>(inner);
    for (int tile = static_cast<int>(threadIdx.x) / kLanes; tile < tiles; tile += kWarps) {
      const int first = static_cast<int>(column(tile));
      const Bf16* rows = right + first * static_cast<int>(right_pitch);
      float sums[4] = {0, 0, 0, 0};
#pragma unroll 4
      for (int k = 0; k < end; k += 16) {
        uint32_t share[4], pairs[2];
        load_left(share, left + k, static_cast<int>(left_pitch), lane);
        load_right(pairs, rows + k, static_cast<int>(right_pitch), lane);
        multiply(sums, share, pairs[0], pairs[1]);
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) f(sum_row(lane, i), first + sum_column(lane, i), sums[i]);
    }
    __syncthreads();
  }

  // f(m, column, tile, sum over k < inner of left[m][k] right[k][column]); a tile whose column is kNowhere is left out
  template <class Column, class F>
  __device__ __forceinline__ void product_transposed(const Bf16* left, int64_t left_pitch, const Bf16* right, int64_t right_pitch,
                                                     int64_t inner, int64_t tiles, const Column& column, const F& f) const {
    const int lane = static_cast<int>(threadIdx.x) % kLanes, end = static_cast<int>(inner);
    for (int tile = static_cast<int>(threadIdx.x) / kLanes; tile < tiles; tile += kWarps) {
      const int64_t first = column(tile);
      if (first == kNowhere) continue;
      const Bf16* corner = right + matrix_row(lane) * static_cast<int>(right_pitch) + first;
      float sums[4] = {0, 0, 0, 0};
      for (int k = 0; k < end; k += 16) {
        uint32_t share[4], pairs[2];
        load_left(share, left + k, static_cast<int>(left_pitch), lane);
        const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(corner + k * static_cast<int>(right_pitch)));
        asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];"
                     : "=r"(pairs[0]), "=r"(pairs[1])
                     : "r"(address)
                     : "memory");
        multiply(sums, share, pairs[0], pairs[1]);
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) f(sum_row(lane, i), first + sum_column(lane, i), tile, sums[i]);
    }
    __syncthreads();
  }
};

__global__ void __launch_bounds__(kThreads, 1) cluster_kernel(const __grid_constant__ ClusterRun run) {
  extern __shared__ __align__(kAlign) char memory[];
  const Cta cta{static_cast<int>(cooperative_groups::this_cluster().block_rank()), memory};
  ClusterBody<Cta>(cta, run, blockIdx.x / kCluster).solve();
}

#else  // this chip has no clusters; the launcher says so

__global__ void cluster_kernel(const __grid_constant__ ClusterRun) {}

#endif

const char* said_of(cudaError_t error) { return error == cudaSuccess ? nullptr : cudaGetErrorString(error); }

}  // namespace

const char* infer_cluster(const ClusterRun& run, void* stream) {
  const int64_t blocks = (run.batch + kTile - 1) / kTile * kCluster;
  if (blocks == 0) return nullptr;
  if (blocks > INT32_MAX) return "the batch is too large for one launch; split it";
  int device = 0, major = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (error != cudaSuccess) return cudaGetErrorString(error);
  if (major < 9) return "the cluster-resident kernel needs thread block clusters, which a GPU has from compute capability 9.0 on";
  error = cudaFuncSetAttribute(cluster_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(run.plan.bytes));
  if (error != cudaSuccess) return cudaGetErrorString(error);
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = kCluster, cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  cudaLaunchConfig_t launch{};
  launch.gridDim = dim3(static_cast<unsigned>(blocks)), launch.blockDim = dim3(kThreads);
  launch.dynamicSmemBytes = run.plan.bytes, launch.stream = static_cast<cudaStream_t>(stream);
  launch.attrs = &cluster, launch.numAttrs = 1;
  return said_of(cudaLaunchKernelEx(&launch, cluster_kernel, run));
}

}  // namespace pc
