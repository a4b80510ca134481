// The distances of all pairs of 16-bit tokens on tensor cores: |a|^2 + |b|^2 - 2ab, products exact, sums in float32.
// Where that cancels (d < (|a|^2 + |b|^2) / 64: duplicates, near-duplicates, a large common offset) the pair is marked, and the
// tiles with marks are done again by differences (pairwise_sqdist.cuh) for the marked pairs. So no centring is needed, which
// would round 16-bit values, and a pair's bits depend on the pair alone.
#pragma once
#include "pairwise_sqdist.cuh"

namespace sts {

constexpr int kMmaTile = kLargeTile;  // tokens along a tile's side, as in the kernel that repairs
constexpr int kMmaThreads = 128;  // 2 x 2 warps of 32 x 32 pairs
constexpr int kMmaChannels = 64;  // a stage
constexpr int kMmaStages = 3;
// Tensor cores truncate when they add. Sums of more channels than this are continued in rounded float32: the error of a sum
// stays below 2e-6 of |a||b|, and below 1.3e-4 of an unmarked distance.
constexpr int kMmaRun = 256;
constexpr float kCancellation = 1.f / 64;

template <class scalar_t>
constexpr size_t mma_shared_bytes() {
  return size_t(kMmaStages) * 2 * kMmaTile * kMmaChannels * sizeof(scalar_t);
}

template <class scalar_t>
bool mma_fits(const Rows<scalar_t>& rows, const Items& items) {
  return sizeof(scalar_t) == 2 && !items.packed() && rows_aligned(rows) && rows.channels % 8 == 0;
}

// 16-byte chunk `chunk` of row `row` of a stage. Rows lie 128 bytes apart, all on the same banks: chunks are permuted by row.
template <class scalar_t>
__device__ __forceinline__ scalar_t* staged(scalar_t* stage, int row, int chunk) {
  return stage + row * kMmaChannels + (chunk ^ (row & 7)) * 8;
}

// norms: (batch, tokens). marks: (entries, tiles, tiles), of which a block writes its own: whether it marked a pair.
template <class scalar_t, class Store>
__global__ void __launch_bounds__(kMmaThreads)
    sqdist_mma_kernel(Rows<scalar_t> rows, int64_t tokens, int64_t first_entry, int64_t entries, const float* norms, Store store,
                      unsigned* marks, float* out) {
  STS_DYNAMIC_SHARED(scalar_t, shared);
  const int64_t i0 = static_cast<int64_t>(blockIdx.y) * kMmaTile, j0 = static_cast<int64_t>(blockIdx.x) * kMmaTile;
  if (i0 > j0) return;
  const int tid = threadIdx.x, lane = tid % 32, warp = tid / 32, wi = warp / 2 * 32, wj = warp % 2 * 32;
  const int steps = static_cast<int>(ceil_div(rows.channels, kMmaChannels));
  const auto stage_a = [&](int step) { return shared + (step % kMmaStages) * 2 * kMmaTile * kMmaChannels; };
  const auto stage_b = [&](int step) { return stage_a(step) + kMmaTile * kMmaChannels; };

  for (int64_t entry = blockIdx.z; entry < entries; entry += gridDim.z) {
    const auto fetch = [&](int step) {
      if (step < steps) {
        const int chunk = tid % 8, c = step * kMmaChannels + chunk * 8;
#pragma unroll
        for (int r = tid / 8; r < kMmaTile; r += kMmaThreads / 8) {
          // Rows past the end repeat the last one; their pairs are not stored.
          const int64_t i = i0 + r < tokens ? i0 + r : tokens - 1, j = j0 + r < tokens ? j0 + r : tokens - 1;
          cp_async_16(staged(stage_a(step), r, chunk), rows.row(first_entry + entry, i) + c, c < rows.channels);
          cp_async_16(staged(stage_b(step), r, chunk), rows.row(first_entry + entry, j) + c, c < rows.channels);
        }
      }
      cp_async_commit();  // empty past the end, so that every wait below counts the same
    };

    float dot[2][4][4] = {}, run[2][4][4] = {};  // [16 rows][8 columns][what mma gives a thread]
    const auto close_run = [&] {
#pragma unroll
      for (int m = 0; m < 2; ++m)
#pragma unroll
        for (int n = 0; n < 4; ++n)
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            dot[m][n][e] += run[m][n][e];
            run[m][n][e] = 0.f;
          }
    };
#pragma unroll
    for (int step = 0; step < kMmaStages - 1; ++step) fetch(step);
    for (int step = 0; step < steps; ++step) {
      cp_async_wait<kMmaStages - 2>();
      __syncthreads();  // this stage has arrived for all threads, and all are done with the one before, which `fetch` overwrites
      fetch(step + kMmaStages - 1);
#pragma unroll
      for (int k = 0; k < kMmaChannels / 16; ++k) {
        uint32_t a[2][4], b[2][4];
#pragma unroll
        for (int m = 0; m < 2; ++m) {
          const int row = wi + m * 16 + lane % 16, chunk = k * 2 + lane / 16;
          ldmatrix_x4(a[m], staged(stage_a(step), row, chunk));
        }
#pragma unroll
        for (int n = 0; n < 2; ++n) {  // 16 columns at a time
          const int row = wj + n * 16 + lane % 8 + lane / 16 * 8, chunk = k * 2 + lane / 8 % 2;
          ldmatrix_x4(b[n], staged(stage_b(step), row, chunk));
        }
#pragma unroll
        for (int m = 0; m < 2; ++m)
#pragma unroll
          for (int n = 0; n < 4; ++n) {
            const uint32_t columns[2] = {b[n / 2][n % 2 * 2], b[n / 2][n % 2 * 2 + 1]};
            mma_16x8x16(run[m][n], a[m], columns, scalar_t());
          }
      }
      if ((step + 1) * kMmaChannels % kMmaRun == 0) close_run();
    }
    close_run();
    cp_async_wait<0>();

    float* matrix = out + entry * tokens * tokens;
    const float* norm = norms + (first_entry + entry) * tokens;
    bool marked = false;
#pragma unroll
    for (int m = 0; m < 2; ++m)
#pragma unroll
      for (int n = 0; n < 4; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int64_t i = i0 + wi + m * 16 + lane / 4 + e / 2 * 8, j = j0 + wj + n * 8 + lane % 4 * 2 + e % 2;
          if (i > j || j >= tokens) continue;
          if (i == j) {
            matrix[i * tokens + i] = store(0.f, true);
            continue;
          }
          const float norms_of_pair = norm[i] + norm[j], sqdist = norms_of_pair - 2.f * dot[m][n][e];
          const bool kept = sqdist >= kCancellation * norms_of_pair;  // false for a NaN too
          marked = marked || !kept;
          matrix[i * tokens + j] = matrix[j * tokens + i] = kept ? store(sqdist, false) : kMarked;
        }
    const int count = __syncthreads_count(marked);  // also: no thread is still reading the stages when the next entry's arrive
    if (tid == 0) marks[(entry * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x] = count;
  }
}

STS_HOST_DEVICE int64_t mma_tiles(int64_t tokens) { return ceil_div(tokens, kMmaTile); }

// As launch_sqdist_tiles, for 16-bit rows that mma_fits. marks: (entries, mma_tiles, mma_tiles).
template <class scalar_t, class Store>
cudaError_t launch_sqdist_mma(const Rows<scalar_t>& rows, const Items& items, int64_t first_entry, int64_t entries, const float* norms,
                              Store store, unsigned* marks, float* out, cudaStream_t stream) {
  const auto tiles = static_cast<unsigned>(mma_tiles(items.tokens));
  const Launch shape{dim3(tiles, tiles, static_cast<unsigned>(entries < 65535 ? entries : 65535)), dim3(kMmaThreads),
                     mma_shared_bytes<scalar_t>(), 1, false, stream};
  const cudaError_t error = launch(sqdist_mma_kernel<scalar_t, Store>, shape, rows, items.tokens, first_entry, entries, norms, store, marks, out);
  if (error != cudaSuccess) return error;
  return launch_sqdist_repair(rows, items, first_entry, entries, store, marks, out, stream);
}

}  // namespace sts
