// Squared distances of all pairs of tokens on the tensor cores of Hopper: TMA and wgmma.
//
// What: |a|^2 + |b|^2 - 2ab of the centred copy of the rows (launch_token_stats), for one square tile of the upper triangle after another;
//   a tile is also stored mirrored. Products are exact, sums are float32. A pair that cancels (kCancelled) is marked, and computed again
//   by differences. The bits of a pair depend on the pair and the centre of its item alone, not on the tile.
//   A float32 row x is the sum of two bfloat16 rows, x1 + x2, up to 2^-18 of an element. ab is a1 b1 + a1 b2 + a2 b1: the error is at most
//   1.2e-5 of |a||b|, and 1.9e-4 of a distance that is not marked.
// Chosen when: compute capability 9.0 and code for sm_90a; for float32 rows also Store::kThreeProducts. The features may have any
//   alignment: the rows of the copy are 16-byte aligned.
// Steps: (1) load: a producer warp brings 64 channels of the tile's rows (A) and columns (B) into a pipeline stage by TMA; a diagonal tile
//   has A alone. A box may run past the end of the item. Its last rows are then zeros, or rows of the next packed item, and their pairs
//   are not stored;
//   (2) multiply: each consumer warpgroup multiplies 64 rows of A by all of B with wgmma. Every kFlushChannels channels the accumulators of
//   wgmma are added to sums in rounded float32;
//   (3) epilogue: distances from the sums, stored at (a, b) and (b, a); pairs that cancel are marked;
//   (4) repair: each warp computes its marked pairs again, four pairs of a row at a time.
// Synchronisation: mbarriers.
//   full[stage]: the producer's arrival and the bytes of its boxes.
//   empty[stage]: an arrival of every consumer warp, once its products of the stage have ended. The producer runs ahead into the next tile,
//   so loads go on during an epilogue.
//   met: every consumer warp has lowered the column minima of the tile. They are double-buffered. Invariant: a warp lowers those of tile
//   t + 2 after `met` of t + 1, where all warps arrive after they have read those of t.
//   Blocks do not synchronise with each other.
#pragma once
#include "hopper.cuh"
#include "sqdist_mma.cuh"

namespace sts {

// Threads per block: a consumer warpgroup for every 64 rows, and the producer. For large tiles the producer is a whole warpgroup, because
// setmaxnreg moves its registers to the consumers by warpgroups.
template <int kTile>
constexpr int kWgmmaThreads = kTile == kLargeMmaTile ? 3 * 128 : 128 + 32;
// 16-bit rows of the centred copy per row of the features: 1, or 2 for float32.
template <class scalar_t>
constexpr int kCopyParts = sizeof(scalar_t) / 2;
template <class scalar_t>
using copy_t = std::conditional_t<sizeof(scalar_t) == 2, scalar_t, __nv_bfloat16>;
template <class scalar_t, int kTile>
constexpr int kWgmmaStages = (kTile == kLargeMmaTile ? 6 : 12) / kCopyParts<scalar_t>;  // 192 KB
template <class scalar_t, int kTile, int kStages>
constexpr size_t kWgmmaSharedBytes =
    size_t(kStages) * kCopyParts<scalar_t> * 2 * kTile * kBoxChannels * 2 + 1024;  // 1024: to align the stages

// The limit of `cancels`.
template <class scalar_t, class Store>
constexpr float kCancelled = kCopyParts<scalar_t> == 1 ? Store::kCancellation : 1.f / 16;

// Tile number t of an upper triangle of tiles x tiles: the tiles off the diagonal, column by column, then the diagonal. Diagonal tiles load
// half as much: as the last ones they even out the ends of the blocks.
struct TriangleTile {
  int row, column;
  __device__ __forceinline__ TriangleTile(int t, int tiles) {
    const int above = tiles * (tiles - 1) / 2;
    row = column = t - above;
    if (t >= above) return;
    const float square = 1.f + 8.f * static_cast<float>(t);
    column = static_cast<int>((1.f + square * rsqrtf(square)) / 2.f);
    column -= column * (column - 1) / 2 > t;  // the root may be off by one
    column += (column + 1) * column / 2 <= t;
    row = t - column * (column - 1) / 2;
  }
};

// The tiles of entries first_entry, first_entry + 1, ... of a padded batch, in a grid-stride loop (pair_tiles.cuh has the interface).
struct PaddedTriangles {
  Items items;
  int64_t first_entry, pitch, most;  // most: tiles of all entries
  int tile;                          // side of a tile, in tokens

