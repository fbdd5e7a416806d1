// SPDX-License-Identifier: MIT
// The cluster-resident kernel (sm_90 and up): all T moves in one launch. What it computes, and in what order:
// cluster_body.h, which the CPU tests run; where things lie: cluster_plan.h. Here is what a CTA is made of: 16 warps,
// products on the tensor cores, peers' shared memory.
#include <cooperative_groups.h>
#include <cuda_runtime.h>

#include "cluster_body.h"
#include "cluster_owned.h"
#include "infer_cluster.h"
#include "lowest.cuh"
#include "mma_lanes.h"

namespace pc {
namespace {

constexpr int kThreads = 32 * kWarpsOfCta;

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900

constexpr int kLanes = 32, kWarps = kThreads / kLanes;
constexpr int kAbreast = 4;  // blocks that share what is read of the lines

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
__device__ __forceinline__ void multiply_add(Four& sums, const uint32_t (&left)[4], uint32_t right0, uint32_t right1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(left[0]), "r"(left[1]), "r"(left[2]), "r"(left[3]), "r"(right0), "r"(right1));
}

// four 8 x 8 matrices from shared memory, a row's address from each lane
template <bool Transposed>
__device__ __forceinline__ void load_matrices(uint32_t (&to)[4], uint32_t address) {
  if constexpr (Transposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "r"(address) : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "r"(address) : "memory");
  }
}

// two of them, transposed
__device__ __forceinline__ void load_lines(uint32_t (&to)[2], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];" : "=r"(to[0]), "=r"(to[1]) : "r"(address) : "memory");
}

__device__ __forceinline__ uint32_t shared_address(const void* at) { return static_cast<uint32_t>(__cvta_generic_to_shared(at)); }

struct Cta {
  int cta;
  char* memory;

  __device__ __forceinline__ char* base(int of) const {
    return of == cta ? memory : cooperative_groups::this_cluster().map_shared_rank(memory, of);
  }
  __device__ __forceinline__ void sync() const { __syncthreads(); }
  __device__ __forceinline__ void sync_cluster() const { cooperative_groups::this_cluster().sync(); }

  __device__ __forceinline__ void lower(int64_t* number, int64_t to) const { pc::lower(number, to); }

  template <class F>
  __device__ __forceinline__ void each(int count, const F& f) const {  // f(i) by all threads
    for (int i = static_cast<int>(threadIdx.x); i < count; i += kThreads) f(i);
    __syncthreads();
  }
  template <class F>
  __device__ __forceinline__ void warps(int count, const F& f) const {  // f(i) by a warp
    for (int i = static_cast<int>(threadIdx.x) / kLanes; i < count; i += kWarps) f(i);
  }
  template <class F>
  __device__ __forceinline__ void rows(const F& f) const {  // f(sample, team)
    const Warp warp{static_cast<int>(threadIdx.x) % kLanes, kLanes};
    warps(kTile, [&](int m) { f(m, warp); });
    __syncthreads();
  }

  // f(warp) by each warp; what a lane owns from one such call to the next
  template <class F>
  __device__ __forceinline__ void team(const F& f) const { f(static_cast<int>(threadIdx.x) / kLanes); }
  template <class T>
  struct Own {
    T mine;
    __device__ __forceinline__ T& of(int, int, int) { return mine; }
  };

  // inside `warps`: f(i) by the lanes; f(c, m) for the quads (c, c + 8) x (m, m + 1) of 16 columns, one a lane
  template <int Unroll = 4, class F>
  __device__ __forceinline__ void lanes(int count, const F& f) const {
#pragma unroll Unroll
    for (int i = static_cast<int>(threadIdx.x) % kLanes; i < count; i += kLanes) f(i);
  }
  __device__ __forceinline__ void sync_warp() const { __syncwarp(); }
  // f(i, the lanes' sum of x[i]), i by the i-th lane: at each step a lane passes on one half and keeps the other
  template <int N, class F>
  __device__ __forceinline__ void totals(float (&x)[N], const F& f) const {
    static_assert(N == kLanes, "one for each lane");
    const int lane = static_cast<int>(threadIdx.x) % kLanes;
    halve<N / 2>(x, lane);
    f(lane, x[0]);
  }
  template <int Half, int N>
  __device__ __forceinline__ void halve(float (&x)[N], int lane) const {
    const bool upper = (lane & Half) != 0;
#pragma unroll
    for (int i = 0; i < Half; ++i) {
      const float give = upper ? x[i] : x[i + Half], keep = upper ? x[i + Half] : x[i];
      x[i] = keep + __shfl_xor_sync(0xffffffffu, give, Half);
    }
    if constexpr (Half > 1) halve<Half / 2>(x, lane);
  }
  template <class F>
  __device__ __forceinline__ void quads(const F& f) const {
    const int lane = static_cast<int>(threadIdx.x) % kLanes;
    f(sum_row(lane, 0), sum_column(lane, 0));
  }

