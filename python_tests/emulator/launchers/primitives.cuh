// Kernels that call every function of device.cuh, ptx.cuh and hopper.cuh, so that tests expect the same results of the emulator and a GPU.
#pragma once
#include <type_traits>

#include "cuda/rows.cuh"
#include "hopper.cuh"
#include "kernel_table.h"

namespace sts {

// out[i] = to_float(in[i]), 16 bytes at a time.
template <class T>
__global__ void to_float_kernel(const T* in, float* out, int vectors) {
  constexpr int kSize = 16 / sizeof(T);
  for (int i = threadIdx.x; i < vectors; i += blockDim.x) {
    const uint4 bits = __ldg(reinterpret_cast<const uint4*>(in + i * kSize));
    T values[kSize];
    memcpy(values, &bits, 16);
#pragma unroll
    for (int v = 0; v < kSize; ++v) out[i * kSize + v] = to_float(values[v]);
  }
}
template <class T>
cudaError_t launch_to_float(const T* in, float* out, int count, cudaStream_t stream) {
  return launch(to_float_kernel<T>, {dim3(1), dim3(64), 0, 1, false, stream}, in, out, count / static_cast<int>(16 / sizeof(T)));
}
STS_KERNEL(primitive_to_float32, launch_to_float<float>);
STS_KERNEL(primitive_to_float16, launch_to_float<__half>);
STS_KERNEL(primitive_to_bfloat16, launch_to_float<__nv_bfloat16>);

// in (n) float32 -> out (n), rounded to T.
template <class T>
__global__ void round_kernel(const float* in, T* out, int n) {
  for (int i = threadIdx.x; i < n; i += blockDim.x) {
    if constexpr (std::is_same_v<T, __half>)
      out[i] = __float2half_rn(in[i]);
    else
      out[i] = __float2bfloat16_rn(in[i]);
  }
}
template <class T>
cudaError_t launch_round(const float* in, T* out, int n, cudaStream_t stream) {
  return launch(round_kernel<T>, {dim3(1), dim3(64), 0, 1, false, stream}, in, out, n);
}
STS_KERNEL(primitive_round_float16, launch_round<__half>);
STS_KERNEL(primitive_round_bfloat16, launch_round<__nv_bfloat16>);

// out (m, n) = a (m, k) b (n, k)^T on tensor cores: cp.async into two stages of dynamic shared memory, ldmatrix, mma.
// A block computes kMatmulRows x 16 of out, a warp 16 x 16. k is a multiple of 8.
constexpr int kMatmulRows = 32, kMatmulStage = (kMatmulRows + 16) * 24;  // rows of 16, 24 apart: no bank conflicts

template <class T>
__global__ void __launch_bounds__(kMatmulRows * 2) matmul_kernel(const T* a, const T* b, float* out, int m, int n, int k) {
  STS_DYNAMIC_SHARED(T, stages);
  const int tid = threadIdx.x, lane = tid % 32, warp = tid / 32;
  const int row0 = blockIdx.y * kMatmulRows, column0 = blockIdx.x * 16;
  const auto load = [&](int stage, int k0) {
    T* tile = stages + stage * kMatmulStage;
    for (int c = tid; c < (kMatmulRows + 16) * 2; c += kMatmulRows * 2) {
      const int row = c / 2, column = c % 2 * 8;
      const bool of_a = row < kMatmulRows;
      const int global_row = of_a ? row0 + row : column0 + row - kMatmulRows;
      const bool inside = global_row < (of_a ? m : n) && k0 + column < k;
      cp_async_16(tile + row * 24 + column, (of_a ? a : b) + static_cast<int64_t>(global_row) * k + k0 + column, inside);
    }
    cp_async_commit();
  };
  float sum[2][4] = {};
  load(0, 0);
  for (int k0 = 0, stage = 0; k0 < k; k0 += 16, stage ^= 1) {
    load(stage ^ 1, k0 + 16);
    cp_async_wait<1>();
    __syncthreads();
    const T* tile = stages + stage * kMatmulStage;
    uint32_t fragment_a[4], fragment_b[4];
    ldmatrix_x4(fragment_a, tile + (warp * 16 + lane % 16) * 24 + lane / 16 * 8);
    ldmatrix_x4(fragment_b, tile + (kMatmulRows + lane % 8 + lane / 16 * 8) * 24 + lane / 8 % 2 * 8);
    mma_16x8x16(sum[0], fragment_a, {fragment_b[0], fragment_b[1]}, T());
    mma_16x8x16(sum[1], fragment_a, {fragment_b[2], fragment_b[3]}, T());
    __syncthreads();
  }
  cp_async_wait<0>();
#pragma unroll
  for (int half = 0; half < 2; ++half)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = row0 + warp * 16 + lane / 4 + i / 2 * 8, column = column0 + half * 8 + lane % 4 * 2 + i % 2;
      if (row < m && column < n) out[static_cast<int64_t>(row) * n + column] = sum[half][i];
    }
}
template <class T>
cudaError_t launch_matmul(const T* a, const T* b, float* out, int m, int n, int k, cudaStream_t stream) {
  const Launch shape{
      dim3((n + 15) / 16, (m + kMatmulRows - 1) / kMatmulRows), dim3(kMatmulRows * 2), 2 * kMatmulStage * sizeof(T), 1, false, stream};
  return launch(matmul_kernel<T>, shape, a, b, out, m, n, k);
}
STS_KERNEL(primitive_matmul_float16, launch_matmul<__half>);
STS_KERNEL(primitive_matmul_bfloat16, launch_matmul<__nv_bfloat16>);