  PaddedTriangles(const Items& items, const PaddedTiles& tiles)
      : items(items), first_entry(tiles.first_entry), pitch(tiles.pitch), tile(tiles.tile) {
    const int64_t side = ceil_div(items.tokens, tile);
    most = side * (side + 1) / 2 * tiles.entries;
  }
  __device__ __forceinline__ int64_t begin() const { return blockIdx.x; }
  __device__ __forceinline__ int64_t end() const { return most; }
  __device__ __forceinline__ int64_t step() const { return gridDim.x; }
  // A tile may lie past the end of a ragged item.
  template <int kTile>
  __device__ __forceinline__ PairTile at(int64_t turn) const {
    const int side = static_cast<int>(ceil_div(items.tokens, kTile)), entry_tiles = side * (side + 1) / 2;
    const int64_t held = turn / entry_tiles;
    const TriangleTile tile(static_cast<int>(turn % entry_tiles), side);
    const int64_t entry = first_entry + held;
    return {entry,
            0,
            entry,
            entry * items.tokens,
            items[entry].tokens,
            pitch,
            held * items.tokens * pitch,
            tile.row * kTile,
            tile.column * kTile};
  }
};

// (4) Repairs the marked pairs of 16 rows of a tile, by the warp that stored them. Each pair above the diagonal is stored twice.
// rows: of the item. low, high: bit l: lane l has marked a pair in rows 0..7, in rows 8..15; lanes 4r..4r + 3 hold row r.
template <int kTile, class scalar_t, class Store>
__device__ __noinline__ void repair_marked(Rows<scalar_t> rows, bool aligned, unsigned low, unsigned high, int first_row, int first_column,
                                           int width, Store store, int64_t pitch, float* matrix, uint32_t* row_min) {
  const int lane = threadIdx.x % 32;
  __syncwarp();  // all lanes have stored what they marked
  for (int r = 0; r < 16; ++r) {
    if (!((r < 8 ? low : high) >> r % 8 * 4 & 15)) continue;
    const int row = first_row + r;
    float stored[kTile / 32];
#pragma unroll
    for (int c = 0; c < kTile / 32; ++c) {
      const int column = first_column + c * 32 + lane;
      stored[c] = column > row && column < width ? matrix[row * pitch + column] : 0.f;
    }
    __syncwarp();  // all lanes have read what others store below
#pragma unroll
    for (int c = 0; c < kTile / 32; ++c) {
      const int begin = first_column + c * 32;
      unsigned left = __ballot_sync(kFullWarp, is_marked(stored[c]));
      while (left) {  // four pairs at a time: their loads overlap
        int column[4];
        const scalar_t* other[4];
        float sqdist[4];
#pragma unroll
        for (int p = 0; p < 4; ++p) {
          column[p] = left ? begin + __ffs(static_cast<int>(left)) - 1 : -1;
          other[p] = rows.row(0, column[p] >= 0 ? column[p] : row);
          left &= left - 1;  // of 0: 0
        }
        warp_sqdist<sizeof(scalar_t) == 2>(rows.row(0, row), other, rows.channels, aligned, sqdist);
#pragma unroll
        for (int p = 0; p < 4; ++p) {
          if (lane != p || column[p] < 0) continue;
          const float value = store(sqdist[p], false);
          matrix[row * pitch + column[p]] = value;
          matrix[column[p] * pitch + row] = value;
          if (!row_min || !(value < kInfinity)) continue;
          atomicMin(row_min + row, ordered_bits(value));
          atomicMin(row_min + column[p], ordered_bits(value));
        }
      }
    }
  }
}

// map: the centred copy, in boxes of kTile rows. tiles: of side kTile. rows, norms: of all items; (4) takes differences of `rows`.
template <class scalar_t, int kTile, int kStages, class Tiles, class Store>
__global__ void __launch_bounds__(hopper_threads(kWgmmaThreads<kTile>), 1)
    sqdist_wgmma_kernel(const __grid_constant__ TensorMap map, Rows<scalar_t> rows, bool aligned, Tiles tiles, const float* norms,
                        Store store, float* out) {
#if STS_HOPPER
  using element_t = copy_t<scalar_t>;
  constexpr int kParts = kCopyParts<scalar_t>;
  constexpr int kWarps = kTile / 64 * 4, kSums = kTile / 2, kPart = kTile * kBoxChannels, kSide = kParts * kPart;
  constexpr int kRunSteps = kFlushChannels / kBoxChannels;
  STS_DYNAMIC_SHARED(unsigned char, memory);
  __shared__ Mbarrier full[kStages], empty[kStages], met;
  __shared__ uint32_t column_least[2][kTile];  // ordered bits
  element_t* const stages = reinterpret_cast<element_t*>(memory + (1024 - reinterpret_cast<uintptr_t>(memory) % 1024) % 1024);
  const int lane = threadIdx.x % 32, warp = __shfl_sync(kFullWarp, static_cast<int>(threadIdx.x) / 32, 0);
  const int steps = static_cast<int>(ceil_div(rows.channels, kBoxChannels));
  if (threadIdx.x < kStages) {
    mbarrier_init(&full[threadIdx.x]);
    mbarrier_init(&empty[threadIdx.x], kWarps);
  }
  if (threadIdx.x == 0) mbarrier_init(&met, kWarps);
  if (threadIdx.x < kTile) column_least[0][threadIdx.x] = column_least[1][threadIdx.x] = ~0u;
  __syncthreads();
  // f(tile) for the tiles of this block. By whole warps: the search for a packed tile votes.
  const auto for_tiles = [&](const auto& f) {
    for (int64_t turn = tiles.begin(), end = tiles.end(); turn < end; turn += tiles.step()) {
      const PairTile tile = tiles.template at<kTile>(turn);
      if (tile.j < tile.tokens) f(tile);
    }
  };
  int stage = 0, turn = 0;  // turn: of the ring of stages; its parity is the phase of the stage's mbarriers
  const auto next_stage = [&] {
    if (++stage < kStages) return;
    stage = 0;
    ++turn;
  };

  if (warp >= kWarps) {  // (1) load
    if constexpr (kTile == kLargeMmaTile) give_registers<40>();
    if (warp != kWarps) return;
    for_tiles([&](const PairTile& tile) {
      if (lane != 0) return;
      const int entry = static_cast<int>(tile.entry), row0 = static_cast<int>(tile.row + tile.i);
      const int column0 = static_cast<int>(tile.row + tile.j);
      for (int step = 0; step < steps; ++step, next_stage()) {
        element_t* const sides = stages + stage * 2 * kSide;
        if (turn > 0) mbarrier_wait(&empty[stage], turn - 1);
        mbarrier_expect_tx(&full[stage], (row0 == column0 ? 1 : 2) * kSide * 2);
#pragma unroll
        for (int part = 0; part < kParts; ++part) {
          copy_box(sides + part * kPart, map, step * kBoxChannels, part, row0, entry, &full[stage]);
          if (row0 != column0) copy_box(sides + kSide + part * kPart, map, step * kBoxChannels, part, column0, entry, &full[stage]);
        }
      }
    });
    return;
  }

  if constexpr (kTile == kLargeMmaTile) take_registers<232>();
  int meeting = 0;
  for_tiles([&](const PairTile& tile) {
    const int row0 = static_cast<int>(tile.i), column0 = static_cast<int>(tile.j), width = static_cast<int>(tile.tokens);
    const int64_t pitch = tile.pitch;
    const bool diagonal_tile = row0 == column0;
    const int first_row = row0 + warp * 16;  // of the warp's 16 rows; a warpgroup has 64
    const int i = first_row + lane / 4, j = column0 + lane % 4 * 2;
    const float* const norm = norms + tile.token;
    float row_norm[2], column_norm[kTile / 4];  // loaded before the products: the epilogue does not wait for them
#pragma unroll
    for (int h = 0; h < 2; ++h) row_norm[h] = i + h * 8 < width ? __ldg(norm + i + h * 8) : 0.f;
#pragma unroll
    for (int c = 0; c < kTile / 4; ++c) column_norm[c] = j + c / 2 * 8 + c % 2 < width ? __ldg(norm + j + c / 2 * 8 + c % 2) : 0.f;

    // (2) multiply. run: accumulators of wgmma; dot: their sums in rounded float32.
    float dot[kSums], run[kSums];
#pragma unroll
    for (int s = 0; s < kSums; ++s) dot[s] = 0.f;
    int used = 0;  // the stage whose products are under way
    for (int begin = 0; begin < steps; begin += kRunSteps) {
#pragma unroll
      for (int step = 0; step < kRunSteps; ++step) {
        if (begin + step >= steps) break;
        mbarrier_wait(&full[stage], turn);
        const element_t *const sides = stages + stage * 2 * kSide, *const a = sides + warp / 4 * 64 * kBoxChannels;
        const element_t* const b = diagonal_tile ? sides : sides + kSide;
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < kBoxChannels / 16; ++k) {
          wgmma(run, a, b, k, step + k > 0);
          if constexpr (kParts == 2) {
            wgmma(run, a, b + kPart, k, true);
            wgmma(run, a + kPart, b, k, true);
          }
        }
        wgmma_commit();
        if (step > 0) {
          wgmma_wait<1>();
          if (lane == 0) mbarrier_arrive(&empty[used]);
        }
        used = stage;
        next_stage();
      }
      wgmma_wait<0>();
      if (lane == 0) mbarrier_arrive(&empty[used]);
#pragma unroll
      for (int s = 0; s < kSums; ++s) dot[s] += run[s];
    }

    // (3) epilogue
    float* const matrix = out + tile.offset;
    float* const upper = matrix + i * pitch + j;
    uint32_t* const row_min = store.row_min ? store.row_min + tile.token : nullptr;
    bool marked[2] = {false, false};  // [h]: this thread has marked a pair of row i + 8h
    RowMin<2> row_minima;
    RowMin<kTile / 4> column_minima;
    const auto finish = [&](auto all_inside) {
      constexpr bool inside = decltype(all_inside)::value;  // all pairs are above the diagonal and before the end; the pitch is even
      float* lower = matrix + j * pitch + i;
#pragma unroll
      for (int n = 0; n < kTile / 8; ++n, lower += 8 * pitch) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          float value[2];
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const int row = i + h * 8, column = j + n * 8 + e;
            const float norms_of_pair = row_norm[h] + column_norm[n * 2 + e];  // NaN: one of the tokens is not finite
            const float sqdist = fmaf(-2.f, dot[n * 4 + h * 2 + e], norms_of_pair), stored = store(sqdist, false);
            const bool repair = cancels(sqdist, norms_of_pair, kCancelled<scalar_t, Store>) && norms_of_pair == norms_of_pair;
            value[e] = repair ? marked_pair() : stored;
            if (inside) {
              lower[e * pitch + h * 8] = value[e];
            } else {
              if (row > column || column >= width) continue;
              if (row == column) value[e] = store(0.f, true);
              lower[e * pitch + h * 8] = upper[h * 8 * pitch + n * 8 + e] = value[e];
              if (row == column) continue;
            }
            marked[h] = marked[h] || repair;
            row_minima.take(h, value[e]);
            column_minima.take(n * 2 + e, value[e]);
          }
          if (inside) *reinterpret_cast<float2*>(upper + h * 8 * pitch + n * 8) = make_float2(value[0], value[1]);
        }
      }
    };
    if (!diagonal_tile && column0 + kTile <= width && pitch % 2 == 0)
      finish(std::true_type());
    else
      finish(std::false_type());
    if (row_min) {
#pragma unroll
      for (int h = 0; h < 2; ++h) row_minima.template flush<1, 4>(h, row_min, i + h * 8);
      uint32_t* const lowest = column_least[meeting & 1];
#pragma unroll
      for (int c = 0; c < kTile / 4; ++c) column_minima.template flush<4, 32>(c, lowest, lane % 4 * 2 + c / 2 * 8 + c % 2);
      __syncwarp();
      if (lane == 0) mbarrier_arrive(&met);
      mbarrier_wait(&met, meeting++);
      if (threadIdx.x < kTile) {
        if (lowest[threadIdx.x] != ~0u) atomicMin(row_min + column0 + threadIdx.x, lowest[threadIdx.x]);
        lowest[threadIdx.x] = ~0u;
      }
    }
    const unsigned low = __ballot_sync(kFullWarp, marked[0]), high = __ballot_sync(kFullWarp, marked[1]);
    if (!(low | high)) return;
    Rows<scalar_t> item_rows = rows;
    item_rows.data = rows.row(tile.entry, tile.row);
    repair_marked<kTile>(item_rows, aligned, low, high, first_row, column0, width, store, pitch, matrix, row_min);
  });
