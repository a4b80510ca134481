// Squared distances of all pairs of 16-bit rows on tensor cores: cp.async and mma.sync.
//
// What: |a|^2 + |b|^2 - 2ab. Products are exact, sums are float32. An offset that all tokens share would cause catastrophic cancellation.
//   So a centre is subtracted first, in the channels where the subtraction is exact in 16 bits (exact_centre). The offset that remains is
//   below 8x the spread of the channel. A pair that cancels still (d < (|a|^2 + |b|^2) / 64: duplicates, near-duplicates) is marked, and
//   computed again by differences (sqdist_tiles.cuh). The bits of a pair depend on the pair and the centre of its item alone.
// Chosen when: rows are whole 16-byte vectors at aligned addresses, and sqdist_wgmma.cuh does not serve the device.
// Steps: (1) load: cp.async fills a ring of kMmaStages stages, two stages ahead; a stage has 64 channels of the tile's rows, of its columns
//   and of the centre;
//   (2) multiply: ldmatrix, subtraction of the centre in registers, mma.sync. Every kFlushChannels channels the accumulators of mma.sync
//   are added to sums in rounded float32;
//   (3) epilogue: distances from the sums, stored at (a, b) and (b, a), and the marks;
//   (4) repair: a second launch computes the marked pairs of marked tiles.
// Synchronisation: a block barrier per stage, and one for the marks of the warps. Blocks do not synchronise with each other.
#pragma once
#include "common/selection_plan.h"
#include "sqdist_tiles.cuh"
#include "token_stats.cuh"

namespace sts {

// Tokens along the side of a tile. Large tiles read half as much per pair; small tiles keep more SMs busy.
constexpr int kSmallMmaTile = 64, kLargeMmaTile = 128;
static_assert(kMarkTile == kLargeTile, "marks are for the tiles of the kernel that repairs");
constexpr int kMmaChannels = 64;  // per stage
constexpr int kMmaStages = 3;
// Tensor cores truncate when they add. So accumulators are added to rounded float32 sums after this many channels: the error of ab stays
// below 2e-6 |a||b|, and that of an unmarked distance below 1.3e-4 of it.
constexpr int kFlushChannels = 256;
constexpr float kCancellation = 1.f / 64;

// Whether `sqdist`, computed as norms - 2ab with norms = |a|^2 + |b|^2, must be computed by differences: it is below `limit` of the norms,
// or NaN, or the norms are not finite (infinity - infinity is NaN).
__device__ __forceinline__ bool cancels(float sqdist, float norms, float limit) { return !(fmaf(-limit, norms, sqdist) >= 0.f); }

template <int kTile>
constexpr int kWarpRows = kTile / 2;  // a warp computes kWarpRows x kWarpColumns pairs of a tile
constexpr int kWarpColumns = 32;
template <int kTile>
constexpr int kMmaThreads = kTile / kWarpRows<kTile> * (kTile / kWarpColumns) * 32;
template <int kTile>
constexpr int kMmaStageRows = 2 * kTile + 1;  // rows of the tile, its columns, and the centre
template <int kTile>
constexpr size_t kMmaSharedBytes = size_t(kMmaStages) * kMmaStageRows<kTile> * kMmaChannels * 2;

template <class scalar_t>
bool mma_fits(const Rows<scalar_t>& rows, const Items& items) {
  // Within the 32-bit offsets of TileCopy. Packed: judged by the longest possible item, so that the bits of an item do not depend on its
  // batch.
  const bool reachable = rows.row_stride / 8 <= 0xffffffffll / (items.packed() ? kMatrixTokens : items.tokens);
  return sizeof(scalar_t) == 2 && rows_aligned(rows) && rows.channels % 8 == 0 && reachable;
}

// Offset of 16-byte vector `chunk` of row `row` of a stage, in elements. A row is 128 bytes, all banks once. Without the XOR swizzle the
// same vector of 8 rows would be on the same banks.
__device__ __forceinline__ int swizzled(int row, int chunk) { return row * kMmaChannels + (chunk ^ (row & 7)) * 8; }

// The elements of the centre at the channels that ldmatrix gives this lane: low of channels 0..7 of 16, high of 8..15.
template <class scalar_t>
struct CentreFragment {
  uint32_t low, high;
  // row: the row of the stage that holds the centre. k: the k-th 16 channels of the stage.
  __device__ __forceinline__ CentreFragment(const scalar_t* stage, int row, int k) {
    memcpy(&low, stage + swizzled(row, k * 2) + threadIdx.x % 4 * 2, 4);
    memcpy(&high, stage + swizzled(row, k * 2 + 1) + threadIdx.x % 4 * 2, 4);
  }
  // Fragments of ldmatrix.x4. B: registers alternate between channels 0..7 and 8..15. A: registers 0, 1 hold 0..7, and 2, 3 hold 8..15.
  __device__ __forceinline__ void subtract_from_b(uint32_t (&r)[4]) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) r[i] = subtract_pairs(r[i], i % 2 ? high : low, scalar_t());
  }
  __device__ __forceinline__ void subtract_from_a(uint32_t (&r)[4]) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) r[i] = subtract_pairs(r[i], i / 2 ? high : low, scalar_t());
  }
};

