// Nearest neighbour of each query row among the key rows of its item.
//
// What: index and value of the best key row: the smallest squared distance, or the largest cosine. Ties: the lowest index.
// Chosen when: always.
// Steps: (1) RowInfo of all rows: valid, scale, norm; (2) tiles of pairs (row_pairs.cuh, or row_pairs_mma.cuh for cosines of 16-bit rows),
//   whose epilogue finds the lowest key (value, index) of each row of the tile in registers, and lowers the row's key in global memory.
//   Where queries are the keys, distances may be stored instead (sqdist_strip.cuh), and a warp finds the lowest key of a row;
//   (3) matches: keys to index and value.
// Synchronisation: launches. Blocks lower a query's key by atomicMin, whose result does not depend on their order.
#pragma once
#include "row_pairs_mma.cuh"
#include "sqdist_strip.cuh"

namespace sts {

// Epilogue of the pairs. `best` holds for each query the lowest key (value, index of the key row); a cosine is negated.
template <bool kCosine>
struct NearestEpilogue {
  const RowInfo *queries, *keys;
  int64_t rows, count;
  const double *query_rank, *key_rank;  // (batch, rows), (batch, count): a pair needs key_rank < query_rank; null: no ranks
  bool exclude_self;
  Key* best;  // (batch, rows)

  // Key of the pair of query i and key row j; kNoKey if they may not be matched. value: squared distance, or product of the scaled rows.
  __device__ __forceinline__ Key pair(int64_t entry, int64_t i, int64_t j, float value) const {
    if (i >= rows || j >= count || (exclude_self && i == j)) return kNoKey;
    const RowInfo query = queries[entry * rows + i], key = keys[entry * count + j];
    if (!query.valid() || !key.valid()) return kNoKey;
    if (query_rank && !(key_rank[entry * count + j] < query_rank[entry * rows + i])) return kNoKey;
    if (kCosine) value = fminf(fmaxf(-value * query.inv_norm * key.inv_norm, -1.f), 1.f);
    return make_key(value + 0.f, static_cast<uint32_t>(j));  // + 0: -0 becomes 0, so that they tie
  }
  __device__ __forceinline__ void offer(int64_t entry, int64_t i, Key low) const {
    if (low != kNoKey) atomicMin(best + entry * rows + i, low);
  }

  template <int kTile>
  __device__ __forceinline__ void row(int64_t entry, int64_t i, int64_t j, const float (&value)[4]) const {
    Key low = kNoKey;
#pragma unroll
    for (int t = 0; t < 4; ++t) low = lower(low, pair(entry, i, j + t, value[t]));
#pragma unroll
    for (int offset = 1; offset < kTile / 4; offset *= 2) low = lower(low, __shfl_xor_sync(kFullWarp, low, offset));
    if (threadIdx.x % (kTile / 4) == 0) offer(entry, i, low);
  }
};

constexpr int kMatchThreads = 256;

// (2) of stored distances: a warp per row of the strip, whose first entry is `first`.
static __global__ void __launch_bounds__(kMatchThreads)
    match_strip_kernel(const float* strip, int64_t first, int64_t entries, NearestEpilogue<false> pairs) {
  const int64_t r = static_cast<int64_t>(blockIdx.x) * (kMatchThreads / 32) + threadIdx.x / 32;
  if (r >= entries * pairs.rows) return;
  const int64_t entry = first + r / pairs.rows, i = r % pairs.rows;
  Key low = kNoKey;
#pragma unroll 4
  for (int64_t j = threadIdx.x % 32; j < pairs.count; j += 32) low = lower(low, pairs.pair(entry, i, j, strip[r * pairs.count + j]));
  low = warp_lowest(low);
  if (threadIdx.x % 32 == 0) pairs.offer(entry, i, low);
}

// (3) index: holds the keys, and receives the indices; -1 if nothing may be matched.
static __global__ void __launch_bounds__(kMatchThreads) matches_kernel(int64_t count, bool cosine, int64_t* index, float* value) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kMatchThreads + threadIdx.x;
  if (i >= count) return;
  const Key key = static_cast<Key>(index[i]);
  const float matched = key == kNoKey ? kInfinity : key_value(key);
  index[i] = key == kNoKey ? -1 : static_cast<int64_t>(key_index(key));
  value[i] = cosine ? 0.f - matched : matched;
}

// ---- plan and launch ----

// The rows of a call: query (batch, rows, channels), key (batch, count, channels).
template <class scalar_t>
struct NearestRows {
  Rows<scalar_t> query, key;
  int64_t batch, rows, count;
  bool same;  // each item's queries are its keys: one view of the same memory
};

struct NearestPlan {
  int64_t strip_entries;  // batch entries whose distances are stored at a time; 0: pairs are not stored
};

