// What: exp(-mean / channels) of the k smallest squared distances of each token.
// Chosen when: always.
// Steps: (1) which tokens count; then, for as many rows at a time as `strip` holds: (2) their distances to all tokens of their item
//   (row_pairs.cuh); (3) a block a row: a radix selection of the k-th smallest, 8 bits a pass, and the sum up to it.
// Synchronisation: launches. In (3) block barriers; tokens are counted by atomics, which add integers, and summed in a fixed order.
#pragma once
#include "row_pairs.cuh"

namespace sts {

// Distances to the tokens that count, NaN to the others.
struct TakeDistances {
  const RowInfo* keys;
  int64_t rows, count;
  float* strip;  // (entries, rows, count)

  template <int kTile>
  __device__ __forceinline__ void row(int64_t entry, int64_t i, int64_t j, const float (&value)[4]) const {
    if (i >= rows) return;
#pragma unroll
    for (int t = 0; t < 4; ++t)
      if (j + t < count)
        strip[(entry * rows + i) * count + j + t] = keys[entry * count + j + t].counts() ? value[t] : __uint_as_float(0x7fc00000u);
  }
};

constexpr int kDensityThreads = 256;

// Distances are not negative, so their bits order like them, and every NaN comes after infinity.
constexpr uint32_t kInfinityBits = 0x7f800000u;

// The sum over the block, in a fixed order, given to every thread. partial: a slot a warp.
__device__ __forceinline__ double block_sum(double value, double* partial) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) value += __shfl_xor_sync(kFullWarp, value, offset);
  __syncthreads();  // all are done with what `partial` held
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = value;
  __syncthreads();
  double sum = 0;
  for (int warp = 0; warp < kDensityThreads / 32; ++warp) sum += partial[warp];
  return sum;
}

// Row blockIdx.x of every entry; row i of the strip is token first + i. density: (entries, count).
static __global__ void __launch_bounds__(kDensityThreads)
    density_kernel(const float* strip, const RowInfo* info, int64_t entries, int64_t first, int64_t rows, int64_t count, int64_t k,
                   int channels, float* density) {
  __shared__ unsigned bins[256];
  __shared__ unsigned chosen[2];  // the bin of the k-th smallest, and how many come before it
  __shared__ double partial[kDensityThreads / 32];
  const int tid = threadIdx.x, lane = tid % 32;
  const int64_t i = blockIdx.x;
  for (int64_t entry = blockIdx.y; entry < entries; entry += gridDim.y) {
    float* out = density + entry * count + first + i;
    if (!info[entry * count + first + i].counts()) {
      if (tid == 0) *out = 0.f;
      continue;
    }
    const uint32_t* values = reinterpret_cast<const uint32_t*>(strip) + (entry * rows + i) * count;
    int found = 0;
    for (int64_t j = tid; j < count; j += kDensityThreads) found += values[j] <= kInfinityBits;
    const auto present = static_cast<int64_t>(block_sum(found, partial));
    const int64_t kept = k < present ? k : present;
    // `prefix`: the leading bits of the kept-th smallest as far as they are known; `rank`: which of those that begin so it is, from 1.
    uint32_t prefix = 0, known = 0;
    auto rank = static_cast<unsigned>(kept);
    for (int shift = 24; shift >= 0; shift -= 8) {
      bins[tid] = 0;
      __syncthreads();  // also: all have read `chosen`
      for (int64_t j = tid; j < count; j += kDensityThreads)
        if (values[j] <= kInfinityBits && (values[j] & known) == prefix) atomicAdd(bins + (values[j] >> shift & 255u), 1u);
      __syncthreads();
      if (tid < 32) {  // a lane has 8 bins
        unsigned mine = 0;
        for (int bin = 0; bin < 8; ++bin) mine += bins[lane * 8 + bin];
        unsigned before = mine;
#pragma unroll
        for (int offset = 1; offset < 32; offset *= 2) {
          const unsigned lower_lane = __shfl_up_sync(kFullWarp, before, offset);
          if (lane >= offset) before += lower_lane;
        }
        before -= mine;
        if (before < rank && rank <= before + mine) {
          int bin = lane * 8;
          while (before + bins[bin] < rank) before += bins[bin++];
          chosen[0] = bin, chosen[1] = before;
        }
      }
      __syncthreads();
      prefix |= chosen[0] << shift;
      known |= 255u << shift;
      rank -= chosen[1];
    }
    double sum = 0;
    for (int64_t j = tid; j < count; j += kDensityThreads)
      if (values[j] < prefix) sum += __uint_as_float(values[j]);
    sum = block_sum(sum, partial) + static_cast<double>(rank) * __uint_as_float(prefix);  // `rank` of those kept equal the last
    if (tid == 0) *out = expf(-static_cast<float>(sum / static_cast<double>(kept) / channels));
  }
}

// Floats of the strip: what fits 256 MiB of a batch, a row at the least.
constexpr int64_t kMostStrip = int64_t(1) << 26;
inline int64_t knn_strip(int64_t batch, int64_t tokens) {
  if (tokens > kMostStrip / tokens) return (kMostStrip / tokens > 0 ? kMostStrip / tokens : 1) * tokens;
  const int64_t entries = kMostStrip / (tokens * tokens);
  return (entries < batch ? entries : batch) * tokens * tokens;
}

// features (batch, tokens, channels) with the given strides -> density (batch, tokens). strip: `strip_floats` of scratch, tokens at the
// least; info: 2 batch tokens floats.
template <class scalar_t>
cudaError_t launch_knn_density(const scalar_t* features, int64_t batch, int64_t tokens, int64_t channels, int64_t batch_stride,
                               int64_t row_stride, int64_t k, const int64_t* num_tokens, int64_t strip_floats, float* strip, float* info,
                               float* density, cudaStream_t stream) {
  const Rows<scalar_t> all{features, batch_stride, row_stride, static_cast<int>(channels)};
  RowInfo* const counts = reinterpret_cast<RowInfo*>(info);
  cudaError_t error = launch_row_info(all, batch, tokens, num_tokens, false, counts, stream);
  const int64_t fit = strip_floats / tokens;  // rows
  const int64_t entries_a_time = fit / tokens > 0 ? fit / tokens : 1, rows_a_time = fit < tokens ? fit : tokens;
  for (int64_t entry = 0; entry < batch; entry += entries_a_time) {
    const int64_t entries = entries_a_time < batch - entry ? entries_a_time : batch - entry;
    const RowInfo* const of_entry = counts + entry * tokens;
    Rows<scalar_t> keys = all;
    keys.data += entry * batch_stride;
    for (int64_t first = 0; first < tokens && error == cudaSuccess; first += rows_a_time) {
      const int64_t rows = rows_a_time < tokens - first ? rows_a_time : tokens - first;
      Rows<scalar_t> queries = keys;
      queries.data += first * row_stride;
      const Side<scalar_t> a{queries, rows, nullptr, rows_aligned(queries)}, b{keys, tokens, of_entry, rows_aligned(keys)};
      error = launch_row_pairs<false>(a, b, entries, TakeDistances{of_entry, rows, tokens, strip}, stream);
      if (error != cudaSuccess) return error;
      const auto depth = static_cast<unsigned>(entries < 65535 ? entries : 65535);
      const Launch shape{dim3(static_cast<unsigned>(rows), depth), dim3(kDensityThreads), 0, 1, false, stream};
      error = launch(density_kernel, shape, strip, of_entry, entries, first, rows, tokens, k, static_cast<int>(channels),
                     density + entry * tokens);
    }
  }
  return error;
}

}  // namespace sts
