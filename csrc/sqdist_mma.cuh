// The distances of all pairs of 16-bit tokens on tensor cores: |a|^2 + |b|^2 - 2ab, products exact, sums in float32. What all tokens have
// in common would cancel, so a centre is subtracted first, from the channels where nothing is rounded by it (exact_centre): that
// leaves less than eight times the spread of any. Where it cancels still (d < (|a|^2 + |b|^2) / 64: duplicates, near-duplicates) the
// pair is marked, and the tiles with marks are done again by differences (pairwise_sqdist.cuh) for the marked pairs. A
// pair's bits depend on the pair and the centre of its item alone.
#pragma once
#include "pairwise_sqdist.cuh"
#include "token_stats.cuh"

namespace sts {

// Tokens along a tile's side. A large tile reads half as much for a pair; small ones keep more multiprocessors busy.
constexpr int kSmallMmaTile = 64, kLargeMmaTile = 128;
constexpr int kMarkTile = kLargeTile;  // marks are for the tiles of the kernel that repairs
constexpr int kMmaChannels = 64;  // a stage
constexpr int kMmaStages = 3;
// Tensor cores truncate when they add. Sums of more channels than this are continued in rounded float32: the error of a sum
// stays below 2e-6 of |a||b|, and below 1.3e-4 of an unmarked distance.
constexpr int kMmaRun = 256;
constexpr float kCancellation = 1.f / 64;

template <int kTile>
constexpr int kWarpRows = kTile / 2;  // a warp has so many rows of a tile's pairs and kWarpColumns columns
constexpr int kWarpColumns = 32;
template <int kTile>
constexpr int kMmaThreads = kTile / kWarpRows<kTile> * (kTile / kWarpColumns) * 32;
template <int kTile>
constexpr int kMmaStageRows = 2 * kTile + 1;  // the tokens of both sides, and the centre
template <int kTile>
constexpr size_t kMmaSharedBytes = size_t(kMmaStages) * kMmaStageRows<kTile> * kMmaChannels * 2;

template <class scalar_t>
bool mma_fits(const Rows<scalar_t>& rows, const Items& items) {
  return sizeof(scalar_t) == 2 && !items.packed() && rows_aligned(rows) && rows.channels % 8 == 0;
}

// 16-byte chunk `chunk` of row `row` of a stage. Rows lie 128 bytes apart, all on the same banks: chunks are permuted by row.
template <class scalar_t>
__device__ __forceinline__ scalar_t* staged(scalar_t* stage, int row, int chunk) {
  return stage + row * kMmaChannels + (chunk ^ (row & 7)) * 8;
}

// The centre's elements that belong to what ldmatrix gives a lane of 16 channels: of the first eight, and of the others.
template <class scalar_t>
struct CentrePairs {
  uint32_t low, high;
  // `row`: of a stage that holds the centre; k: which 16 of its channels.
  __device__ __forceinline__ CentrePairs(scalar_t* stage, int row, int k) {
    memcpy(&low, staged(stage, row, k * 2) + threadIdx.x % 4 * 2, 4);
    memcpy(&high, staged(stage, row, k * 2 + 1) + threadIdx.x % 4 * 2, 4);
  }
  // Matrices of the first eight channels and of the others in turns, or two by two.
  __device__ __forceinline__ void leave_in_turns(uint32_t (&r)[4]) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) r[i] = subtract_pairs(r[i], i % 2 ? high : low, scalar_t());
  }
  __device__ __forceinline__ void leave_by_halves(uint32_t (&r)[4]) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) r[i] = subtract_pairs(r[i], i / 2 ? high : low, scalar_t());
  }
};