#endif
}

// Side of a tile. Small tiles keep all SMs busy, where there are at most two per SM; large tiles load half as much per pair.
inline int wgmma_tile(int64_t tokens, int64_t entries) {
  const int64_t small = ceil_div(tokens, kSmallMmaTile);
  return small * (small + 1) / 2 * entries > 2 * device_sm_count() ? kLargeMmaTile : kSmallMmaTile;
}

template <class scalar_t, class Store>
constexpr bool kWgmmaServes = sizeof(scalar_t) == 2 || Store::kThreeProducts;

template <class scalar_t, class Store>
bool wgmma_serves() {
  if constexpr (kWgmmaServes<scalar_t, Store>) {
    constexpr int kTile = kSmallMmaTile;
    const auto kernel = sqdist_wgmma_kernel<scalar_t, kTile, kWgmmaStages<scalar_t, kTile>, PaddedTriangles, Store>;
    return kernel_serves(kernel, kWgmmaThreads<kTile>);
  } else {
    return false;
  }
}

template <class scalar_t, int kTile, int kStages = kWgmmaStages<scalar_t, kTile>, class Tiles, class Store>
cudaError_t launch_sqdist_wgmma_of(const Rows<scalar_t>& rows, const Items& items, const Tiles& tiles, const TokenStats& stats, Store store,
                                   float* out, cudaStream_t stream) {
  TensorMap map;
  const int64_t copy_pitch = centred_pitch(rows.channels), entries = items.entries();
  const cudaError_t error =
      make_tensor_map(stats.centred, rows.channels, kCopyParts<scalar_t>, items.tokens, entries, copy_pitch, kTile, map);
  if (error != cudaSuccess) return error;
  // The 16-bit copy has the same differences as the features, exactly, and its rows are aligned.
  const auto* const centred = static_cast<const scalar_t*>(stats.centred);
  const Rows<scalar_t> copy{centred, items.tokens * copy_pitch, copy_pitch, static_cast<int>(copy_pitch)};
  const Rows<scalar_t> exact = sizeof(scalar_t) == 2 ? copy : rows;
  const int64_t sms = device_sm_count();
  const Launch shape{dim3(static_cast<unsigned>(tiles.most < sms ? tiles.most : sms)),
                     dim3(kWgmmaThreads<kTile>),
                     kWgmmaSharedBytes<scalar_t, kTile, kStages>,
                     1,
                     false,
                     stream};
  return launch(sqdist_wgmma_kernel<scalar_t, kTile, kStages, Tiles, Store>, shape, map, exact, rows_aligned(exact), tiles, stats.norms,
                store, out);
}

