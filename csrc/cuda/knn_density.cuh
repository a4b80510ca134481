// Density of each token by its k nearest neighbours.
//
// What: exp(-mean / channels), of the mean of a token's k smallest squared distances, its own 0 among them.
// Chosen when: always.
// Steps: (1) RowInfo: which tokens are valid; for wgmma also token stats. Then, for as many rows as `strip` holds: (2) distances of the
//   rows to all tokens of their item, by wgmma (sqdist_strip.cuh: 16-bit rows on Hopper, whole items), else by differences
//   (row_pairs.cuh);
//   (3) density, a block per row: radix select of the k-th smallest distance, 8 bits a pass, and the sum up to it.
// Synchronisation: launches. In (3) block barriers; the atomics of the histogram add integers, and floats are summed in a fixed order.
#pragma once
#include "row_pairs.cuh"
#include "sqdist_strip.cuh"

namespace sts {

// Epilogue of row_pairs.cuh that stores squared distances to the strip; NaN for a token that is not valid.
struct DistanceEpilogue {
  const RowInfo* keys;
  int64_t rows, count;
  float* strip;  // (entries, rows, count)

  template <int kTile>
  __device__ __forceinline__ void row(int64_t entry, int64_t i, int64_t j, const float (&value)[4]) const {
    if (i >= rows) return;
#pragma unroll
    for (int t = 0; t < 4; ++t)
      if (j + t < count) strip[(entry * rows + i) * count + j + t] = keys[entry * count + j + t].valid() ? value[t] : kNaN;
  }
};

constexpr int kDensityThreads = 256;

// Distances are not negative, so their bits compare as unsigned like the values, and every NaN is above infinity.
constexpr uint32_t kInfinityBits = 0x7f800000u;

// Sum over the block in a fixed order, given to every thread. partial: a slot per warp.
__device__ __forceinline__ double block_sum(double value, double* partial) {
  value = warp_sum(value);
  __syncthreads();  // all threads have read `partial` in the previous call
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = value;
  __syncthreads();
  double sum = 0;
  for (int warp = 0; warp < kDensityThreads / 32; ++warp) sum += partial[warp];
  return sum;
}

// (3) A block per row of the strip, looping over the entries. Row i is token first + i. strip: (entries, rows, count). num_tokens:
// (entries); null: count. Distances past the tokens of an item are not read. density: (entries, count).
static __global__ void __launch_bounds__(kDensityThreads)
    density_kernel(const float* strip, const RowInfo* info, const int64_t* num_tokens, int64_t entries, int64_t first, int64_t rows,
                   int64_t count, int64_t k, int channels, float* density) {
  __shared__ unsigned bins[256];
  __shared__ unsigned selected[2];  // [0]: the bin of the k-th smallest; [1]: number of values in lower bins
  __shared__ double partial[kDensityThreads / 32];
  const int tid = threadIdx.x, lane = tid % 32;
  const int64_t i = blockIdx.x;
  for (int64_t entry = blockIdx.y; entry < entries; entry += gridDim.y) {
    float* out = density + entry * count + first + i;
    if (!info[entry * count + first + i].valid()) {
      if (tid == 0) *out = 0.f;
      continue;
    }
    const uint32_t* values = reinterpret_cast<const uint32_t*>(strip) + (entry * rows + i) * count;
    const int64_t tokens = num_tokens ? num_tokens[entry] : count;  // in range: this row is valid
    int thread_valid = 0;
    for (int64_t j = tid; j < tokens; j += kDensityThreads) thread_valid += values[j] <= kInfinityBits;
    const auto num_valid = static_cast<int64_t>(block_sum(thread_valid, partial));
    const int64_t kept = k < num_valid ? k : num_valid;
    // Radix select. Invariant: the kept-th smallest value has the bits `prefix` under the mask `known`, and it is the rank-th smallest,
    // counted from 1, of the values that do.
    uint32_t prefix = 0, known = 0;
    auto rank = static_cast<unsigned>(kept);
    for (int shift = 24; shift >= 0; shift -= 8) {
      bins[tid] = 0;
      __syncthreads();  // the bins are zero, and all threads have read `selected`
      for (int64_t j = tid; j < tokens; j += kDensityThreads)
        if (values[j] <= kInfinityBits && (values[j] & known) == prefix) atomicAdd(bins + (values[j] >> shift & 255u), 1u);
      __syncthreads();
      if (tid < 32) {  // prefix sum over the bins, 8 per lane; the lane whose bins contain the rank reports
        unsigned lane_count = 0;
        for (int bin = 0; bin < 8; ++bin) lane_count += bins[lane * 8 + bin];
        unsigned below = lane_count;
#pragma unroll
        for (int offset = 1; offset < 32; offset *= 2) {
          const unsigned lower_lane = __shfl_up_sync(kFullWarp, below, offset);
          if (lane >= offset) below += lower_lane;
        }
        below -= lane_count;
        if (below < rank && rank <= below + lane_count) {
          int bin = lane * 8;
          while (below + bins[bin] < rank) below += bins[bin++];
          selected[0] = bin, selected[1] = below;
        }
      }
      __syncthreads();
      prefix |= selected[0] << shift;
      known |= 255u << shift;
      rank -= selected[1];
    }
    double sum = 0;
    for (int64_t j = tid; j < tokens; j += kDensityThreads)
      if (values[j] < prefix) sum += __uint_as_float(values[j]);
    sum = block_sum(sum, partial) + static_cast<double>(rank) * __uint_as_float(prefix);  // ties
    if (tid == 0) *out = expf(-static_cast<float>(sum / static_cast<double>(kept) / channels));
  }
}

// ---- plan and launch ----

struct KnnPlan {
  int64_t strip_rows;  // rows whose distances are stored at a time, over all batch entries; whole entries if at least `tokens`
  bool wgmma;          // distances of whole entries by sqdist_strip.cuh; else by differences
};

// The strip takes as many whole entries as fit in 256 MiB, else as many whole rows, at least one.
template <class scalar_t>
KnnPlan plan_knn(int64_t batch, int64_t tokens) {
  if (const int64_t entries = strip_entries(batch, tokens)) return {entries * tokens, strip_serves<scalar_t>()};
  const int64_t fit = kMaxStripFloats / tokens;
  return {fit > 0 ? fit : 1, false};
}

// Scratch in device memory. allocate(bytes) is called once per array in use; others are null.
struct KnnScratch {
  float* strip = nullptr;   // (plan.strip_rows, tokens)
  RowInfo* info = nullptr;  // (batch, tokens)
  TokenStats stats{};       // wgmma