// norms: (batch, tokens). centre: (batch, channels). marks: (entries, mark_tiles, mark_tiles), of which a block writes its own: whether
// it marked a pair.
template <class scalar_t, int kTile, class Store>
__global__ void __launch_bounds__(kMmaThreads<kTile>)
    sqdist_mma_kernel(Rows<scalar_t> rows, int64_t tokens, int64_t first_entry, int64_t entries, const float* norms,
                      const scalar_t* centre, Store store, unsigned* marks, int64_t mark_tiles, int64_t pitch, float* out) {
  constexpr int kRows = kWarpRows<kTile>, kColumns = kWarpColumns, kThreads = kMmaThreads<kTile>, kMarks = kTile / kMarkTile;
  STS_DYNAMIC_SHARED(scalar_t, shared);
  __shared__ bool warp_marked[kTile / kRows][kTile / kColumns];
  const int64_t i0 = static_cast<int64_t>(blockIdx.y) * kTile, j0 = static_cast<int64_t>(blockIdx.x) * kTile;
  if (i0 > j0) return;
  // Warps 0 to 3, one on each quarter of the multiprocessor, have the first half of a large tile's columns, and 4 to 7 the second: in
  // the last tiles of a row that half may be past the end, and each quarter has half of the work.
  const int tid = threadIdx.x, lane = tid % 32, warp_i = tid / 32 % (kTile / kRows), warp_j = tid / 32 / (kTile / kRows);
  const int wi = warp_i * kRows, wj = warp_j * kColumns;
  const bool has_pairs = j0 + wj < tokens && i0 + wi < j0 + wj + kColumns;  // before the end, and not all below the diagonal
  const int steps = static_cast<int>(ceil_div(rows.channels, kMmaChannels));
  const auto stage_a = [&](int step) { return shared + (step % kMmaStages) * kMmaStageRows<kTile> * kMmaChannels; };
  const auto stage_b = [&](int step) { return stage_a(step) + (i0 == j0 ? 0 : kTile * kMmaChannels); };  // a diagonal tile reads once

  for (int64_t entry = blockIdx.z; entry < entries; entry += gridDim.z) {
    const auto fetch = [&](int step) {
      if (step < steps) {
        const int chunk = tid % 8, c = step * kMmaChannels + chunk * 8;
#pragma unroll
        for (int r = tid / 8; r < kTile; r += kThreads / 8) {
          // Rows past the end repeat the last one; their pairs are not stored.
          const int64_t i = i0 + r < tokens ? i0 + r : tokens - 1, j = j0 + r < tokens ? j0 + r : tokens - 1;
          cp_async_16(staged(stage_a(step), r, chunk), rows.row(first_entry + entry, i) + c, c < rows.channels);
          if (i0 != j0) cp_async_16(staged(stage_b(step), r, chunk), rows.row(first_entry + entry, j) + c, c < rows.channels);
        }
        if (tid < 8)
          cp_async_16(staged(stage_a(step), 2 * kTile, chunk), centre + (first_entry + entry) * rows.channels + c, c < rows.channels);
      }
      cp_async_commit();  // empty past the end, so that every wait below counts the same
    };

    float dot[kRows / 16][4][4] = {}, run[kRows / 16][4][4] = {};  // [16 rows][8 columns][what mma gives a thread]
    const auto close_run = [&] {
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
      if (!has_pairs) continue;
#pragma unroll
      for (int k = 0; k < kMmaChannels / 16; ++k) {
        uint32_t a[kRows / 16][4], b[2][4];
        const CentrePairs<scalar_t> common(stage_a(step), 2 * kTile, k);
#pragma unroll
        for (int m = 0; m < kRows / 16; ++m) {
          const int row = wi + m * 16 + lane % 16, chunk = k * 2 + lane / 16;
          ldmatrix_x4(a[m], staged(stage_a(step), row, chunk));
          common.leave_by_halves(a[m]);
        }
#pragma unroll
        for (int n = 0; n < 2; ++n) {  // 16 columns at a time
          const int row = wj + n * 16 + lane % 8 + lane / 16 * 8, chunk = k * 2 + lane / 8 % 2;
          ldmatrix_x4(b[n], staged(stage_b(step), row, chunk));
          common.leave_in_turns(b[n]);
        }
#pragma unroll
        for (int m = 0; m < kRows / 16; ++m)
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

    float* matrix = out + entry * tokens * pitch;
    const float* norm = norms + (first_entry + entry) * tokens;
    bool marked = false;
    RowsLeast<kRows / 8> rows_least;
    RowsLeast<kColumns / 4> columns_least;
#pragma unroll
    for (int m = 0; m < kRows / 16; ++m)
#pragma unroll
      for (int n = 0; n < 4; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int64_t i = i0 + wi + m * 16 + lane / 4 + e / 2 * 8, j = j0 + wj + n * 8 + lane % 4 * 2 + e % 2;
          if (i > j || j >= tokens) continue;
          if (i == j) {
            matrix[i * pitch + i] = store(0.f, true);
            continue;
          }
          const float norms_of_pair = norm[i] + norm[j], sqdist = norms_of_pair - 2.f * dot[m][n][e];
          const bool kept = sqdist >= kCancellation * norms_of_pair;  // false for a NaN too
          marked = marked || !kept;
          const float value = kept ? store(sqdist, false) : kMarked;
          matrix[i * pitch + j] = matrix[j * pitch + i] = value;
          if (!kept) continue;
          rows_least.take(m * 2 + e / 2, value);
          columns_least.take(n * 2 + e % 2, value);
        }
    if (store.least) {
      uint32_t* const least = store.least + (first_entry + entry) * tokens;
#pragma unroll
      for (int r = 0; r < kRows / 8; ++r) rows_least.template note<1, 4>(r, least, i0 + wi + r * 8 + lane / 4);
#pragma unroll
      for (int c = 0; c < kColumns / 4; ++c) columns_least.template note<4, 32>(c, least, j0 + wj + c / 2 * 8 + lane % 4 * 2 + c % 2);
    }
    marked = __any_sync(kFullWarp, marked);
    if (lane == 0) warp_marked[warp_i][warp_j] = marked;
    __syncthreads();  // also: no thread is still reading the stages when the next entry's arrive
    if (tid < kMarks * kMarks) {
      const int mi = tid / kMarks, mj = tid % kMarks;
      const int64_t tile_i = blockIdx.y * kMarks + mi, tile_j = blockIdx.x * kMarks + mj;
      unsigned any = 0;
      for (int wr = mi * kMarkTile / kRows; wr < (mi + 1) * kMarkTile / kRows; ++wr)
        for (int wc = mj * kMarkTile / kColumns; wc < (mj + 1) * kMarkTile / kColumns; ++wc) any |= warp_marked[wr][wc];
      if (tile_i < mark_tiles && tile_j < mark_tiles) marks[(entry * mark_tiles + tile_i) * mark_tiles + tile_j] = any;
    }
  }
}

STS_HOST_DEVICE int64_t mark_tiles(int64_t tokens) { return ceil_div(tokens, kMarkTile); }

// Large tiles where there are two for every multiprocessor.
inline int mma_tile(int64_t tokens, int64_t entries) {
  const int64_t large = ceil_div(tokens, kLargeMmaTile);
  return large * (large + 1) / 2 * entries >= 2 * device_sm_count() ? kLargeMmaTile : kSmallMmaTile;
}

template <int kTile, class scalar_t, class Store>
cudaError_t launch_sqdist_mma_of(const Rows<scalar_t>& rows, const Items& items, int64_t first_entry, int64_t entries,
                                 const TokenStats& stats, Store store, unsigned* marks, int64_t pitch, float* out, cudaStream_t stream) {
  const auto tiles = static_cast<unsigned>(ceil_div(items.tokens, kTile));
  const dim3 grid(tiles, tiles, static_cast<unsigned>(entries < 65535 ? entries : 65535));
  const Launch shape{grid, dim3(kMmaThreads<kTile>), kMmaSharedBytes<kTile>, 1, false, stream};
  return launch(sqdist_mma_kernel<scalar_t, kTile, Store>, shape, rows, items.tokens, first_entry, entries, stats.norms,
                reinterpret_cast<const scalar_t*>(stats.centre), store, marks, mark_tiles(items.tokens), pitch, out);
}

// As launch_sqdist_tiles, for 16-bit rows that mma_fits, with tiles of `tile`. marks: (entries, mark_tiles, mark_tiles).
template <class scalar_t, class Store>
cudaError_t launch_sqdist_mma(const Rows<scalar_t>& rows, const Items& items, int64_t first_entry, int64_t entries, int tile,
                              const TokenStats& stats, Store store, unsigned* marks, int64_t pitch, float* out, cudaStream_t stream) {
  const cudaError_t error =
      tile == kLargeMmaTile ? launch_sqdist_mma_of<kLargeMmaTile>(rows, items, first_entry, entries, stats, store, marks, pitch, out, stream)
                            : launch_sqdist_mma_of<kSmallMmaTile>(rows, items, first_entry, entries, stats, store, marks, pitch, out, stream);
  if (error != cudaSuccess) return error;
  return launch_sqdist_repair(rows, items, first_entry, entries, store, marks, pitch, out, stream);
}

}  // namespace sts