// Products of 16 kRowTiles rows and 8 kColumnTiles columns of a warp. product: [16-row tile][8-column tile][fragment element].
// Tensor cores truncate when they add: flush() adds their accumulators to `product` with rounding, every kFlushChannels channels.
template <class scalar_t, int kRowTiles, int kColumnTiles>
struct MmaProducts {
  float product[kRowTiles][kColumnTiles][4] = {}, accumulator[kRowTiles][kColumnTiles][4] = {};

  // 16 channels. a: a fragment per 16 rows; b: one per 16 columns.
  __device__ __forceinline__ void multiply(const uint32_t (&a)[kRowTiles][4], const uint32_t (&b)[kColumnTiles / 2][4]) {
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
      for (int n = 0; n < kColumnTiles; ++n) {
        const uint32_t column[2] = {b[n / 2][n % 2 * 2], b[n / 2][n % 2 * 2 + 1]};
        mma_16x8x16(accumulator[m][n], a[m], column, scalar_t());
      }
  }
  __device__ __forceinline__ void flush() {
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
      for (int n = 0; n < kColumnTiles; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          product[m][n][e] += accumulator[m][n][e];
          accumulator[m][n][e] = 0.f;
        }
  }
};

// The part of a thread in copying one side of a tile into a stage: one 16-byte vector of every kStride-th row. Row offsets are 32-bit, in
// vectors. Computing addresses in every stage took longer than the tensor cores; 64-bit pointers take registers that a large tile lacks.
template <class scalar_t, int kTile, int kThreads>
class TileCopy {
 public:
  static constexpr int kStride = kThreads / 8, kCopies = kTile / kStride;
  static_assert(kStride % 8 == 0, "all copies of a thread are swizzled alike");

  // Rows past the end repeat the last row; their pairs are not stored.
  __device__ __forceinline__ TileCopy(const Rows<scalar_t>& rows, int64_t first, int64_t tokens) {
#pragma unroll
    for (int u = 0; u < kCopies; ++u) {
      const int64_t row = first + threadIdx.x / 8 + u * kStride;
      offset_[u] = static_cast<uint32_t>((row < tokens ? row : tokens - 1) * rows.row_stride / 8);
    }
  }
  // chunk: the vector of this thread in row 0. inside: false: zeros.
  __device__ __forceinline__ void start(scalar_t* side, const scalar_t* chunk, bool inside) const {
    scalar_t* const mine = side + swizzled(threadIdx.x / 8, threadIdx.x % 8);
#pragma unroll
    for (int u = 0; u < kCopies; ++u) cp_async_16(mine + u * kStride * kMmaChannels, chunk + uint64_t(offset_[u]) * 8, inside);
  }

 private:
  uint32_t offset_[kCopies];
};

