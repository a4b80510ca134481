// Squared distances of all pairs of an item's tokens on CUDA cores, and definitions that all distance kernels share.
//
// What: a block computes one square tile of the upper triangle, and mirrors it. Differences are squared and summed channel by channel in
//   ascending order: nothing cancels, and a pair's bits do not depend on the tile.
// Chosen when: tensor cores do not serve the features (sqdist_mma.cuh, sqdist_wgmma.cuh). It also recomputes the pairs that sqdist_mma.cuh
//   marks.
// Steps, for every stage of 32 channels: (1) store the prefetched channels to shared memory; (2) prefetch the next stage into registers;
//   (3) accumulate the 4 x 4 pairs of each thread. Then (4) the epilogue stores each pair and its mirror image, and lowers row minima.
// Synchronisation: two block barriers a stage. Blocks share row minima alone, by atomicMin.
#pragma once
#include "pair_tiles.cuh"

namespace sts {

// Epilogue that stores the squared distance, exactly 0 on the diagonal. No row minima.
struct StoreSqdist {
  static constexpr bool kOverlap = false;           // no early start: the previous launch belongs to another op
  static constexpr float kCancellation = 1.f / 16;  // see sqdist_mma.cuh
  static constexpr bool kThreeProducts = false;     // see sqdist_wgmma.cuh
  static constexpr uint32_t* row_min = nullptr;
  __device__ float operator()(float sqdist, bool diagonal) const { return diagonal ? 0.f : sqdist; }
};

constexpr int kSmallTile = 32, kLargeTile = 64;

// Bits of a marked pair, whose distance is still to be recomputed: a NaN that arithmetic does not produce.
constexpr uint32_t kMarkedBits = 0xffc0feedu;
__device__ __forceinline__ float marked_pair() { return __uint_as_float(kMarkedBits); }
__device__ __forceinline__ bool is_marked(float stored) { return __float_as_uint(stored) == kMarkedBits; }

// A thread's running minima of the stored values of kRows rows of a tile.
template <int kRows>
struct RowMin {
  float value[kRows];
  __device__ __forceinline__ RowMin() {
#pragma unroll
    for (int r = 0; r < kRows; ++r) value[r] = kInfinity;
  }
  __device__ __forceinline__ void take(int r, float stored) { value[r] = fminf(value[r], stored); }  // fminf ignores a marked pair
  // row_min[i] = min(row_min[i], minimum of row r over a lane group), by atomicMin of ordered bits. Lanes of a group differ in the lane-id
  // bits from kFrom up to, and without, kEnd (lanes_min).
  template <int kFrom, int kEnd>
  __device__ __forceinline__ void flush(int r, uint32_t* row_min, int64_t i) const {
    const float lowest = lanes_min<kFrom, kEnd>(value[r]);
    const int group_bits = (kEnd - 1) & ~(kFrom - 1);  // lane-id bits in which the lanes of a group differ
    if ((threadIdx.x & group_bits) == 0 && lowest < kInfinity) atomicMin(row_min + i, ordered_bits(lowest));
  }
};

// sqdist[n] = |a - b[n]|^2, by a warp; every lane gets the result. kWhole: as in load_vec.
template <bool kWhole, int kCount, class scalar_t>
__device__ __forceinline__ void warp_sqdist(const scalar_t* a, const scalar_t* const (&b)[kCount], int channels, bool aligned,
                                            float (&sqdist)[kCount]) {
  constexpr int kVec = Vec16<scalar_t>::size;
#pragma unroll
  for (int n = 0; n < kCount; ++n) sqdist[n] = 0.f;
#pragma unroll 2
  for (int c = threadIdx.x % 32 * kVec; c < channels; c += 32 * kVec) {
    const Vec16<scalar_t> x = load_vec<kWhole>(a, c, channels, aligned);
    Vec16<scalar_t> y[kCount];
#pragma unroll
    for (int n = 0; n < kCount; ++n) y[n] = load_vec<kWhole>(b[n], c, channels, aligned);
#pragma unroll
    for (int n = 0; n < kCount; ++n)
#pragma unroll
      for (int i = 0; i < kVec; ++i) sqdist[n] = fmaf(x[i] - y[n][i], x[i] - y[n][i], sqdist[n]);
  }
#pragma unroll
  for (int n = 0; n < kCount; ++n) sqdist[n] = warp_sum(sqdist[n]);
}

// marks: a flag per tile, nonzero if the tile has marked pairs; only marked pairs are then recomputed. Null: all pairs are computed.
template <class scalar_t, int kTile, class Tiles, class Store>
__global__ void __launch_bounds__(kTile* kTile / 16, kTile == kLargeTile ? 2 : 4)
    sqdist_tile_kernel(Rows<scalar_t> rows, Tiles tiles, bool aligned, Store store, const unsigned* marks, float* out) {
  await_predecessor();
  constexpr int kThreads = kTile * kTile / 16;  // each thread has 4 x 4 pairs
  constexpr int kChannels = 32, kVec = Vec16<scalar_t>::size;
  constexpr int kLoads = kTile * kChannels / kVec / kThreads;
  static_assert(kLoads * kVec * kThreads == kTile * kChannels, "a stage is loaded by whole threads");
  __shared__ float a[kChannels][kTile + 4], b[kChannels][kTile + 4];

  const int channels = rows.channels;
  const int tid = threadIdx.x, ti = tid / (kTile / 4) * 4, tj = tid % (kTile / 4) * 4;

  for (int64_t index = tiles.begin();; index += tiles.step()) {
    if (marks) index = next_marked(tiles, marks, index);
    if (index >= tiles.end()) break;
    const PairTile tile = tiles.template at<kTile>(index);
    const int64_t tokens = tile.tokens, pitch = tile.pitch, i0 = tile.i, j0 = tile.j;
    if (j0 >= tokens) continue;
    float sum[4][4] = {};
    // Rows that this thread loads in each stage. Rows past the end repeat the last row; their pairs are not stored.
    const scalar_t *row_a[kLoads], *row_b[kLoads];
    Vec16<scalar_t> next_a[kLoads], next_b[kLoads];
#pragma unroll
    for (int l = 0; l < kLoads; ++l) {
      const int token = (l * kThreads + tid) / (kChannels / kVec);
      row_a[l] = rows.row(tile.entry, tile.row + (i0 + token < tokens ? i0 + token : tokens - 1));
      row_b[l] = rows.row(tile.entry, tile.row + (j0 + token < tokens ? j0 + token : tokens - 1));
    }
    const int column = tid % (kChannels / kVec) * kVec;
    static_assert(kThreads % (kChannels / kVec) == 0, "a thread loads the same channels of every row");
    const auto fetch = [&](int c0) {
#pragma unroll
      for (int l = 0; l < kLoads; ++l) {
        next_a[l] = load_channels(row_a[l], c0 + column, channels, aligned);
        next_b[l] = load_channels(row_b[l], c0 + column, channels, aligned);
      }
    };
    fetch(0);
    for (int c0 = 0; c0 < channels; c0 += kChannels) {
      __syncthreads();
#pragma unroll
      for (int l = 0; l < kLoads; ++l) {  // (1) store, after all threads have read the previous stage
        const int token = (l * kThreads + tid) / (kChannels / kVec);
#pragma unroll
        for (int i = 0; i < kVec; ++i) {
          a[column + i][token] = next_a[l][i];
          b[column + i][token] = next_b[l][i];
        }
      }
      __syncthreads();
      if (c0 + kChannels < channels) fetch(c0 + kChannels);  // (2) prefetch
      accumulate_pairs<false>(a, b, ti, tj, sum);            // (3)
    }
    // (4) epilogue
    float* matrix = out + tile.offset;
    RowMin<4> row_minima, column_minima;
#pragma unroll
    for (int s = 0; s < 4; ++s)
#pragma unroll
      for (int t = 0; t < 4; ++t) {
        const int64_t i = i0 + ti + s, j = j0 + tj + t;
        if (i >= tokens || j >= tokens) continue;
        if (marks && (i > j || !is_marked(matrix[i * pitch + j]))) continue;
        const float value = store(sum[s][t], i == j);
        matrix[i * pitch + j] = value;
        if (marks || i0 != j0) matrix[j * pitch + i] = value;
        if (i == j) continue;
        row_minima.take(s, value);
        column_minima.take(t, value);
      }
    if (store.row_min) {
      uint32_t* const row_min = store.row_min + tile.token;
#pragma unroll
      for (int s = 0; s < 4; ++s) {
        row_minima.template flush<1, kTile / 4>(s, row_min, i0 + ti + s);
        column_minima.template flush<kTile / 4, 32>(s, row_min, j0 + tj + s);
      }
    }
  }
}

// Side of a tile: small if large ones were fewer than two per SM.
inline int sqdist_tile(int64_t tokens, int64_t entries) {
  const int64_t large = ceil_div(tokens, kLargeTile);
  return large * (large + 1) / 2 * entries < 2 * device_sm_count() ? kSmallTile : kLargeTile;
}

// marks: see the kernel.
template <int kTile, class scalar_t, class Tiles, class Store>
cudaError_t launch_sqdist_tiles_of(const Rows<scalar_t>& rows, const Tiles& tiles, Store store, const unsigned* marks, float* out,
                                   cudaStream_t stream) {
  const Launch shape{tiles.grid(), dim3(kTile * kTile / 16), 0, 1, false, stream, Store::kOverlap || marks};
  return launch(sqdist_tile_kernel<scalar_t, kTile, Tiles, Store>, shape, rows, tiles, rows_aligned(rows), store, marks, out);
}

// out: see PairTile::offset, pitch; holds store(squared distance) of each pair. tiles.tile: kSmallTile or kLargeTile.
template <class scalar_t, class Tiles, class Store>
cudaError_t launch_sqdist_tiles(const Rows<scalar_t>& rows, const Tiles& tiles, Store store, float* out, cudaStream_t stream) {
  if (tiles.tile == kSmallTile) return launch_sqdist_tiles_of<kSmallTile>(rows, tiles, store, nullptr, out, stream);
  return launch_sqdist_tiles_of<kLargeTile>(rows, tiles, store, nullptr, out, stream);
}

// The same for `entries` entries of a padded batch. out: (entries, tokens, tokens).
template <class scalar_t, class Store>
cudaError_t launch_sqdist_tiles(const Rows<scalar_t>& rows, int64_t tokens, int64_t first_entry, int64_t entries, Store store, float* out,
                                cudaStream_t stream) {
  const PaddedTiles tiles{tokens, nullptr, first_entry, entries, tokens, sqdist_tile(tokens, entries)};
  return launch_sqdist_tiles(rows, tiles, store, out, stream);
}

}  // namespace sts