  // f(c, m, sums) for the quads of sum over k < inner of W[c][k] v[k][m], c in a block of 16. v: lines of 8
  template <class F>
  __device__ __forceinline__ void multiply(const Bf16* weight, int pitch, const Bf16* lines, int inner, const F& f) const {
    const int lane = static_cast<int>(threadIdx.x) % kLanes;
    const MatrixRow row = left_row(lane, false);
    uint32_t left = shared_address(weight + row.row * pitch + row.column), right = shared_address(lines + right_line(lane) * kTile);
    constexpr uint32_t step = 16 * sizeof(Bf16);
    Four even = {0, 0, 0, 0}, odd = {0, 0, 0, 0};
    int k = 0;
#pragma unroll 4
    for (; k + 32 <= inner; k += 32) {
      uint32_t first[4], second[4], both[4];
      load_matrices<false>(first, left);
      load_matrices<false>(second, left + step);
      load_matrices<true>(both, right);
      multiply_add(even, first, both[0], both[1]);
      multiply_add(odd, second, both[2], both[3]);
      left += 2 * step, right += 32 * sizeof(Line);
    }
    if (k < inner) {
      uint32_t first[4], both[4];
      load_matrices<false>(first, left);
      load_matrices<true>(both, lane < 16 ? right : right - 16 * static_cast<uint32_t>(sizeof(Line)));  // there is half of it
      multiply_add(even, first, both[0], both[1]);
    }
    for (int i = 0; i < 4; ++i) even[i] += odd[i];
    f(sum_row(lane, 0), sum_column(lane, 0), even);
  }

  // f(c, m, sums) for the quads of sum over k < inner of W[k][c] v[k][m], c in `blocks` blocks of 16
  template <class F>
  __device__ __forceinline__ void multiply_across(const Bf16* weight, int pitch, const Bf16* lines, int inner, int blocks, const F& f) const {
    int first = 0;
    for (; first + kAbreast <= blocks; first += kAbreast) across<kAbreast>(weight, pitch, lines, inner, first, f);
    for (; first < blocks; ++first) across<1>(weight, pitch, lines, inner, first, f);
  }
  template <int N, class F>
  __device__ __forceinline__ void across(const Bf16* weight, int pitch, const Bf16* lines, int inner, int first, const F& f) const {
    const int lane = static_cast<int>(threadIdx.x) % kLanes;
    const MatrixRow row = left_row(lane, true);
    uint32_t left = shared_address(weight + row.row * pitch + row.column + first * kUnit);
    uint32_t right = shared_address(lines + right_line(lane) % 16 * kTile);
    Four sums[N] = {};
#pragma unroll 4
    for (int k = 0; k < inner; k += 16) {
      uint32_t line[2], block[N][4];
      load_lines(line, right);
#pragma unroll
      for (int n = 0; n < N; ++n) load_matrices<true>(block[n], left + n * static_cast<uint32_t>(kUnit * sizeof(Bf16)));
#pragma unroll
      for (int n = 0; n < N; ++n) multiply_add(sums[n], block[n], line[0], line[1]);
      left += 16 * pitch * static_cast<uint32_t>(sizeof(Bf16)), right += 16 * sizeof(Line);
    }
#pragma unroll
    for (int n = 0; n < N; ++n) f((first + n) * kUnit + sum_row(lane, 0), sum_column(lane, 0), sums[n]);
  }
};

template <bool Bare>
__global__ void __launch_bounds__(kThreads, 1) cluster_kernel(const __grid_constant__ ClusterRun run) {
  extern __shared__ __align__(kAlign) char memory[];
  const Cta cta{static_cast<int>(cooperative_groups::this_cluster().block_rank()), memory};
  if constexpr (Bare) ClusterOwned<Cta>(cta, run, blockIdx.x / kCluster).solve();
  else ClusterBody<Cta>(cta, run, blockIdx.x / kCluster).solve();
}

#else  // this chip has no clusters, and nobody launches it there: cuda_infer.py looks at what the build holds for the chip

template <bool Bare>
__global__ void cluster_kernel(const __grid_constant__ ClusterRun) {
  __trap();
}

#endif

const char* said_of(cudaError_t error) {
  if (error == cudaSuccess) return nullptr;
  cudaGetLastError();  // or the next launch of anyone would find it
  return cudaGetErrorString(error);
}

}  // namespace

const char* infer_cluster(const ClusterRun& run, void* stream) {
  const int64_t blocks = (run.batch + kTile - 1) / kTile * kCluster;
  if (blocks == 0) return nullptr;
  if (blocks > INT32_MAX) return "the batch is too large for one launch; split it";
  int device = 0, major = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (error != cudaSuccess) return said_of(error);
  if (major < 9) return "the cluster-resident kernel needs thread block clusters, which a GPU has from compute capability 9.0 on";
  const auto kernel = is_bare(run) ? cluster_kernel<true> : cluster_kernel<false>;
  error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(run.plan.bytes));
  if (error != cudaSuccess) return said_of(error);
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = kCluster, cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  cudaLaunchConfig_t launch{};
  launch.gridDim = dim3(static_cast<unsigned>(blocks)), launch.blockDim = dim3(kThreads);
  launch.dynamicSmemBytes = run.plan.bytes, launch.stream = static_cast<cudaStream_t>(stream);
  launch.attrs = &cluster, launch.numAttrs = 1;
  return said_of(cudaLaunchKernelEx(&launch, kernel, run));
}

}  // namespace pc