// (2) multiply, by a warp: adds the products of a stage to `dot`. at_a, at_b: see the kernel.
template <int kTile, class scalar_t, int kRowTiles>
__device__ __forceinline__ void multiply_stage(const scalar_t* stage, int at_a, int at_b,
                                               MmaProducts<scalar_t, kRowTiles, kWarpColumns / 8>& dot) {
#pragma unroll
  for (int k = 0; k < kMmaChannels / 16; ++k) {
    uint32_t a[kRowTiles][4], b[2][4];
    const CentreFragment<scalar_t> common(stage, 2 * kTile, k);
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
      ldmatrix_x4(a[m], stage + (at_a ^ k * 16) + m * 16 * kMmaChannels);
      common.subtract_from_a(a[m]);
    }
#pragma unroll
    for (int n = 0; n < 2; ++n) {  // 16 columns at a time
      ldmatrix_x4(b[n], stage + (at_b ^ k * 16) + n * 16 * kMmaChannels);
      common.subtract_from_b(b[n]);
    }
    dot.multiply(a, b);
  }
}

// (3) epilogue: sets the marks of a tile: from those of its warps, or to 0 if it has no pairs.
template <int kTile, class Tiles>
__device__ __forceinline__ void set_marks(const Tiles& tiles, int64_t index, bool has_pairs,
                                          const bool (&warp_marked)[kTile / kWarpRows<kTile>][kTile / kWarpColumns], unsigned* marks) {
  constexpr int kRows = kWarpRows<kTile>, kColumns = kWarpColumns, kMarks = kTile / kMarkTile;
  const int tid = threadIdx.x;
  if (tid >= kMarks * kMarks) return;
  const int mi = tid / kMarks, mj = tid % kMarks;
  unsigned any = 0;
  if (has_pairs)
    for (int wr = mi * kMarkTile / kRows; wr < (mi + 1) * kMarkTile / kRows; ++wr)
      for (int wc = mj * kMarkTile / kColumns; wc < (mj + 1) * kMarkTile / kColumns; ++wc) any |= warp_marked[wr][wc];
  const int64_t at = tiles.template mark<kMarks>(index, mi, mj);
  if (at >= 0) marks[at] = any;
}

