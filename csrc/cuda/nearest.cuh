// Nearest neighbour of each query row among the key rows of its item.
//
// What: index and value of the best key row: the smallest squared distance, or the largest cosine. Ties: the lowest index.
// Chosen when: always.
// Steps: (1) RowInfo of all rows: valid, scale, norm; (2) tiles of pairs (row_pairs.cuh, or row_pairs_mma.cuh for cosines of 16-bit rows),
//   whose epilogue finds the lowest key (value, index) of each row of the tile in registers, and lowers the row's key in global memory;
//   (3) matches: keys to index and value.
// Synchronisation: four launches. Blocks meet at atomicMin of whole keys, whose result does not depend on their order.
#pragma once
#include "row_pairs_mma.cuh"

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

// (3) index: holds the keys, and receives the indices; -1 if nothing may be matched.
static __global__ void __launch_bounds__(kMatchThreads) matches_kernel(int64_t count, bool cosine, int64_t* index, float* value) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kMatchThreads + threadIdx.x;
  if (i >= count) return;
  const Key key = static_cast<Key>(index[i]);
  const float matched = key == kNoKey ? kInfinity : key_value(key);
  index[i] = key == kNoKey ? -1 : static_cast<int64_t>(key_index(key));
  value[i] = cosine ? 0.f - matched : matched;
}

// query (batch, rows, channels) and key (batch, count, channels) with the given strides -> index and value (batch, rows).
// info: scratch for the RowInfo of all rows, 2 batch (rows + count) floats.
template <class scalar_t>
cudaError_t launch_nearest(const scalar_t* query, const scalar_t* key, int64_t batch, int64_t rows, int64_t count, int64_t channels,
                           int64_t query_batch_stride, int64_t query_row_stride, int64_t key_batch_stride, int64_t key_row_stride,
                           bool cosine, const double* query_rank, const double* key_rank, bool exclude_self, const int64_t* num_keys,
                           float* info, int64_t* index, float* value, cudaStream_t stream) {
  const Rows<scalar_t> query_rows{query, query_batch_stride, query_row_stride, static_cast<int>(channels)};
  const Rows<scalar_t> key_rows{key, key_batch_stride, key_row_stride, static_cast<int>(channels)};
  RowInfo *const queries = reinterpret_cast<RowInfo*>(info), *const keys = queries + batch * rows;
  static_assert(kNoKey == ~0ull, "the memset below writes kNoKey");
  cudaError_t error = cudaMemsetAsync(index, 0xff, batch * rows * sizeof(int64_t), stream);
  if (error == cudaSuccess) error = launch_row_info(query_rows, batch, rows, nullptr, cosine, queries, stream);
  if (error == cudaSuccess) error = launch_row_info(key_rows, batch, count, num_keys, cosine, keys, stream);
  if (error != cudaSuccess) return error;
  const Side<scalar_t> a{query_rows, rows, queries, rows_aligned(query_rows)}, b{key_rows, count, keys, rows_aligned(key_rows)};
  Key* const best = reinterpret_cast<Key*>(index);
  const NearestEpilogue<true> cosines{queries, keys, rows, count, query_rank, key_rank, exclude_self, best};
  const NearestEpilogue<false> distances{queries, keys, rows, count, query_rank, key_rank, exclude_self, best};
  if (!cosine)
    error = launch_row_pairs<false>(a, b, batch, distances, stream);
  else if (mma_serves(a) && mma_serves(b))
    error = launch_row_pairs_mma(a, b, batch, cosines, stream);
  else
    error = launch_row_pairs<true>(a, b, batch, cosines, stream);
  if (error != cudaSuccess) return error;
  const Launch finish{dim3(static_cast<unsigned>(ceil_div(batch * rows, kMatchThreads))), dim3(kMatchThreads), 0, 1, false, stream};
  return launch(matches_kernel, finish, batch * rows, cosine, index, value);
}

}  // namespace sts
