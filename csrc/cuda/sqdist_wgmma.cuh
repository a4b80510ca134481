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
//   has B alone. Large tiles are taken by clusters of two blocks, a cluster tile at a time (TriangleTile): each block reads half of the
//   columns and multicasts it, so a tile takes three quarters of the bytes from L2. A box may run past the end of the item. Its last rows
//   are then zeros, or rows of the next packed item, and their pairs are not stored;
//   (2) multiply: each consumer warpgroup multiplies 64 rows of A by all of B with wgmma. Every kFlushChannels channels the accumulators of
//   wgmma are added to sums in rounded float32;
//   (3) epilogue: distances from the sums, stored at (a, b) and (b, a); pairs that cancel are marked;
//   (4) repair: each warp computes its marked pairs again, four pairs of a row at a time.
// Synchronisation: mbarriers.
//   full[stage]: the producer's arrival and the bytes of the stage, whoever loads them.
//   empty[stage]: an arrival of every consumer warp of the cluster, once its products of the stage have ended. So a producer may write the
//   stage of both blocks. Both take the same number of steps: a block whose own tile is past the end multiplies, and stores nothing. The
//   producers run ahead into the next tile, so loads go on during an epilogue.
//   met: every consumer warp has lowered the column minima of the tile. They are double-buffered. Invariant: a warp lowers those of tile
//   t + 2 after `met` of t + 1, where all warps arrive after they have read those of t.
//   The blocks of a cluster meet at the start, after both have initialised their mbarriers, and at the end: a block must not exit while
//   the other may arrive at its mbarriers. Clusters do not synchronise with each other.
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
constexpr int kBoxRows = 64;                                                       // of a TMA box: half of a large tile
// Blocks per cluster. Small tiles, which are few, wait for latency and not for L2.
template <int kTile>
constexpr int kTileCluster = kTile == kLargeMmaTile ? 2 : 1;

// The limit of `cancels`.
template <class scalar_t, class Store>
constexpr float kCancelled = kCopyParts<scalar_t> == 1 ? Store::kCancellation : 1.f / 16;

// The tiles of a padded batch, numbered through all entries: a grid-stride loop.
struct PaddedTriangles : PaddedTiles {
  int64_t most;  // tiles of all entries

  explicit PaddedTriangles(const PaddedTiles& tiles) : PaddedTiles(tiles) { most = triangle_tiles(ceil_div(tokens, tile)) * entries; }
  __device__ __forceinline__ int64_t begin() const { return blockIdx.x; }
  __device__ __forceinline__ int64_t end() const { return most; }
  __device__ __forceinline__ int64_t step() const { return gridDim.x; }
  template <int kTile>
  __device__ __forceinline__ PairTile at(int64_t turn) const {
    const int side = static_cast<int>(ceil_div(tokens, kTile)), entry_tiles = static_cast<int>(triangle_tiles(side));
    const TriangleTile place(static_cast<int>(turn % entry_tiles), side);
    PairTile found = tile_of(turn / entry_tiles, place.row * kTile, place.column * kTile);
    found.one_column = place.one_column;
    found.lower_j = place.lower_column * kTile;
    return found;
  }
};

// Whether a block takes part in `tile`: its own tile, or the other tile of its cluster, begins before the end of the item.
template <int kTile>
__device__ __forceinline__ bool has_products(const PairTile& tile) {
  return (kTileCluster<kTile> > 1 ? tile.lower_j : tile.j) < tile.tokens;
}

// The ring of pipeline stages, and the place of a thread in it. A stage has a side A and a side B, of kParts * kTile / kBoxRows boxes each.
template <class scalar_t, int kTile, int kStages>
struct StageRing {
  using element_t = copy_t<scalar_t>;
  static constexpr int kParts = kCopyParts<scalar_t>, kPart = kTile * kBoxChannels, kSide = kParts * kPart;
  static constexpr int kBlocks = kTileCluster<kTile>, kBox = kBoxRows * kBoxChannels;
  static_assert(kBlocks == 1 || kBlocks * kBoxRows == kTile, "each block multicasts one box of a part");

  element_t* stages;        // [kStages][A, B][kParts][kTile][kBoxChannels]
  Mbarrier *full, *empty;   // [kStages]
  int steps;                // stages per tile
  int rank;                 // of the block in its cluster
  int stage = 0, turn = 0;  // turn: of the ring; its parity is the phase of the stage's mbarriers

