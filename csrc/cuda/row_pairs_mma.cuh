// Products of the 16-bit rows of two sets on tensor cores.
//
// What: a.b of every row a of one set with every row b of another. An epilogue takes the pairs; nothing is stored here.
// Chosen when: products are wanted, and mma_serves both sides: rows are 16-byte aligned and whole 16-byte vectors long. A distance would
//   cancel in products, so row_pairs.cuh computes distances.
// Steps, for each square tile of pairs of a block: (1) cp.async prefetches stages of 64 channels of both sides, kMmaStages - 1 ahead;
//   (2) mma.sync accumulates exact products in float32, and partial sums are flushed every kFlushChannels; (3) epilogue. Rows whose squared
//   norm is out of range have a scale other than 1: their products are recomputed from scaled elements.
// Synchronisation: a block barrier a stage. Blocks do not communicate.
#pragma once
#include "row_pairs.cuh"
#include "sqdist_mma.cuh"

namespace sts {

template <class scalar_t>
bool mma_serves(const Side<scalar_t>& side) {
  return sizeof(scalar_t) == 2 && side.aligned && side.rows.channels % 8 == 0;
}

// Bytes of a stage: kTile rows of kMmaChannels 16-bit channels on each side.
template <int kTile>
constexpr size_t kPairStageBytes = size_t(2) * kTile * kMmaChannels * 2;

// Product of two rows, each scaled by its power of two. Rarely needed, so not inlined.
template <class scalar_t>
__device__ __noinline__ float scaled_product(const scalar_t* a, float scale_a, const scalar_t* b, float scale_b, int channels) {
  float sum = 0.f;
  for (int c0 = 0; c0 < channels; c0 += kMmaChannels) {
    float stage_sum = 0.f;
    for (int c = c0; c < channels && c < c0 + kMmaChannels; ++c)
      stage_sum = fmaf(to_float(a[c]) * scale_a, to_float(b[c]) * scale_b, stage_sum);
    sum += stage_sum;
  }
  return sum;
}

// epilogue.pair(entry, i, j, product): the key of a pair. epilogue.offer(entry, i, key): takes the lowest key of some pairs of row i.
template <class scalar_t, int kTile, class Epilogue>
__global__ void __launch_bounds__(kMmaThreads<kTile>)
    row_pairs_mma_kernel(Side<scalar_t> a, Side<scalar_t> b, int64_t entries, int channels, Epilogue epilogue) {
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
      // (1) a thread copies 16-byte vector tid % 8 of every kThreads / 8-th row of both sides.
      const auto fetch = [&](int step) {
        const int chunk = tid % 8, c = step * kMmaChannels + chunk * 8;
        if (step < steps) {
#pragma unroll
          for (int r = tid / 8; r < kTile; r += kThreads / 8) {  // rows past the end repeat the last row
            const int64_t i = i0 + r < a.count ? i0 + r : a.count - 1, j = j0 + r < b.count ? j0 + r : b.count - 1;
            cp_async_16(stage_a(step) + swizzled(r, chunk), a.rows.row(entry, i) + c, c < channels);
            cp_async_16(stage_b(step) + swizzled(r, chunk), b.rows.row(entry, j) + c, c < channels);
          }
        }
        cp_async_commit();  // a group for every step, empty past the end: the wait below counts groups
      };
      MmaProducts<scalar_t, kRows / 16, kWarpColumns / 8> dot;
#pragma unroll
      for (int step = 0; step < kMmaStages - 1; ++step) fetch(step);
      for (int step = 0; step < steps; ++step) {
        cp_async_wait<kMmaStages - 2>();
        __syncthreads();  // the stage is complete for all threads, and all have read the previous one, which `fetch` overwrites
        fetch(step + kMmaStages - 1);
#pragma unroll
        for (int k = 0; k < kMmaChannels / 16; ++k) {  // (2)
          uint32_t fragment_a[kRows / 16][4], fragment_b[2][4];
#pragma unroll
          for (int m = 0; m < kRows / 16; ++m)
            ldmatrix_x4(fragment_a[m], stage_a(step) + swizzled(wi + m * 16 + lane % 16, k * 2 + lane / 16));
#pragma unroll
          for (int n = 0; n < 2; ++n)
            ldmatrix_x4(fragment_b[n], stage_b(step) + swizzled(wj + n * 16 + lane % 8 + lane / 16 * 8, k * 2 + lane / 8 % 2));
          dot.multiply(fragment_a, fragment_b);
        }
        if ((step + 1) * kMmaChannels % kFlushChannels == 0) dot.flush();
      }
      dot.flush();
      cp_async_wait<0>();
      __syncthreads();  // all threads have read the stages, which the next tile overwrites
#pragma unroll
      for (int m = 0; m < kRows / 16; ++m)  // (3)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int64_t i = i0 + wi + m * 16 + half * 8 + lane / 4;
          Key low = kNoKey;
#pragma unroll
          for (int n = 0; n < 4; ++n)
#pragma unroll
            for (int e = 0; e < 2; ++e) {
              const int64_t j = j0 + wj + n * 8 + lane % 4 * 2 + e;
              float product = dot.product[m][n][half * 2 + e];
              if (i < a.count && j < b.count) {
                const RowInfo x = a.info[entry * a.count + i], y = b.info[entry * b.count + j];
                const bool nonzero = x.inv_norm > 0.f && y.inv_norm > 0.f;  // false: a zero row (product 0), or one that is not valid
                if (nonzero && (x.scale != 1.f || y.scale != 1.f))
                  product = scaled_product(a.rows.row(entry, i), x.scale, b.rows.row(entry, j), y.scale, channels);
                else if (!nonzero)
                  product = 0.f;
              }
              low = lower(low, epilogue.pair(entry, i, j, product));
            }
#pragma unroll
          for (int offset = 1; offset < 4; offset *= 2) low = lower(low, __shfl_xor_sync(kFullWarp, low, offset));
          if (lane % 4 == 0) epilogue.offer(entry, i, low);  // for the quad of lanes that shares row i
        }
    }
}

// For rows that mma_serves. Tiles of 64 rows: with 128, a thread's pairs and their keys exceed its registers.
template <class scalar_t, class Epilogue>
cudaError_t launch_row_pairs_mma(const Side<scalar_t>& a, const Side<scalar_t>& b, int64_t entries, const Epilogue& epilogue,
                                 cudaStream_t stream) {
  if constexpr (sizeof(scalar_t) == 2) {
    constexpr int kTile = kSmallMmaTile;
    const dim3 grid(static_cast<unsigned>(ceil_div(a.count, kTile)), grid_extent(ceil_div(b.count, kTile)), grid_extent(entries));
    const Launch shape{grid, dim3(kMmaThreads<kTile>), kMmaStages * kPairStageBytes<kTile>, 1, false, stream};
    return launch(row_pairs_mma_kernel<scalar_t, kTile, Epilogue>, shape, a, b, entries, a.rows.channels, epilogue);
  } else {
    return cudaErrorInvalidValue;
  }
}

}  // namespace sts