  template <class Allocate>
  KnnScratch(const KnnPlan& plan, int64_t batch, int64_t tokens, int64_t channels, int64_t element_bytes, Allocate&& allocate) {
    take_array(strip, plan.strip_rows * tokens, allocate);
    take_array(info, batch * tokens, allocate);
    if (plan.wgmma) take_wgmma_stats(stats, padded_items(batch, tokens), channels, element_bytes, allocate);
  }
};

// num_tokens: (batch), may be null. density: (batch, tokens).
template <class scalar_t>
cudaError_t launch_knn(const Rows<scalar_t>& all, int64_t batch, int64_t tokens, int64_t k, const int64_t* num_tokens, const KnnPlan& plan,
                       const KnnScratch& scratch, float* density, cudaStream_t stream) {
  const Items items = padded_items(batch, tokens, num_tokens);
  cudaError_t error = launch_row_info(all, batch, tokens, num_tokens, false, scratch.info, stream);
  if (error == cudaSuccess && plan.wgmma) error = launch_token_stats(all, items, scratch.stats, stream);
  const int64_t max_entries = plan.strip_rows / tokens > 0 ? plan.strip_rows / tokens : 1;
  const int64_t max_rows = plan.strip_rows < tokens ? plan.strip_rows : tokens;
  for (int64_t entry = 0; entry < batch; entry += max_entries) {
    const int64_t entries = max_entries < batch - entry ? max_entries : batch - entry;
    const RowInfo* const entry_info = scratch.info + entry * tokens;
    Rows<scalar_t> keys = all;
    keys.data += entry * all.batch_stride;
    const Side<scalar_t> b{keys, tokens, entry_info, rows_aligned(keys)};
    for (int64_t first = 0; first < tokens && error == cudaSuccess; first += max_rows) {
      const int64_t rows = max_rows < tokens - first ? max_rows : tokens - first;
      Rows<scalar_t> queries = keys;
      queries.data += first * all.row_stride;
      const Side<scalar_t> a{queries, rows, nullptr, rows_aligned(queries)};
      error = plan.wgmma ? launch_sqdist_matrices<StripSqdist>(all, items, entry, entries, scratch.stats, scratch.strip, stream)
                         : launch_row_pairs<false>(a, b, entries, DistanceEpilogue{entry_info, rows, tokens, scratch.strip}, stream);
      if (error != cudaSuccess) return error;
      const Launch shape{dim3(static_cast<unsigned>(rows), grid_extent(entries)), dim3(kDensityThreads), 0, 1, false, stream};
      error = launch(density_kernel, shape, scratch.strip, entry_info, num_tokens ? num_tokens + entry : nullptr, entries, first, rows,
                     tokens, k, all.channels, density + entry * tokens);
    }
  }
  return error;
}

}  // namespace sts