  __device__ __forceinline__ void next() {
    if (++stage < kStages) return;
    stage = 0;
    ++turn;
  }

  // (1) load, by one thread of the producer.
  __device__ __forceinline__ void load(const TensorMap& map, const PairTile& tile) {
    const int entry = static_cast<int>(tile.entry), row0 = static_cast<int>(tile.row + tile.i);
    const int column0 = static_cast<int>(tile.row + tile.j);
    const bool shared_columns = kBlocks > 1 && tile.one_column;
    for (int step = 0; step < steps; ++step, next()) {
      element_t *const a = stages + stage * 2 * kSide, *const b = a + kSide;
      if (turn > 0) mbarrier_wait(&empty[stage], turn - 1);
      mbarrier_expect_tx(&full[stage], (row0 == column0 ? 1 : 2) * kSide * 2);
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        const auto copy = [&](element_t* side, int first, int box) {
          copy_box(side + part * kPart + box * kBox, map, step * kBoxChannels, part, first + box * kBoxRows, entry, &full[stage]);
        };
#pragma unroll
        for (int box = 0; box < kTile / kBoxRows; ++box) {
          if (row0 != column0) copy(a, row0, box);
          if (!shared_columns) copy(b, column0, box);
        }
        if (shared_columns)
          multicast_box(b + part * kPart + rank * kBox, map, step * kBoxChannels, part, column0 + rank * kBoxRows, entry, &full[stage],
                        kBlocks);
      }
    }
  }

  // By a consumer warp: tells the producers of the cluster that its products of stage `used` have ended.
  __device__ __forceinline__ void give_back(int used) const {
    const int lane = threadIdx.x % 32;
    if constexpr (kBlocks == 1) {
      if (lane == 0) mbarrier_arrive(&empty[used]);
    } else {
      if (lane < kBlocks) mbarrier_arrive_at(&empty[used], lane);
    }
  }

  // (2) multiply, by a consumer warpgroup. dot: products of its 64 rows of A and all rows of B, in the accumulator layout of wgmma.
  __device__ __forceinline__ void multiply(int warpgroup, bool diagonal_tile, float (&dot)[kTile / 2]) {
    constexpr int kSums = kTile / 2, kRunSteps = kFlushChannels / kBoxChannels;
    float run[kSums];  // accumulators of wgmma; dot: their sums in rounded float32
#pragma unroll
    for (int s = 0; s < kSums; ++s) dot[s] = 0.f;
    int used = 0;  // the stage whose products are under way
    for (int begin = 0; begin < steps; begin += kRunSteps) {
#pragma unroll
      for (int step = 0; step < kRunSteps; ++step) {
        if (begin + step >= steps) break;
        mbarrier_wait(&full[stage], turn);
        const element_t *const sides = stages + stage * 2 * kSide, *const b = sides + kSide;
        const element_t* const a = (diagonal_tile ? b : sides) + warpgroup * 64 * kBoxChannels;
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
          give_back(used);
        }
        used = stage;
        next();
      }
      wgmma_finish(run);
      give_back(used);
#pragma unroll
      for (int s = 0; s < kSums; ++s) dot[s] += run[s];
    }
  }
};

// The pairs of a consumer thread in a tile: rows i + 8 h and columns j + 8 n + e, in the accumulator layout of wgmma.
template <int kTile>
struct ThreadPairs {
  int i, j;
  float row_norm[2], column_norm[kTile / 4];  // 0 past the end of the item

  // norms: of the item, of `width` tokens.
  __device__ __forceinline__ ThreadPairs(int i, int j, int width, const float* norms) : i(i), j(j) {
#pragma unroll
    for (int h = 0; h < 2; ++h) row_norm[h] = i + h * 8 < width ? __ldg(norms + i + h * 8) : 0.f;
#pragma unroll
    for (int c = 0; c < kTile / 4; ++c) column_norm[c] = j + c / 2 * 8 + c % 2 < width ? __ldg(norms + j + c / 2 * 8 + c % 2) : 0.f;
  }
};

// Marks and minima of the pairs that a thread has stored.
template <int kTile>
struct StoredPairs {
  bool marked[2] = {false, false};  // [h]: a pair of row i + 8 h is marked
  RowMin<2> row_minima;
  RowMin<kTile / 4> column_minima;
};

