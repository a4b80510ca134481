// Pairs of the rows of two sets on CUDA cores.
//
// What: |a - b|^2 or a.b of every row a of one set with every row b of another. An epilogue takes the pairs; nothing is stored here.
// Chosen when: differences are wanted, or row_pairs_mma.cuh does not serve the rows. Sums are float32: differences do not cancel, and
//   products of 16-bit elements are exact.
// Steps, for each square tile of pairs of a block: (1) store a prefetched stage of 32 channels of both sides to shared memory, and prefetch
//   the next; (2) accumulate the 4 x 4 pairs of each thread; (3) epilogue. A stage is summed channel by channel in ascending order, and
//   then added to the total: a pair's bits depend on the pair alone, and rounding errors grow with channels / 32.
// Synchronisation: two block barriers a stage. Blocks do not communicate.
#pragma once
#include "rows.cuh"

namespace sts {

// Of a row. scale: the power of two that it is multiplied by. inv_norm: 1 / |scaled row|; 0 for a zero row; NaN for a row that is not valid
// (not finite, or past the number of its item's rows).
struct __align__(8) RowInfo {
  float scale, inv_norm;
  __device__ __forceinline__ bool valid() const { return inv_norm == inv_norm; }
};

constexpr int kRowInfoThreads = 256;

// RowInfo of every row, by a warp. counts: (batch) valid rows of each item; null: all. cosine: false leaves scale and inv_norm at 1.
template <class scalar_t>
__global__ void __launch_bounds__(kRowInfoThreads)
    row_info_kernel(Rows<scalar_t> rows, int64_t batch, int64_t count, const int64_t* counts, bool aligned, bool cosine, RowInfo* info) {
  constexpr int kVec = Vec16<scalar_t>::size;
  const int lane = threadIdx.x % 32;
  const int64_t r = static_cast<int64_t>(blockIdx.x) * (kRowInfoThreads / 32) + threadIdx.x / 32;
  if (r >= batch * count) return;
  const int64_t b = r / count, i = r % count;
  const bool present = !counts || (counts[b] <= count && i < counts[b]);
  const scalar_t* row = rows.row(b, i);
  float sum_sq = 0.f, max_abs = 0.f;
  bool finite = present;
  const int channels = present ? rows.channels : 0;
#pragma unroll 4
  for (int c = lane * kVec; c < channels; c += 32 * kVec) {
    const Vec16<scalar_t> x = load_channels(row, c, channels, aligned);
#pragma unroll
    for (int v = 0; v < kVec; ++v) {
      finite = finite && x[v] - x[v] == 0.f;
      sum_sq = fmaf(x[v], x[v], sum_sq);
      max_abs = fmaxf(max_abs, fabsf(x[v]));
    }
  }
  finite = __all_sync(kFullWarp, finite);
  sum_sq = warp_sum(sum_sq);
  RowInfo row_info{1.f, finite ? 1.f : kNaN};
  if (cosine && finite) {
    if (!(sum_sq >= 0x1p-60f && sum_sq <= 0x1p60f)) {
      // The scale brings the largest channel to [1, 2): squares neither overflow nor vanish. Its biased exponent is kept in [1, 253].
      max_abs = warp_max(max_abs);
      const int exponent = static_cast<int>(254u - (__float_as_uint(max_abs) >> 23));
      row_info.scale = __uint_as_float(static_cast<uint32_t>(exponent < 1 ? 1 : exponent > 253 ? 253 : exponent) << 23);
      sum_sq = 0.f;
      for (int c = lane * kVec; c < channels; c += 32 * kVec) {
        const Vec16<scalar_t> x = load_channels(row, c, channels, aligned);
#pragma unroll
        for (int v = 0; v < kVec; ++v) sum_sq = fmaf(x[v] * row_info.scale, x[v] * row_info.scale, sum_sq);
      }
      sum_sq = warp_sum(sum_sq);
    }
    row_info.inv_norm = sum_sq > 0.f ? 1.f / sqrtf(sum_sq) : 0.f;
  }
  if (lane == 0) info[r] = row_info;
}

template <class scalar_t>
cudaError_t launch_row_info(const Rows<scalar_t>& rows, int64_t batch, int64_t count, const int64_t* counts, bool cosine, RowInfo* info,
                            cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(ceil_div(batch * count, kRowInfoThreads / 32)));
  const Launch shape{grid, dim3(kRowInfoThreads), 0, 1, false, stream};
  return launch(row_info_kernel<scalar_t>, shape, rows, batch, count, counts, rows_aligned(rows), cosine, info);
}

// The rows of all batch entries on one side of the pairs.
template <class scalar_t>
struct Side {
  Rows<scalar_t> rows;
  int64_t count;
  const RowInfo* info;  // (batch, count)
  bool aligned;
};

constexpr int kSmallPairTile = 32, kLargePairTile = 64;