// Distances of the rows of stats.centred, through `store`. tiles.tile: wgmma_tile. out: see PairTile::offset, pitch.
template <class scalar_t, class Tiles, class Store>
cudaError_t launch_sqdist_wgmma(const Rows<scalar_t>& rows, const Items& items, const Tiles& tiles, const TokenStats& stats, Store store,
                                float* out, cudaStream_t stream) {
  const auto launch_tile = tiles.tile == kLargeMmaTile
                               ? launch_sqdist_wgmma_of<scalar_t, kLargeMmaTile, kWgmmaStages<scalar_t, kLargeMmaTile>, Tiles, Store>
                               : launch_sqdist_wgmma_of<scalar_t, kSmallMmaTile, kWgmmaStages<scalar_t, kSmallMmaTile>, Tiles, Store>;
  return launch_tile(rows, items, tiles, stats, store, out, stream);
}

// Scratch for launch_sqdist_wgmma alone: the stats of `items`, without row minima.
template <class Allocate>
void take_wgmma_stats(TokenStats& stats, const Items& items, int64_t channels, int64_t element_bytes, Allocate&& allocate) {
  take_token_stats(stats, items, channels, element_bytes, false, true, true, false, allocate);
}

// The same for a padded batch, whose ragged items hold fewer tiles.
template <class scalar_t, class Store>
cudaError_t launch_sqdist_wgmma(const Rows<scalar_t>& rows, const Items& items, const PaddedTiles& tiles, const TokenStats& stats,
                                Store store, float* out, cudaStream_t stream) {
  return launch_sqdist_wgmma(rows, items, PaddedTriangles(items, tiles), stats, store, out, stream);
}

// Distances of whole entries, (entries, tokens, tokens), through Store. stats: of `items`.
template <class Store, class scalar_t>
cudaError_t launch_sqdist_matrices(const Rows<scalar_t>& rows, const Items& items, int64_t first_entry, int64_t entries,
                                   const TokenStats& stats, float* out, cudaStream_t stream) {
  const PaddedTiles tiles{items.tokens, first_entry, entries, items.tokens, wgmma_tile(items.tokens, entries)};
  if constexpr (kWgmmaServes<scalar_t, Store>)
    return launch_sqdist_wgmma(rows, items, tiles, stats, Store{}, out, stream);
  else
    return cudaErrorInvalidValue;
}

}  // namespace sts