// (3) epilogue: stores the pairs of a thread at (a, b) and (b, a). matrix: of the item.
template <class scalar_t, int kTile, class Store>
__device__ __forceinline__ void store_pairs(const PairTile& tile, const ThreadPairs<kTile>& pairs, const float (&dot)[kTile / 2],
                                            Store store, float* matrix, StoredPairs<kTile>& found) {
  const int row0 = static_cast<int>(tile.i), column0 = static_cast<int>(tile.j), width = static_cast<int>(tile.tokens);
  const int i = pairs.i, j = pairs.j;
  const int64_t pitch = tile.pitch;
  float* const upper = matrix + i * pitch + j;
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
          const float norms_of_pair = pairs.row_norm[h] + pairs.column_norm[n * 2 + e];  // NaN: one of the tokens is not finite
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
          found.marked[h] = found.marked[h] || repair;
          found.row_minima.take(h, value[e]);
          found.column_minima.take(n * 2 + e, value[e]);
        }
        if (inside) *reinterpret_cast<float2*>(upper + h * 8 * pitch + n * 8) = make_float2(value[0], value[1]);
      }
    }
  };
  if (row0 != column0 && column0 + kTile <= width && pitch % 2 == 0)
    finish(std::true_type());
  else
    finish(std::false_type());
}

// (3) epilogue: lowers row_min of the tile's rows and columns, by all consumer warps. lowest: (kTile), the column minima in shared memory.
// meeting: the phase of `met`.
template <int kTile>
__device__ __forceinline__ void lower_minima(const StoredPairs<kTile>& found, int first_row, int first_column, uint32_t* row_min,
                                             uint32_t* lowest, Mbarrier* met, int meeting) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int h = 0; h < 2; ++h) found.row_minima.template flush<1, 4>(h, row_min, first_row + lane / 4 + h * 8);
#pragma unroll
  for (int c = 0; c < kTile / 4; ++c) found.column_minima.template flush<4, 32>(c, lowest, lane % 4 * 2 + c / 2 * 8 + c % 2);
  __syncwarp();
  if (lane == 0) mbarrier_arrive(met);
  mbarrier_wait(met, meeting);
  if (threadIdx.x < kTile) {
    if (lowest[threadIdx.x] != ~0u) atomicMin(row_min + first_column + threadIdx.x, lowest[threadIdx.x]);
    lowest[threadIdx.x] = ~0u;
  }
}

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