// epilogue.template row<kTile>(entry, i, j, values): values[t] is of row i of `a` and row j + t of `b`. All threads of a block call it
// together; i and j may be past the end.
template <class scalar_t, bool kProduct, int kTile, class Epilogue>
__global__ void __launch_bounds__(kTile* kTile / 16, kTile == kLargePairTile ? 2 : 4)
    row_pairs_kernel(Side<scalar_t> a, Side<scalar_t> b, int64_t entries, int channels, Epilogue epilogue) {
  constexpr int kThreads = kTile * kTile / 16;  // each thread has 4 x 4 pairs
  constexpr int kChannels = 32, kVec = Vec16<scalar_t>::size;
  constexpr int kLoads = kTile * kChannels / kVec / kThreads;
  static_assert(kLoads * kVec * kThreads == kTile * kChannels, "a stage is loaded by whole threads");
  static_assert(kThreads % (kChannels / kVec) == 0, "a thread loads the same channels of every row");
  __shared__ float stage_a[kChannels][kTile + 4], stage_b[kChannels][kTile + 4];
  const int tid = threadIdx.x, ti = tid / (kTile / 4) * 4, tj = tid % (kTile / 4) * 4;
  const int column = tid % (kChannels / kVec) * kVec;
  const int64_t i0 = static_cast<int64_t>(blockIdx.x) * kTile, tiles = ceil_div(b.count, kTile);
  const auto row_of_load = [&](int l) { return (l * kThreads + tid) / (kChannels / kVec); };

  for (int64_t entry = blockIdx.z; entry < entries; entry += gridDim.z)
    for (int64_t tile = blockIdx.y; tile < tiles; tile += gridDim.y) {
      const int64_t j0 = tile * kTile;
      const scalar_t *row_a[kLoads], *row_b[kLoads];
      float scale_a[kLoads], scale_b[kLoads];
      Vec16<scalar_t> next_a[kLoads], next_b[kLoads];
#pragma unroll
      for (int l = 0; l < kLoads; ++l) {  // rows past the end repeat the last row
        const int64_t i = i0 + row_of_load(l) < a.count ? i0 + row_of_load(l) : a.count - 1;
        const int64_t j = j0 + row_of_load(l) < b.count ? j0 + row_of_load(l) : b.count - 1;
        row_a[l] = a.rows.row(entry, i), row_b[l] = b.rows.row(entry, j);
        if (kProduct) scale_a[l] = a.info[entry * a.count + i].scale, scale_b[l] = b.info[entry * b.count + j].scale;
      }
      const auto fetch = [&](int c0) {
#pragma unroll
        for (int l = 0; l < kLoads; ++l) {
          next_a[l] = load_channels(row_a[l], c0 + column, channels, a.aligned);
          next_b[l] = load_channels(row_b[l], c0 + column, channels, b.aligned);
        }
      };
      float sum[4][4] = {};
      fetch(0);
      for (int c0 = 0; c0 < channels; c0 += kChannels) {
        __syncthreads();  // all threads have read the previous stage
#pragma unroll
        for (int l = 0; l < kLoads; ++l)  // (1) store a stage
#pragma unroll
          for (int v = 0; v < kVec; ++v) {
            stage_a[column + v][row_of_load(l)] = kProduct ? next_a[l][v] * scale_a[l] : next_a[l][v];
            stage_b[column + v][row_of_load(l)] = kProduct ? next_b[l][v] * scale_b[l] : next_b[l][v];
          }
        __syncthreads();  // stage complete
        if (c0 + kChannels < channels) fetch(c0 + kChannels);
        // (2) accumulate
        float stage_sum[4][4] = {};
        accumulate_pairs<kProduct>(stage_a, stage_b, ti, tj, stage_sum);
#pragma unroll
        for (int s = 0; s < 4; ++s)
#pragma unroll
          for (int t = 0; t < 4; ++t) sum[s][t] += stage_sum[s][t];
      }
#pragma unroll
      for (int s = 0; s < 4; ++s) epilogue.template row<kTile>(entry, i0 + ti + s, j0 + tj, sum[s]);  // (3)
    }
}

template <bool kProduct, int kTile, class scalar_t, class Epilogue>
cudaError_t launch_row_pairs_of(const Side<scalar_t>& a, const Side<scalar_t>& b, int64_t entries, const Epilogue& epilogue,
                                cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(ceil_div(a.count, kTile)), grid_extent(ceil_div(b.count, kTile)), grid_extent(entries));
  const Launch shape{grid, dim3(kTile * kTile / 16), 0, 1, false, stream};
  return launch(row_pairs_kernel<scalar_t, kProduct, kTile, Epilogue>, shape, a, b, entries, a.rows.channels, epilogue);
}

template <bool kProduct, class scalar_t, class Epilogue>
cudaError_t launch_row_pairs(const Side<scalar_t>& a, const Side<scalar_t>& b, int64_t entries, const Epilogue& epilogue,
                             cudaStream_t stream) {
  // Small tiles if large ones were fewer than two per SM.
  if (ceil_div(a.count, kLargePairTile) * ceil_div(b.count, kLargePairTile) * entries < 2 * device_sm_count())
    return launch_row_pairs_of<kProduct, kSmallPairTile>(a, b, entries, epilogue, stream);
  return launch_row_pairs_of<kProduct, kLargePairTile>(a, b, entries, epilogue, stream);
}

}  // namespace sts