// out (items, m, n) = a (items, m, k) b (items, n, k)^T by TMA and wgmma: a producer warp, two stages, and a warpgroup that computes
// 64 x kColumns of out. The row pitch of a and b is k, a multiple of 8. kBlocks: of a cluster, 1 or 2; a block reads its part of the 64 rows
// of a and multicasts it.
template <class T, int kColumns, int kBlocks>
__global__ void __launch_bounds__(hopper_threads(160))
    hopper_matmul_kernel(const __grid_constant__ TensorMap map_a, const __grid_constant__ TensorMap map_b, float* out, int m, int n,
                         int k) {
#if STS_HOPPER
  STS_DYNAMIC_SHARED(unsigned char, memory);
  __shared__ Mbarrier full[2], empty[2];
  constexpr int kStage = (64 + kColumns) * kBoxChannels;
  T* const stages = reinterpret_cast<T*>(memory + (1024 - reinterpret_cast<uintptr_t>(memory) % 1024) % 1024);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, steps = (k + kBoxChannels - 1) / kBoxChannels;
  const int row0 = blockIdx.y * 64, column0 = blockIdx.x * kColumns, item = blockIdx.z;
  const int rank = blockIdx.x % kBlocks;
  if (threadIdx.x < 2) {
    mbarrier_init(&full[threadIdx.x]);
    mbarrier_init(&empty[threadIdx.x], 4 * kBlocks);
  }
  meet_cluster();
  if (warp == 4) {
    for (int step = 0; lane == 0 && step < steps; ++step) {
      T* const stage = stages + step % 2 * kStage;
      if (step >= 2) mbarrier_wait(&empty[step % 2], step / 2 - 1);
      mbarrier_expect_tx(&full[step % 2], kStage * 2);
      if (kBlocks == 1)
        copy_box(stage, map_a, step * kBoxChannels, 0, row0, item, &full[step % 2]);
      else
        multicast_box(stage + rank * 32 * kBoxChannels, map_a, step * kBoxChannels, 0, row0 + rank * 32, item, &full[step % 2], kBlocks);
      copy_box(stage + 64 * kBoxChannels, map_b, step * kBoxChannels, 0, column0, item, &full[step % 2]);
    }
    return meet_cluster();
  }
  float sum[kColumns / 2];
  for (int step = 0; step < steps; ++step) {
    const T* const stage = stages + step % 2 * kStage;
    mbarrier_wait(&full[step % 2], step / 2);
    wgmma_fence();
    for (int c = 0; c < kBoxChannels / 16; ++c) wgmma(sum, stage, stage + 64 * kBoxChannels, c, step + c > 0);
    wgmma_commit();
    wgmma_finish(sum);
    if (lane < kBlocks) mbarrier_arrive_at(&empty[step % 2], lane);
  }
  meet_cluster();
#pragma unroll
  for (int s = 0; s < kColumns / 2; ++s) {
    const int row = row0 + warp * 16 + lane / 4 + s / 2 % 2 * 8, column = column0 + s / 4 * 8 + lane % 4 * 2 + s % 2;
    if (row < m && column < n) out[(static_cast<int64_t>(item) * m + row) * n + column] = sum[s];
  }
#endif
}
template <class T>
cudaError_t launch_hopper_matmul(const T* a, const T* b, float* out, int items, int m, int n, int k, int columns, int cluster,
                                 cudaStream_t stream) {
  TensorMap map_a, map_b;
  cudaError_t error = make_tensor_map(a, k, 1, m, items, k, 64 / cluster, map_a);
  if (error == cudaSuccess) error = make_tensor_map(b, k, 1, n, items, k, columns, map_b);
  if (error != cudaSuccess) return error;
  const unsigned tiles = (n + columns - 1) / columns;
  const Launch shape{dim3((tiles + cluster - 1) / cluster * cluster, (m + 63) / 64, items),
                     dim3(160),
                     size_t(2) * (64 + columns) * 128 + 1024,
                     static_cast<unsigned>(cluster),
                     false,
                     stream};
  const auto kernel = cluster == 2    ? hopper_matmul_kernel<T, 64, 2>
                      : columns == 64 ? hopper_matmul_kernel<T, 64, 1>
                                      : hopper_matmul_kernel<T, 128, 1>;
  if (!kernel_serves(kernel, 160)) return cudaErrorInvalidConfiguration;
  return launch(kernel, shape, map_a, map_b, out, m, n, k);
}
STS_KERNEL(primitive_hopper_matmul_float16, launch_hopper_matmul<__half>);
STS_KERNEL(primitive_hopper_matmul_bfloat16, launch_hopper_matmul<__nv_bfloat16>);