// Clusters of kTileCluster<kTile> blocks. map: the centred copy, in boxes of kBoxRows rows. tiles: of side kTile. rows, norms: of all
// items; (4) takes differences of `rows`.
template <class scalar_t, int kTile, int kStages, class Tiles, class Store>
__global__ void __launch_bounds__(hopper_threads(kWgmmaThreads<kTile>), 1)
    sqdist_wgmma_kernel(const __grid_constant__ TensorMap map, Rows<scalar_t> rows, bool aligned, Tiles tiles, const float* norms,
                        Store store, float* out) {
#if STS_HOPPER
  await_predecessor();
  constexpr int kWarps = kTile / 64 * 4, kBlocks = kTileCluster<kTile>;  // kWarps: consumers
  STS_DYNAMIC_SHARED(unsigned char, memory);
  __shared__ Mbarrier full[kStages], empty[kStages], met;
  __shared__ uint32_t column_least[2][kTile];  // ordered bits
  unsigned char* const stages = memory + (1024 - reinterpret_cast<uintptr_t>(memory) % 1024) % 1024;
  const int lane = threadIdx.x % 32, warp = __shfl_sync(kFullWarp, static_cast<int>(threadIdx.x) / 32, 0);
  if (threadIdx.x < kStages) {
    mbarrier_init(&full[threadIdx.x]);
    mbarrier_init(&empty[threadIdx.x], kBlocks * kWarps);
  }
  if (threadIdx.x == 0) mbarrier_init(&met, kWarps);
  if (threadIdx.x < kTile) column_least[0][threadIdx.x] = column_least[1][threadIdx.x] = ~0u;
  __syncthreads();
  if constexpr (kBlocks > 1) meet_cluster();
  const int steps = static_cast<int>(ceil_div(rows.channels, kBoxChannels)), rank = static_cast<int>(blockIdx.x % kBlocks);
  StageRing<scalar_t, kTile, kStages> ring{reinterpret_cast<copy_t<scalar_t>*>(stages), full, empty, steps, rank};

  if (warp >= kWarps) {  // the producer
    if constexpr (kTile == kLargeMmaTile) give_registers<40>();
    for (int64_t index = tiles.begin(), end = tiles.end(); warp == kWarps && index < end; index += tiles.step()) {
      const PairTile tile = tiles.template at<kTile>(index);             // by the whole warp: the search for a packed tile votes
      if (lane == 0 && has_products<kTile>(tile)) ring.load(map, tile);  // (1)
    }
  } else {
    if constexpr (kTile == kLargeMmaTile) take_registers<232>();
    int meeting = 0;
    for (int64_t index = tiles.begin(), end = tiles.end(); index < end; index += tiles.step()) {
      const PairTile tile = tiles.template at<kTile>(index);
      if (!has_products<kTile>(tile)) continue;
      const int row0 = static_cast<int>(tile.i), column0 = static_cast<int>(tile.j), width = static_cast<int>(tile.tokens);
      const int first_row = row0 + warp * 16;  // of the warp's 16 rows; a warpgroup has 64

      // Loads the norms before the products, so the epilogue does not wait for them.
      const ThreadPairs<kTile> pairs(first_row + lane / 4, column0 + lane % 4 * 2, width, norms + tile.token);
      float dot[kTile / 2];
      ring.multiply(warp / 4, row0 == column0, dot);  // (2)

      float* const matrix = out + tile.offset;
      uint32_t* const row_min = store.row_min ? store.row_min + tile.token : nullptr;
      StoredPairs<kTile> found;
      store_pairs<scalar_t>(tile, pairs, dot, store, matrix, found);  // (3)
      if (row_min) {
        lower_minima(found, first_row, column0, row_min, column_least[meeting & 1], &met, meeting);
        ++meeting;
      }

      const unsigned low = __ballot_sync(kFullWarp, found.marked[0]), high = __ballot_sync(kFullWarp, found.marked[1]);
      if (!(low | high)) continue;
      Rows<scalar_t> item_rows = rows;
      item_rows.data = rows.row(tile.entry, tile.row);
      repair_marked<kTile>(item_rows, aligned, low, high, first_row, column0, width, store, tile.pitch, matrix, row_min);  // (4)
    }
  }
  if constexpr (kBlocks > 1) meet_cluster();
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
      make_tensor_map(stats.centred, rows.channels, kCopyParts<scalar_t>, items.tokens, entries, copy_pitch, kBoxRows, map);
  if (error != cudaSuccess) return error;
  // The 16-bit copy has the same differences as the features, exactly, and its rows are aligned.
  const auto* const centred = static_cast<const scalar_t*>(stats.centred);
  const Rows<scalar_t> copy{centred, items.tokens * copy_pitch, copy_pitch, static_cast<int>(copy_pitch)};
  const Rows<scalar_t> exact = sizeof(scalar_t) == 2 ? copy : rows;
  constexpr int kBlocks = kTileCluster<kTile>;
  const int64_t useful = ceil_div(tiles.most, kBlocks), resident = ceil_div(device_sm_count(), kBlocks);  // clusters
  const Launch shape{dim3(static_cast<unsigned>((useful < resident ? useful : resident) * kBlocks)),
                     dim3(kWgmmaThreads<kTile>),
                     kWgmmaSharedBytes<scalar_t, kTile, kStages>,
                     kBlocks,
                     false,
                     stream,
                     true};
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
  return launch_sqdist_wgmma(rows, items, PaddedTriangles(tiles), stats, store, out, stream);
}

// Distances of whole entries, (entries, tokens, tokens), through Store. stats: of `items`.
template <class Store, class scalar_t>
cudaError_t launch_sqdist_matrices(const Rows<scalar_t>& rows, const Items& items, int64_t first_entry, int64_t entries,
                                   const TokenStats& stats, float* out, cudaStream_t stream) {
  const PaddedTiles tiles{items.tokens, items.num_tokens, first_entry, entries, items.tokens, wgmma_tile(items.tokens, entries)};
  if constexpr (kWgmmaServes<scalar_t, Store>)
    return launch_sqdist_wgmma(rows, items, tiles, stats, Store{}, out, stream);
  else
    return cudaErrorInvalidValue;
}

}  // namespace sts
