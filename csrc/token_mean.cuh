// How far each token is from the mean of its item's finite tokens, which names the default anchor; infinite for a token with
// a NaN or infinity, which is how the selection kernels know it. Sums run over fixed chunks of tokens in fixed order.
#pragma once
#include "rows.cuh"

namespace sts {

constexpr int kMeanChunk = 32;      // tokens whose channels one block sums
constexpr int kMeanThreads = 256;

// Where the chunks of item b start in a buffer that holds those of all items; `items.count` gives the total.
STS_HOST_DEVICE int64_t first_chunk(const Items& items, int64_t b, int64_t first_token) {
  return items.packed() ? first_token / kMeanChunk + b : b * ceil_div(items.tokens, kMeanChunk);
}
STS_HOST_DEVICE int64_t all_tokens(const Items& items) { return items.packed() ? items.tokens : items.count * items.tokens; }
STS_HOST_DEVICE int64_t all_chunks(const Items& items) { return first_chunk(items, items.count, items.tokens); }

// Per-token and per-item scratch. `sums` and `counts` (per chunk) and `mean` are null where every item has an anchor.
struct MeanScratch {
  float* sqdist;  // (all tokens): the result
  float* sums;    // (all chunks, channels)
  float* counts;  // (all chunks): finite tokens
  float* mean;    // (items, channels)
};

template <class scalar_t>
__global__ void __launch_bounds__(kMeanThreads)
    sum_chunks_kernel(Rows<scalar_t> rows, Items items, bool aligned, MeanScratch scratch) {
  __shared__ bool finite[kMeanChunk];
  constexpr int kVec = Chunk<scalar_t>::size;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  for (int64_t b = blockIdx.y; b < items.count; b += gridDim.y) {
    const Item item = items[b];
    const int64_t entry = items.packed() ? 0 : b;
    const int64_t begin = static_cast<int64_t>(blockIdx.x) * kMeanChunk;
    if (begin >= item.tokens) continue;
    const int count = static_cast<int>(item.tokens - begin < kMeanChunk ? item.tokens - begin : kMeanChunk);
    const int64_t first = item.first + begin;
    for (int t = warp; t < count; t += kMeanThreads / 32) {
      const scalar_t* row = rows.row(entry, first + t);
      bool good = true;
      for (int c = lane * kVec; c < rows.channels; c += 32 * kVec) {
        const Chunk<scalar_t> x = load_channels(row, c, rows.channels, aligned);
#pragma unroll
        for (int i = 0; i < kVec; ++i) good = good && x[i] - x[i] == 0.f;
      }
      good = __all_sync(kFullWarp, good);
      if (lane == 0) {
        finite[t] = good;
        scratch.sqdist[entry * items.tokens + first + t] = good ? 0.f : kInfinity;
      }
    }
    __syncthreads();
    if (scratch.sums) {
      const int64_t chunk = first_chunk(items, b, item.first) + blockIdx.x;
      for (int c = threadIdx.x * kVec; c < rows.channels; c += kMeanThreads * kVec) {
        float sum[kVec] = {};
        for (int t = 0; t < count; ++t) {
          if (!finite[t]) continue;
          const Chunk<scalar_t> x = load_channels(rows.row(entry, first + t), c, rows.channels, aligned);
#pragma unroll
          for (int i = 0; i < kVec; ++i) sum[i] += x[i];
        }
#pragma unroll
        for (int i = 0; i < kVec; ++i)
          if (c + i < rows.channels) scratch.sums[chunk * rows.channels + c + i] = sum[i];
      }
      if (threadIdx.x == 0) {
        int good = 0;
        for (int t = 0; t < count; ++t) good += finite[t];
        scratch.counts[chunk] = static_cast<float>(good);
      }
    }
    __syncthreads();
  }
}

static __global__ void __launch_bounds__(kMeanThreads) mean_kernel(Items items, int channels, MeanScratch scratch) {
  for (int64_t b = blockIdx.y; b < items.count; b += gridDim.y) {
    const Item item = items[b];
    const int c = blockIdx.x * kMeanThreads + threadIdx.x;
    if (c >= channels) continue;
    const int64_t begin = first_chunk(items, b, item.first), chunks = ceil_div(item.tokens, kMeanChunk);
    float sum = 0.f, count = 0.f;
    for (int64_t chunk = begin; chunk < begin + chunks; ++chunk) {
      sum += scratch.sums[chunk * channels + c];
      count += scratch.counts[chunk];
    }
    scratch.mean[b * channels + c] = count > 0.f ? sum / count : 0.f;
  }
}

template <class scalar_t>
__global__ void __launch_bounds__(kMeanThreads) mean_sqdist_kernel(Rows<scalar_t> rows, Items items, bool aligned, MeanScratch scratch) {
  constexpr int kVec = Chunk<scalar_t>::size, kWarps = kMeanThreads / 32;
  const int lane = threadIdx.x % 32;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  for (int64_t b = blockIdx.y; b < items.count; b += gridDim.y) {
    const Item item = items[b];
    if (i >= item.tokens) continue;
    const int64_t entry = items.packed() ? 0 : b;
    float* result = scratch.sqdist + entry * items.tokens + item.first + i;
    if (*result != 0.f) continue;  // not finite
    const scalar_t* row = rows.row(entry, item.first + i);
    const float* mean = scratch.mean + b * rows.channels;
    float sum = 0.f;
    for (int c = lane * kVec; c < rows.channels; c += 32 * kVec) {
      const Chunk<scalar_t> x = load_channels(row, c, rows.channels, aligned);
#pragma unroll
      for (int v = 0; v < kVec; ++v) {
        if (c + v >= rows.channels) continue;
        const float difference = x[v] - mean[c + v];
        sum = fmaf(difference, difference, sum);
      }
    }
    sum = warp_sum(sum);
    // Beyond float32's range (or a mean that is): after all others, yet before the tokens that are not finite.
    if (lane == 0) *result = sum < kLastResort ? sum : kLastResort;
  }
}

// Fills scratch.sqdist: zeros for finite tokens where items have anchors (scratch.sums is null), else distances to the mean.
template <class scalar_t>
cudaError_t launch_token_mean(const Rows<scalar_t>& rows, const Items& items, const MeanScratch& scratch, cudaStream_t stream) {
  const bool aligned = rows_aligned(rows);
  const auto depth = static_cast<unsigned>(items.count < 65535 ? items.count : 65535);
  const auto shape = [&](int64_t blocks) { return Launch{dim3(static_cast<unsigned>(blocks), depth), dim3(kMeanThreads), 0, 1, false, stream}; };
  cudaError_t error = launch(sum_chunks_kernel<scalar_t>, shape(ceil_div(items.tokens, kMeanChunk)), rows, items, aligned, scratch);
  if (error != cudaSuccess || !scratch.sums) return error;
  error = launch(mean_kernel, shape(ceil_div(rows.channels, kMeanThreads)), items, rows.channels, scratch);
  if (error != cudaSuccess) return error;
  return launch(mean_sqdist_kernel<scalar_t>, shape(ceil_div(items.tokens, kMeanThreads / 32)), rows, items, aligned, scratch);
}

}  // namespace sts