// norms: (all tokens). centre: (items, channels). marks: per tile of kMarkTile x kMarkTile pairs, 1 if it has a marked pair, else 0.
// Loads and stores stay in the kernel: as functions they make ptxas spill for kSmallMmaTile.
template <class scalar_t, int kTile, class Tiles, class Store>
__global__ void __launch_bounds__(kMmaThreads<kTile>) sqdist_mma_kernel(Rows<scalar_t> rows, Tiles tiles, const float* norms,
                                                                        const scalar_t* centre, Store store, unsigned* marks, float* out) {
  await_predecessor();
  constexpr int kRows = kWarpRows<kTile>, kColumns = kWarpColumns, kThreads = kMmaThreads<kTile>;
  STS_DYNAMIC_SHARED(scalar_t, shared);
  __shared__ bool warp_marked[kTile / kRows][kTile / kColumns];
  // Warps 0..3, one per SM sub-partition, have the left half of a large tile, warps 4..7 the right half. In the last tiles of a row the
  // right half may be past the end: then every sub-partition still has one warp at work.
  const int tid = threadIdx.x, lane = tid % 32, warp_i = tid / 32 % (kTile / kRows), warp_j = tid / 32 / (kTile / kRows);
  const int wi = warp_i * kRows, wj = warp_j * kColumns;
  const int steps = static_cast<int>(ceil_div(rows.channels, kMmaChannels));
  constexpr int kStage = kMmaStageRows<kTile> * kMmaChannels, kRing = kMmaStages * kStage;

  for (int64_t index = tiles.begin(); index < tiles.end(); index += tiles.step()) {
    const PairTile tile = tiles.template at<kTile>(index);
    const int i0 = static_cast<int>(tile.i), j0 = static_cast<int>(tile.j), width = static_cast<int>(tile.tokens);
    if (j0 >= width) {
      set_marks<kTile>(tiles, index, false, warp_marked, marks);
      continue;
    }
    const bool has_pairs = j0 + wj < width && i0 + wi < j0 + wj + kColumns;  // before the end, and not all below the diagonal
    const int side_b = i0 == j0 ? 0 : kTile * kMmaChannels;                  // a diagonal tile reads once
    const TileCopy<scalar_t, kTile, kThreads> copy_a(rows, i0, width), copy_b(rows, j0, width);
    // Offset whose address this lane gives ldmatrix, at k = 0. The swizzle makes k * 16 channels further an exclusive or.
    const int at_a = swizzled(wi + lane % 16, lane / 16), at_b = side_b + swizzled(wj + lane % 8 + lane / 16 * 8, lane / 8 % 2);
    const scalar_t* chunk = rows.row(tile.entry, tile.row) + tid % 8 * 8;
    const scalar_t* centre_chunk = centre + tile.item * rows.channels + tid % 8 * 8;
    int left = rows.channels - tid % 8 * 8;  // channels from this thread's next chunk on
    int filled = 0;                          // the stage to fill next, in elements
    const auto fetch = [&] {                 // (1) load
      if (left > -(tid % 8 * 8)) {
        scalar_t* const stage = shared + filled;
        copy_a.start(stage, chunk, left > 0);
        if (side_b) copy_b.start(stage + side_b, chunk, left > 0);
        if (tid < 8) cp_async_16(stage + swizzled(2 * kTile, tid), centre_chunk, left > 0);
        chunk += kMmaChannels, centre_chunk += kMmaChannels;
        left -= kMmaChannels;
        filled = filled + kStage == kRing ? 0 : filled + kStage;
      }
      cp_async_commit();  // an empty group past the end, so that cp_async_wait counts the same everywhere
    };

    MmaProducts<scalar_t, kRows / 16, kColumns / 8> dot;
#pragma unroll
    for (int step = 0; step < kMmaStages - 1; ++step) fetch();
    const scalar_t* stage = shared;
    for (int step = 0; step < steps; ++step, stage = stage + kStage == shared + kRing ? shared : stage + kStage) {
      cp_async_wait<kMmaStages - 2>();
      __syncthreads();  // this stage has arrived for all threads, and all are done with the one before, which `fetch` overwrites
      fetch();
      if (!has_pairs) continue;
      multiply_stage<kTile>(stage, at_a, at_b, dot);  // (2)
      if ((step + 1) * kMmaChannels % kFlushChannels == 0) dot.flush();
    }
    dot.flush();
    cp_async_wait<0>();

    // (3) epilogue. Stored matrices have at most kMatrixTokens tokens, so offsets in them have 32 bits.
    const int i = opaque(i0 + wi + lane / 4), j = opaque(j0 + wj + lane % 4 * 2), stride = opaque(static_cast<int>(tile.pitch));
    float* const matrix = out + tile.offset;
    float *const upper = matrix + i * stride + j, *const lower = matrix + j * stride + i;
    const float* norm = norms + tile.token;
    uint32_t* const row_min = store.row_min ? store.row_min + tile.token : nullptr;
    float column_norm[kColumns / 4];
#pragma unroll
    for (int c = 0; c < kColumns / 4; ++c) column_norm[c] = j + c / 2 * 8 + c % 2 < width ? norm[j + c / 2 * 8 + c % 2] : 0.f;
    bool marked = false;
    RowMin<kColumns / 4> column_minima;
    const auto finish = [&](auto all_inside) {
      constexpr bool inside = decltype(all_inside)::value;  // all pairs of the warp are above the diagonal and before the end
#pragma unroll
      for (int r = 0; r < kRows / 8; ++r) {
        const float row_norm = inside || i + r * 8 < width ? norm[i + r * 8] : 0.f;
        RowMin<1> minimum;
#pragma unroll
        for (int n = 0; n < kColumns / 8; ++n) {
          float value[2];
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const int row = i + r * 8, column = j + n * 8 + e;
            const bool diagonal = !inside && row == column;
            const float norms_of_pair = row_norm + column_norm[n * 2 + e],
                        sqdist = norms_of_pair - 2.f * dot.product[r / 2][n][r % 2 * 2 + e];
            // NaN norms: one of the tokens is not finite, and neither are its distances by differences. Norms are not negative; comparing
            // them as floats makes ptxas spill.
            const bool repair = cancels(sqdist, norms_of_pair, Store::kCancellation) && __float_as_uint(norms_of_pair) <= 0x7f800000u;
            value[e] = diagonal ? store(0.f, true) : repair ? marked_pair() : store(sqdist, false);
            if (!inside && (row > column || column >= width)) continue;
            lower[(n * 8 + e) * stride + r * 8] = value[e];
            if (!inside) upper[r * 8 * stride + n * 8 + e] = value[e];
            if (diagonal) continue;
            marked = marked || repair;
            minimum.take(0, value[e]);
            column_minima.take(n * 2 + e, value[e]);
          }
          if (!inside) continue;
          *reinterpret_cast<float2*>(upper + r * 8 * stride + n * 8) = make_float2(value[0], value[1]);  // an even pitch
        }
        if (row_min) minimum.template flush<1, 4>(0, row_min, i + r * 8);
      }
    };
    if (i0 + wi + kRows <= j0 + wj && j0 + wj + kColumns <= width)
      finish(std::true_type());
    else if (has_pairs)
      finish(std::false_type());
    if (row_min && has_pairs) {
#pragma unroll
      for (int c = 0; c < kColumns / 4; ++c) column_minima.template flush<4, 32>(c, row_min, j + c / 2 * 8 + c % 2);
    }
    marked = __any_sync(kFullWarp, marked);
    if (lane == 0) warp_marked[warp_i][warp_j] = marked;
    __syncthreads();  // also: no thread is still reading the stages when the next entry's arrive
    set_marks<kTile>(tiles, index, true, warp_marked, marks);
  }
}

