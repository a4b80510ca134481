// What a selection needs to know of each token before its distances to others: whether it is finite, how far it is from the mean
// of its item's finite tokens (the nearest is the default anchor), and its squared norm. Sums run over fixed chunks of tokens in
// fixed order.
#pragma once
#include "rows.cuh"

namespace sts {

constexpr int kStatsChunk = 32;      // tokens whose channels one block sums
constexpr int kStatsThreads = 256;

// Where the chunks of item b start in a buffer that holds those of all items; `items.count` gives the total.
STS_HOST_DEVICE int64_t first_chunk(const Items& items, int64_t b, int64_t first_token) {
  return items.packed() ? first_token / kStatsChunk + b : b * ceil_div(items.tokens, kStatsChunk);
}
STS_HOST_DEVICE int64_t all_tokens(const Items& items) { return items.packed() ? items.tokens : items.count * items.tokens; }
STS_HOST_DEVICE int64_t all_chunks(const Items& items) { return first_chunk(items, items.count, items.tokens); }

struct TokenStats {
  float* mean_sqdist;  // (all tokens): distance to the mean, or 0 where items have anchors; infinite for a token that is not finite
  float* norms;        // (all tokens): squared norms, or null
  // Scratch, null where items have anchors.
  float* sums;    // (all chunks, channels)
  float* counts;  // (all chunks): finite tokens
  float* mean;    // (items, channels)
};

template <class scalar_t>
__global__ void __launch_bounds__(kStatsThreads)
    sum_chunks_kernel(Rows<scalar_t> rows, Items items, bool aligned, TokenStats stats) {
  __shared__ bool finite[kStatsChunk];
  constexpr int kVec = Chunk<scalar_t>::size;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  for (int64_t b = blockIdx.y; b < items.count; b += gridDim.y) {
    const Item item = items[b];
    const int64_t entry = items.packed() ? 0 : b;
    const int64_t begin = static_cast<int64_t>(blockIdx.x) * kStatsChunk;
    if (begin >= item.tokens) continue;
    const int count = static_cast<int>(item.tokens - begin < kStatsChunk ? item.tokens - begin : kStatsChunk);
    const int64_t first = item.first + begin;
    for (int t = warp; t < count; t += kStatsThreads / 32) {
      const scalar_t* row = rows.row(entry, first + t);
      bool good = true;
      float norm = 0.f;
      for (int c = lane * kVec; c < rows.channels; c += 32 * kVec) {
        const Chunk<scalar_t> x = load_channels(row, c, rows.channels, aligned);
#pragma unroll
        for (int i = 0; i < kVec; ++i) {
          good = good && x[i] - x[i] == 0.f;
          norm = fmaf(x[i], x[i], norm);
        }
      }
      good = __all_sync(kFullWarp, good);
      norm = warp_sum(norm);
      if (lane == 0) {
        const int64_t token = entry * items.tokens + first + t;
        finite[t] = good;
        stats.mean_sqdist[token] = good ? 0.f : kInfinity;
        if (stats.norms) stats.norms[token] = norm;
      }
    }
    __syncthreads();
    if (stats.sums) {
      const int64_t chunk = first_chunk(items, b, item.first) + blockIdx.x;
      for (int c = threadIdx.x * kVec; c < rows.channels; c += kStatsThreads * kVec) {
        float sum[kVec] = {};
        for (int t = 0; t < count; ++t) {
          if (!finite[t]) continue;
          const Chunk<scalar_t> x = load_channels(rows.row(entry, first + t), c, rows.channels, aligned);
#pragma unroll
          for (int i = 0; i < kVec; ++i) sum[i] += x[i];
        }
#pragma unroll
        for (int i = 0; i < kVec; ++i)
          if (c + i < rows.channels) stats.sums[chunk * rows.channels + c + i] = sum[i];
      }
      if (threadIdx.x == 0) {
        int good = 0;
        for (int t = 0; t < count; ++t) good += finite[t];
        stats.counts[chunk] = static_cast<float>(good);
      }
    }
    __syncthreads();
  }
}

static __global__ void __launch_bounds__(kStatsThreads) mean_kernel(Items items, int channels, TokenStats stats) {
  for (int64_t b = blockIdx.y; b < items.count; b += gridDim.y) {
    const Item item = items[b];
    const int c = blockIdx.x * kStatsThreads + threadIdx.x;
    if (c >= channels) continue;
    const int64_t begin = first_chunk(items, b, item.first), chunks = ceil_div(item.tokens, kStatsChunk);
    float sum = 0.f, count = 0.f;
    for (int64_t chunk = begin; chunk < begin + chunks; ++chunk) {
      sum += stats.sums[chunk * channels + c];
      count += stats.counts[chunk];
    }
    stats.mean[b * channels + c] = count > 0.f ? sum / count : 0.f;
  }
}

template <class scalar_t>
__global__ void __launch_bounds__(kStatsThreads) mean_sqdist_kernel(Rows<scalar_t> rows, Items items, bool aligned, TokenStats stats) {
  constexpr int kVec = Chunk<scalar_t>::size, kWarps = kStatsThreads / 32;
  const int lane = threadIdx.x % 32;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  for (int64_t b = blockIdx.y; b < items.count; b += gridDim.y) {
    const Item item = items[b];
    if (i >= item.tokens) continue;
    const int64_t entry = items.packed() ? 0 : b;
    float* result = stats.mean_sqdist + entry * items.tokens + item.first + i;
    if (*result != 0.f) continue;  // not finite
    const scalar_t* row = rows.row(entry, item.first + i);
    const float* mean = stats.mean + b * rows.channels;
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
    __syncwarp();  // every lane has read *result before one writes it
    // Beyond float32's range (or a mean that is): after all others, yet before the tokens that are not finite.
    if (lane == 0) *result = sum < kLastResort ? sum : kLastResort;
  }
}

template <class scalar_t>
cudaError_t launch_token_stats(const Rows<scalar_t>& rows, const Items& items, const TokenStats& stats, cudaStream_t stream) {
  const bool aligned = rows_aligned(rows);
  const auto depth = static_cast<unsigned>(items.count < 65535 ? items.count : 65535);
  const auto shape = [&](int64_t blocks) { return Launch{dim3(static_cast<unsigned>(blocks), depth), dim3(kStatsThreads), 0, 1, false, stream}; };
  cudaError_t error = launch(sum_chunks_kernel<scalar_t>, shape(ceil_div(items.tokens, kStatsChunk)), rows, items, aligned, stats);
  if (error != cudaSuccess || !stats.sums) return error;
  error = launch(mean_kernel, shape(ceil_div(rows.channels, kStatsThreads)), items, rows.channels, stats);
  if (error != cudaSuccess) return error;
  return launch(mean_sqdist_kernel<scalar_t>, shape(ceil_div(items.tokens, kStatsThreads / 32)), rows, items, aligned, stats);
}

// The first pick: the anchor, else the finite token nearest the mean, else the first token.
__device__ __forceinline__ int64_t first_pick(const Item& item, Key nearest) {
  if (item.anchor >= 0) return item.anchor;
  return key_value(nearest) < kInfinity ? key_index(nearest) : 0;
}

}  // namespace sts