// Each group of blocks rotates its values, 64 per block, by one block in each of `steps` steps.
__global__ void __launch_bounds__(64) rotate_kernel(float* values, unsigned* arrived, int group_blocks, int steps) {
  const int group = blockIdx.x / group_blocks, rank = blockIdx.x % group_blocks;
  GroupBarrier barrier(arrived + group, group_blocks);
  float* group_values = values + static_cast<int64_t>(group) * group_blocks * 64;
  for (int step = 0; step < steps; ++step) {
    const float next = group_values[(rank + 1) % group_blocks * 64 + threadIdx.x];
    barrier.sync();
    group_values[rank * 64 + threadIdx.x] = next;
    barrier.sync();
  }
}
inline cudaError_t launch_rotate(float* values, unsigned* arrived, int groups, int group_blocks, int steps, cudaStream_t stream) {
  if (groups * group_blocks > max_resident_blocks(rotate_kernel, 64, 0)) return cudaErrorCooperativeLaunchTooLarge;
  const cudaError_t error = cudaMemsetAsync(arrived, 0, groups * sizeof(unsigned), stream);
  if (error != cudaSuccess) return error;
  return launch(rotate_kernel, {dim3(groups * group_blocks), dim3(64), 0, 1, true, stream}, values, arrived, group_blocks, steps);
}
STS_KERNEL(primitive_turn, launch_rotate);

// The result of each collective for each thread's value. One block of whole warps; out (8, n).
__global__ void collectives_kernel(const int* values, int* out, int* counter) {
  __shared__ int total;
  const int n = blockDim.x, tid = threadIdx.x, value = values[tid];
  if (tid == 0) total = 0;
  __syncthreads();
  out[tid] = __shfl_sync(~0u, value, (tid + 5) % 32);
  out[n + tid] = __shfl_xor_sync(~0u, value, 6, 8);
  out[2 * n + tid] = __shfl_up_sync(~0u, value, 3, 16);
  out[3 * n + tid] = __shfl_down_sync(~0u, value, 3, 16);
  out[4 * n + tid] = static_cast<int>(__ballot_sync(~0u, value > 0));
  out[5 * n + tid] = tid % 2 ? __reduce_min_sync(0xaaaaaaaau, value) : __reduce_add_sync(0x55555555u, value);
  out[6 * n + tid] = __syncthreads_count(value > 0);
  atomicAdd(&total, value);
  atomicMax(counter, value);
  __syncthreads();
  out[7 * n + tid] = total;
}
inline cudaError_t launch_collectives(const int* values, int* out, int* counter, int n, cudaStream_t stream) {
  return launch(collectives_kernel, {dim3(1), dim3(n), 0, 1, false, stream}, values, out, counter);
}
STS_KERNEL(primitive_collectives, launch_collectives);