template <class scalar_t>
NearestPlan plan_nearest(const NearestRows<scalar_t>& given, bool cosine) {
  const bool stored = !cosine && given.same && strip_serves<scalar_t>();
  return NearestPlan{stored ? strip_entries(given.batch, given.rows) : 0};
}

// Scratch in device memory. allocate(bytes) is called once per array in use; others are null.
struct NearestScratch {
  RowInfo *queries = nullptr, *keys = nullptr;  // (batch, rows), (batch, count)
  float* strip = nullptr;                       // (plan.strip_entries, rows, count)
  TokenStats stats{};                           // of all rows, for the strip

  template <class scalar_t, class Allocate>
  NearestScratch(const NearestPlan& plan, const NearestRows<scalar_t>& given, Allocate&& allocate) {
    take_array(queries, given.batch * given.rows, allocate);
    take_array(keys, given.batch * given.count, allocate);
    take_array(strip, plan.strip_entries * given.rows * given.count, allocate);
    if (plan.strip_entries > 0)
      take_wgmma_stats(stats, padded_items(given.batch, given.rows), given.key.channels, sizeof(scalar_t), allocate);
  }
};

// How the rows may be matched.
struct NearestOptions {
  bool cosine;
  const double *query_rank, *key_rank;  // see NearestEpilogue
  bool exclude_self;
  const int64_t* num_keys;  // (batch); null: all
};

// (2) of the entries of a strip: strip_entries at a time.
template <class scalar_t>
cudaError_t match_in_strips(const NearestRows<scalar_t>& given, const NearestPlan& plan, const NearestScratch& scratch,
                            const NearestEpilogue<false>& pairs, cudaStream_t stream) {
  const Items items = padded_items(given.batch, given.rows);
  cudaError_t error = launch_token_stats(given.key, items, scratch.stats, stream);
  for (int64_t first = 0; first < given.batch && error == cudaSuccess; first += plan.strip_entries) {
    const int64_t entries = given.batch - first < plan.strip_entries ? given.batch - first : plan.strip_entries;
    error = launch_sqdist_matrices<StripSqdist>(given.key, items, first, entries, scratch.stats, scratch.strip, stream);
    if (error != cudaSuccess) return error;
    const dim3 grid(static_cast<unsigned>(ceil_div(entries * given.rows, kMatchThreads / 32)));
    error = launch(match_strip_kernel, Launch{grid, dim3(kMatchThreads), 0, 1, false, stream}, scratch.strip, first, entries, pairs);
  }
  return error;
}

// index, value: (batch, rows).
template <class scalar_t>
cudaError_t launch_nearest(const NearestRows<scalar_t>& given, const NearestOptions& options, const NearestPlan& plan,
                           const NearestScratch& scratch, int64_t* index, float* value, cudaStream_t stream) {
  const auto [query, key, batch, rows, count, same] = given;
  const bool one_info = same && !options.num_keys;  // a row is valid as a query and as a key, or as neither
  RowInfo *const queries = scratch.queries, *const keys = one_info ? queries : scratch.keys;
  static_assert(kNoKey == ~0ull, "the memset below writes kNoKey");
  cudaError_t error = cudaMemsetAsync(index, 0xff, batch * rows * sizeof(int64_t), stream);
  if (error == cudaSuccess) error = launch_row_info(query, batch, rows, nullptr, options.cosine, queries, stream);
  if (error == cudaSuccess && !one_info) error = launch_row_info(key, batch, count, options.num_keys, options.cosine, keys, stream);
  if (error != cudaSuccess) return error;
  const Side<scalar_t> a{query, rows, queries, rows_aligned(query)}, b{key, count, keys, rows_aligned(key)};
  Key* const best = reinterpret_cast<Key*>(index);
  const NearestEpilogue<true> cosines{queries, keys, rows, count, options.query_rank, options.key_rank, options.exclude_self, best};
  const NearestEpilogue<false> distances{queries, keys, rows, count, options.query_rank, options.key_rank, options.exclude_self, best};
  if (plan.strip_entries > 0)
    error = match_in_strips(given, plan, scratch, distances, stream);
  else if (!options.cosine)
    error = launch_row_pairs<false>(a, b, batch, distances, stream);
  else if (mma_serves(a) && mma_serves(b))
    error = launch_row_pairs_mma(a, b, batch, cosines, stream);
  else
    error = launch_row_pairs<true>(a, b, batch, cosines, stream);
  if (error != cudaSuccess) return error;
  const Launch finish{dim3(static_cast<unsigned>(ceil_div(batch * rows, kMatchThreads))), dim3(kMatchThreads), 0, 1, false, stream};
  return launch(matches_kernel, finish, batch * rows, options.cosine, index, value);
}

}  // namespace sts