// Side of a tile: large where there are at least two large tiles per SM.
inline int mma_tile(int64_t tokens, int64_t entries) {
  const int64_t large = ceil_div(tokens, kLargeMmaTile);
  return large * (large + 1) / 2 * entries >= 2 * device_sm_count() ? kLargeMmaTile : kSmallMmaTile;
}

// (1) to (3). Sets all marks.
template <int kTile, class scalar_t, class Tiles, class Store>
cudaError_t launch_sqdist_mma_of(const Rows<scalar_t>& rows, const Tiles& tiles, const TokenStats& stats, Store store, unsigned* marks,
                                 float* out, cudaStream_t stream) {
  const Launch shape{tiles.grid(), dim3(kMmaThreads<kTile>), kMmaSharedBytes<kTile>, 1, false, stream, Store::kOverlap};
  return launch(sqdist_mma_kernel<scalar_t, kTile, Tiles, Store>, shape, rows, tiles, stats.norms,
                static_cast<const scalar_t*>(stats.centre), store, marks, out);
}

// As launch_sqdist_tiles, for rows that mma_fits. tiles.tile: mma_tile. marks: padded: (entries, side, side) with
// side = ceil(tokens / kMarkTile); packed: (tiles, parts, parts) with parts = tile / kMarkTile.
template <class scalar_t, class Tiles, class Store>
cudaError_t launch_sqdist_mma(const Rows<scalar_t>& rows, const Tiles& tiles, const TokenStats& stats, Store store, unsigned* marks,
                              float* out, cudaStream_t stream) {
  const cudaError_t error = tiles.tile == kLargeMmaTile
                                ? launch_sqdist_mma_of<kLargeMmaTile>(rows, tiles, stats, store, marks, out, stream)
                                : launch_sqdist_mma_of<kSmallMmaTile>(rows, tiles, stats, store, marks, out, stream);
  return error == cudaSuccess ? launch_sqdist_tiles_of<kMarkTile>(rows, tiles.marked(), store, marks, out, stream) : error;
}

}  // namespace sts
