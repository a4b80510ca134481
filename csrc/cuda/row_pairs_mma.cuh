// What: a.b of every 16-bit row a of one set with every row b of another on tensor cores, handed to `take` pair by pair.
// Chosen when: rows are whole 16-byte chunks at aligned addresses, and a row need not be told from another by their difference.
// Steps: of a block, for one square tile of pairs after another: (1) stages of 64 channels of both sides come by cp.async, two ahead;
//   (2) mma.sync adds them to the pairs, exact products in float32; (3) the pairs are handed over. A row whose square is out of range
//   is not multiplied as it is: its pairs are computed again, scaled.
// Synchronisation: a block barrier a stage. Blocks know nothing of each other.
#pragma once
#include "row_pairs.cuh"
#include "sqdist_mma.cuh"

namespace sts {

template <class scalar_t>
bool mma_serves(const Side<scalar_t>& side) {
  return sizeof(scalar_t) == 2 && side.aligned && side.rows.channels % 8 == 0;
}

template <int kTile>
constexpr size_t kPairStageBytes = size_t(2) * kTile * kMmaChannels * 2;

// The product of two rows, each scaled by its power of two.
template <class scalar_t>
__device__ __noinline__ float scaled_product(const scalar_t* a, float scale_a, const scalar_t* b, float scale_b, int channels) {
  float sum = 0.f;
  for (int c0 = 0; c0 < channels; c0 += kMmaChannels) {
    float run = 0.f;
    for (int c = c0; c < channels && c < c0 + kMmaChannels; ++c) run = fmaf(to_float(a[c]) * scale_a, to_float(b[c]) * scale_b, run);
    sum += run;
  }
  return sum;
}

// take.pair(entry, i, j, product) gives the key of a pair, and take.offer(entry, i, key) receives the lowest of some of row i.
template <class scalar_t, int kTile, class Take>
__global__ void __launch_bounds__(kMmaThreads<kTile>)
    row_pairs_mma_kernel(Side<scalar_t> a, Side<scalar_t> b, int64_t entries, int channels, Take take) {
  constexpr int kRows = kWarpRows<kTile>, kThreads = kMmaThreads<kTile>;
  STS_DYNAMIC_SHARED(scalar_t, shared);
  const int tid = threadIdx.x, lane = tid % 32;
  const int wi = tid / 32 % (kTile / kRows) * kRows, wj = tid / 32 / (kTile / kRows) * kWarpColumns;  // the warp's first row and column
  const int64_t i0 = static_cast<int64_t>(blockIdx.x) * kTile, tiles = ceil_div(b.count, kTile);
  const int steps = static_cast<int>(ceil_div(channels, kMmaChannels));
  const auto stage_a = [&](int step) { return shared + (step % kMmaStages) * 2 * kTile * kMmaChannels; };
  const auto stage_b = [&](int step) { return stage_a(step) + kTile * kMmaChannels; };

  for (int64_t entry = blockIdx.z; entry < entries; entry += gridDim.z)
    for (int64_t tile = blockIdx.y; tile < tiles; tile += gridDim.y) {
      const int64_t j0 = tile * kTile;
      // (1)
      const auto fetch = [&](int step) {
        const int chunk = tid % 8, c = step * kMmaChannels + chunk * 8;
        if (step < steps) {
#pragma unroll
          for (int r = tid / 8; r < kTile; r += kThreads / 8) {  // rows past the end repeat the last one
            const int64_t i = i0 + r < a.count ? i0 + r : a.count - 1, j = j0 + r < b.count ? j0 + r : b.count - 1;
            cp_async_16(stage_a(step) + swizzled(r, chunk), a.rows.row(entry, i) + c, c < channels);
            cp_async_16(stage_b(step) + swizzled(r, chunk), b.rows.row(entry, j) + c, c < channels);
          }
        }
        cp_async_commit();  // empty past the end, so that every wait below counts the same
      };
      float dot[kRows / 16][4][4] = {}, run[kRows / 16][4][4] = {};  // [16 rows][8 columns][what mma gives a thread]
      const auto flush_accumulator = [&] {
#pragma unroll
        for (int m = 0; m < kRows / 16; ++m)
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
      // (2)
#pragma unroll
        for (int k = 0; k < kMmaChannels / 16; ++k) {
          uint32_t rows[kRows / 16][4], columns[2][4];
#pragma unroll
          for (int m = 0; m < kRows / 16; ++m) ldmatrix_x4(rows[m], stage_a(step) + swizzled(wi + m * 16 + lane % 16, k * 2 + lane / 16));
#pragma unroll
          for (int n = 0; n < 2; ++n)
            ldmatrix_x4(columns[n], stage_b(step) + swizzled(wj + n * 16 + lane % 8 + lane / 16 * 8, k * 2 + lane / 8 % 2));
#pragma unroll
          for (int m = 0; m < kRows / 16; ++m)
#pragma unroll
            for (int n = 0; n < 4; ++n) {
              const uint32_t pair[2] = {columns[n / 2][n % 2 * 2], columns[n / 2][n % 2 * 2 + 1]};
              mma_16x8x16(run[m][n], rows[m], pair, scalar_t());
            }
        }
        if ((step + 1) * kMmaChannels % kFlushChannels == 0) flush_accumulator();
      }
      flush_accumulator();
      cp_async_wait<0>();
      __syncthreads();  // no thread is still reading the stages when the next tile's arrive
                        // (3)
#pragma unroll
      for (int m = 0; m < kRows / 16; ++m)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int64_t i = i0 + wi + m * 16 + half * 8 + lane / 4;
          Key low = kNoKey;
#pragma unroll
          for (int n = 0; n < 4; ++n)
#pragma unroll
            for (int e = 0; e < 2; ++e) {
              const int64_t j = j0 + wj + n * 8 + lane % 4 * 2 + e;
              float product = dot[m][n][half * 2 + e];
              if (i < a.count && j < b.count) {
                const RowInfo x = a.info[entry * a.count + i], y = b.info[entry * b.count + j];
                const bool some = x.per_norm > 0.f && y.per_norm > 0.f;  // neither zero nor to be left out
                if (some && (x.scale != 1.f || y.scale != 1.f))
                  product = scaled_product(a.rows.row(entry, i), x.scale, b.rows.row(entry, j), y.scale, channels);
                else if (!some)
                  product = 0.f;
              }
              low = lower(low, take.pair(entry, i, j, product));
            }
#pragma unroll
          for (int offset = 1; offset < 4; offset *= 2) low = lower(low, __shfl_xor_sync(kFullWarp, low, offset));
          if (lane % 4 == 0) take.offer(entry, i, low);
        }
    }
}

// Of rows that mma_serves. A tile of 64: with 128 a thread's pairs and their keys do not fit its registers.
template <class scalar_t, class Take>
cudaError_t launch_row_pairs_mma(const Side<scalar_t>& a, const Side<scalar_t>& b, int64_t entries, const Take& take, cudaStream_t stream) {
  if constexpr (sizeof(scalar_t) == 2) {
    constexpr int kTile = kSmallMmaTile;
    const auto most = [](int64_t blocks) { return static_cast<unsigned>(blocks < 65535 ? blocks : 65535); };
    const dim3 grid(static_cast<unsigned>(ceil_div(a.count, kTile)), most(ceil_div(b.count, kTile)), most(entries));
    const Launch shape{grid, dim3(kMmaThreads<kTile>), kMmaStages * kPairStageBytes<kTile>, 1, false, stream};
    return launch(row_pairs_mma_kernel<scalar_t, kTile, Take>, shape, a, b, entries, a.rows.channels, take);
  } else {
    return cudaErrorInvalidValue;
  }
}

}  // namespace sts