// A cluster of 4 blocks sums its values through distributed shared memory, static and dynamic. sm_90.
constexpr int kCluster = 4;
__global__ void __launch_bounds__(32) cluster_kernel(const float* values, float* sums) {
#if __CUDA_ARCH__ >= 900
  STS_DYNAMIC_SHARED(float, received);
  __shared__ float given[32];
  const auto cluster = cooperative_groups::this_cluster();
  const int rank = static_cast<int>(cluster.block_rank());
  given[threadIdx.x] = values[blockIdx.x * 32 + threadIdx.x];
  cluster.sync();
  if (threadIdx.x < kCluster) {
    const float* remote = cluster.map_shared_rank(given, static_cast<int>(threadIdx.x));
    float sum = 0;
    for (int i = 0; i < 8; ++i) sum += remote[rank * 8 + i];
    cluster.map_shared_rank(received, 0)[rank * kCluster + threadIdx.x] = sum;
  }
  cluster.sync();
  if (rank != 0 || threadIdx.x != 0) return;
  float sum = 0;
  for (int i = 0; i < kCluster * kCluster; ++i) sum += received[i];
  sums[blockIdx.x / kCluster] = sum;
#endif
}
inline cudaError_t launch_cluster(const float* values, float* sums, int clusters, cudaStream_t stream) {
  return launch(cluster_kernel, {dim3(clusters * kCluster), dim3(32), kCluster * kCluster * sizeof(float), kCluster, false, stream}, values,
                sums);
}
STS_KERNEL(primitive_cluster, launch_cluster);

// The blocks of a cluster exchange messages of 4 and of 16 bytes by st.async. In each step a warp passes its values on to the same warp of
// the next block, and sends their sum modulo 8 to all blocks, where all sums are added to each value. Double-buffered without a reader-side
// barrier: a warp that has all messages of a step knows that all warps have read those of the step before. sm_90.
struct alignas(16) Letter {
  float sum;
  int block, warp, step;
};
__global__ void __launch_bounds__(64) letters_kernel(const float* values, float* out, int steps) {
#if __CUDA_ARCH__ >= 900
  __shared__ Mbarrier barriers[2];
  __shared__ float passed[2][64];
  __shared__ Letter letters[2][kCluster][2];
  const auto cluster = cooperative_groups::this_cluster();
  const int rank = static_cast<int>(cluster.block_rank()), lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  if (threadIdx.x < 2) mbarrier_init(&barriers[threadIdx.x]);
  cluster.sync();
  float value = values[blockIdx.x * 64 + threadIdx.x];
  for (int step = 0; step < steps; ++step) {
    Mbarrier* const barrier = &barriers[step & 1];
    if (threadIdx.x == 0) mbarrier_expect_tx(barrier, sizeof passed[0] + sizeof letters[0]);
    const float sum = fmodf(warp_sum(value), 8);
    __syncwarp();  // all lanes have read the messages of the previous step
    store_async(&passed[step & 1][threadIdx.x], value, barrier, (rank + 1) % kCluster);
    if (lane < kCluster) store_async(&letters[step & 1][rank][warp], {sum, rank, warp, step}, barrier, lane);
    mbarrier_wait(barrier, step / 2);
    value = passed[step & 1][threadIdx.x];
    for (int block = 0; block < kCluster; ++block)
      for (int other = 0; other < 2; ++other) {
        const Letter letter = letters[step & 1][block][other];
        value += letter.block == block && letter.warp == other && letter.step == step ? letter.sum : kInfinity;
      }
  }
  out[blockIdx.x * 64 + threadIdx.x] = value;
#endif
}
inline cudaError_t launch_letters(const float* values, float* out, int clusters, int steps, cudaStream_t stream) {
  return launch(letters_kernel, {dim3(clusters * kCluster), dim3(64), 0, kCluster, false, stream}, values, out, steps);
}
STS_KERNEL(primitive_letters, launch_letters);

}  // namespace sts
