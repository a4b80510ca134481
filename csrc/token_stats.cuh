// What a selection needs to know of its tokens before their distances: whether each is finite, how far it is from the mean of its
// item's finite tokens (the nearest is the default anchor), and for tensor cores the item's centre and each token's squared norm
// from there. Sums run over fixed chunks of tokens in fixed order.
#pragma once
#include "packed_plan.cuh"
#include "rule.cuh"

namespace sts {

constexpr int kStatsChunk = 32;      // tokens whose channels one block sums
constexpr int kStatsThreads = 256;

// The item of this block's turn, and which chunk of `size` of its tokens. Padded: x of the grid is the chunk, y the item, in turns. Packed:
// a chunk a block, whosever it is (packed_task).
struct StatsTurn {
  const Items& items;
  PackedTask task;
  __device__ __forceinline__ StatsTurn(const Items& items, int size)
      : items(items), task(items.packed() ? packed_task(items, size, blockIdx.x) : PackedTask{blockIdx.y, blockIdx.x}) {}
  __device__ __forceinline__ bool more() const { return task.item < items.count; }
  __device__ __forceinline__ void next() { task.item += items.packed() ? items.count : gridDim.y; }
};

// Where the chunks of item b start in a buffer that holds those of all items; `items.count` gives the total.
STS_HOST_DEVICE int64_t first_chunk(const Items& items, int64_t b, int64_t first_token) {
  return items.packed() ? first_token / kStatsChunk + b : b * ceil_div(items.tokens, kStatsChunk);
}
STS_HOST_DEVICE int64_t all_tokens(const Items& items) { return items.packed() ? items.tokens : items.count * items.tokens; }
STS_HOST_DEVICE int64_t all_chunks(const Items& items) { return first_chunk(items, items.count, items.tokens); }

struct TokenStats {
  float* mean_sqdist;  // (all tokens): distance to the mean, or 0 where items have anchors; infinite for a token that is not finite
  float* norms;        // (all tokens): squared distance to the centre, or null
  uint16_t* centre;    // (items, channels): elements of the features' type, 16-byte aligned; or null
  // Scratch. Null where items have anchors:
  float* sums;    // (all chunks, channels)
  float* counts;  // (all chunks): finite tokens
  float* mean;    // (items, channels)
  // Null where there is no centre:
  float *lows, *highs;  // (all chunks, channels): of the finite tokens
};

// A value whose difference to every element in [low, high] is an element itself, so that nothing is rounded: it is at least half
// and at most twice of each of them. Zero where there is none, and the values are not all much alike.
template <class scalar_t>
__host__ __device__ __forceinline__ scalar_t exact_centre(float low, float high) {
  scalar_t centre;
  const bool negative = high < 0.f;
  const float least = negative ? -high : low, most = negative ? -low : high;  // in magnitude
  float value = least * 2.f < (least + most) / 2.f ? least * 2.f : (least + most) / 2.f;
  from_float(value, centre);
  value = to_float(centre);
  const bool exact = least > 0.f && value >= most / 2.f && value <= least * 2.f;
  from_float(!exact ? 0.f : negative ? -value : value, centre);
  return centre;
}

// kWhole: every row is whole chunks that can be read 16 bytes at a time.
template <class scalar_t, bool kWhole>
__global__ void __launch_bounds__(kStatsThreads, 1)
    sum_chunks_kernel(Rows<scalar_t> rows, Items items, bool aligned, TokenStats stats) {
  __shared__ bool finite[kStatsChunk];
  constexpr int kVec = Chunk<scalar_t>::size;
  constexpr int kUnroll = 8, kRows = 8;  // loads under way together: of a row, of a column
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  for (StatsTurn turn(items, kStatsChunk); turn.more(); turn.next()) {
    const int64_t b = turn.task.item;
    const Item item = items[b];
    const int64_t entry = items.packed() ? 0 : b;
    const int64_t begin = turn.task.part * kStatsChunk;
    if (begin >= item.tokens) continue;
    const int count = static_cast<int>(item.tokens - begin < kStatsChunk ? item.tokens - begin : kStatsChunk);
    const int64_t first = item.first + begin;
    for (int t = warp; t < count; t += kStatsThreads / 32) {
      const scalar_t* row = rows.row(entry, first + t);
      float zero = 0.f;  // NaN once a channel is not finite: no branch an element
      for (int first_c = lane * kVec; first_c < rows.channels; first_c += kUnroll * 32 * kVec) {
        Chunk<scalar_t> x[kUnroll];
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) x[u] = load_chunk<kWhole>(row, first_c + u * 32 * kVec, rows.channels, aligned);
#pragma unroll
        for (int u = 0; u < kUnroll; ++u)
#pragma unroll
          for (int i = 0; i < kVec; ++i) zero += x[u][i] - x[u][i];
      }
      const bool good = __all_sync(kFullWarp, zero == 0.f);
      if (lane == 0) {
        finite[t] = good;
        stats.mean_sqdist[entry * items.tokens + first + t] = good ? 0.f : kInfinity;
      }
    }
    __syncthreads();
    static_assert(kStatsChunk == 32, "a bit of a word for each token");
    const unsigned usable = __ballot_sync(kFullWarp, lane < count && finite[lane]);
    const int64_t chunk = first_chunk(items, b, item.first) + turn.task.part;
    if (stats.sums || stats.lows) {
      for (int c = threadIdx.x * kVec; c < rows.channels; c += kStatsThreads * kVec) {
        float sum[kVec] = {}, low[kVec], high[kVec];
#pragma unroll
        for (int i = 0; i < kVec; ++i) low[i] = kInfinity, high[i] = -kInfinity;
        const scalar_t* row = rows.row(entry, first);
        for (int t = 0; t < count; t += kRows) {
          Chunk<scalar_t> x[kRows];
#pragma unroll
          for (int u = 0; u < kRows; ++u) {
            x[u] = load_chunk<kWhole>(row, c, rows.channels, aligned);
            if (t + u + 1 < count) row += rows.row_stride;
          }
#pragma unroll
          for (int u = 0; u < kRows; ++u) {
            const bool used = usable >> (t + u) & 1;  // no branch: the loads would be moved behind it
#pragma unroll
            for (int i = 0; i < kVec; ++i) {
              sum[i] += used ? x[u][i] : 0.f;
              low[i] = fminf(low[i], used ? x[u][i] : kInfinity);
              high[i] = fmaxf(high[i], used ? x[u][i] : -kInfinity);
            }
          }
        }
#pragma unroll
        for (int i = 0; i < kVec; ++i) {
          if (c + i >= rows.channels) continue;
          const int64_t at = chunk * rows.channels + c + i;
          if (stats.sums) stats.sums[at] = sum[i];
          if (stats.lows) stats.lows[at] = low[i], stats.highs[at] = high[i];
        }
      }
      if (stats.sums && threadIdx.x == 0) stats.counts[chunk] = static_cast<float>(__popc(usable));
    }
    __syncthreads();
  }
}

// The mean and the centre of each item.
template <class scalar_t>
__global__ void __launch_bounds__(kStatsThreads) mean_kernel(Items items, int channels, TokenStats stats) {
  await_predecessor();
  for (int64_t b = blockIdx.y; b < items.count; b += gridDim.y) {
    const Item item = items[b];
    const int c = blockIdx.x * kStatsThreads + threadIdx.x;
    if (c >= channels) continue;
    const int64_t begin = first_chunk(items, b, item.first), chunks = ceil_div(item.tokens, kStatsChunk);
    float sum = 0.f, count = 0.f, low = kInfinity, high = -kInfinity;
    constexpr int kUnroll = 8;  // chunks whose loads are under way together
    for (int64_t chunk = begin; chunk < begin + chunks; chunk += kUnroll) {
      float sums[kUnroll], counts[kUnroll], lows[kUnroll], highs[kUnroll];
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        const bool inside = chunk + u < begin + chunks;
        const int64_t at = (chunk + u) * channels + c;
        sums[u] = inside && stats.sums ? stats.sums[at] : 0.f;
        counts[u] = inside && stats.sums ? stats.counts[chunk + u] : 0.f;
        lows[u] = inside && stats.lows ? stats.lows[at] : kInfinity;
        highs[u] = inside && stats.lows ? stats.highs[at] : -kInfinity;
      }
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        sum += sums[u];
        count += counts[u];
        low = fminf(low, lows[u]);
        high = fmaxf(high, highs[u]);
      }
    }
    if (stats.mean) stats.mean[b * channels + c] = count > 0.f ? sum / count : 0.f;
    if constexpr (sizeof(scalar_t) == 2) {
      if (!stats.centre) continue;
      const scalar_t centre = exact_centre<scalar_t>(low, high);
      memcpy(stats.centre + b * channels + c, &centre, 2);
    }
  }
}

// How far each token is from the mean and from the centre of its item.
template <class scalar_t, bool kWhole>
__global__ void __launch_bounds__(kStatsThreads) mean_sqdist_kernel(Rows<scalar_t> rows, Items items, bool aligned, TokenStats stats) {
  await_predecessor();
  constexpr int kVec = Chunk<scalar_t>::size, kWarps = kStatsThreads / 32;
  constexpr int kUnroll = 4, kParts = kVec / Chunk<float>::size;  // loads under way together; chunks of the mean for one of the row
  const int lane = threadIdx.x % 32;
  for (StatsTurn turn(items, kWarps); turn.more(); turn.next()) {
    const int64_t b = turn.task.item, i = turn.task.part * kWarps + threadIdx.x / 32;
    const Item item = items[b];
    if (i >= item.tokens) continue;
    const int64_t entry = items.packed() ? 0 : b;
    const int64_t token = entry * items.tokens + item.first + i;
    if (stats.mean_sqdist[token] != 0.f) {  // not finite
      if (stats.norms && lane == 0) stats.norms[token] = kInfinity;
      continue;
    }
    const scalar_t* row = rows.row(entry, item.first + i);
    const float* mean = stats.mean ? stats.mean + b * rows.channels : nullptr;
    const scalar_t* centre = stats.centre ? reinterpret_cast<const scalar_t*>(stats.centre + b * rows.channels) : nullptr;
    float sum = 0.f, norm = 0.f;
    for (int first_c = lane * kVec; first_c < rows.channels; first_c += kUnroll * 32 * kVec) {
      Chunk<scalar_t> x[kUnroll], common[kUnroll]{};
      Chunk<float> around[kUnroll][kParts]{};
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        const int c = first_c + u * 32 * kVec;
        x[u] = load_chunk<kWhole>(row, c, rows.channels, aligned);
        if (centre) common[u] = load_chunk<kWhole>(centre, c, rows.channels, true);
        if (!mean) continue;
#pragma unroll
        for (int p = 0; p < kParts; ++p) around[u][p] = load_chunk<kWhole>(mean, c + p * 4, rows.channels, rows.channels % 4 == 0);
      }
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
#pragma unroll
        for (int v = 0; v < kVec; ++v) {
          if (first_c + u * 32 * kVec + v >= rows.channels) continue;
          const float from_mean = mean ? x[u][v] - around[u][v / 4][v % 4] : 0.f, from_centre = x[u][v] - common[u][v];
          sum = fmaf(from_mean, from_mean, sum);
          norm = fmaf(from_centre, from_centre, norm);
        }
      }
    }
    sum = warp_sum(sum);
    norm = warp_sum(norm);
    __syncwarp();  // every lane has read the distance before one writes it
    if (lane != 0) continue;
    // Beyond float32's range (or a mean that is): after all others, yet before the tokens that are not finite.
    stats.mean_sqdist[token] = sum < kLastResort ? sum : kLastResort;
    if (stats.norms) stats.norms[token] = norm;
  }
}

template <class scalar_t>
cudaError_t launch_token_stats(const Rows<scalar_t>& rows, const Items& items, const TokenStats& stats, cudaStream_t stream) {
  const bool aligned = rows_aligned(rows);
  const auto depth = static_cast<unsigned>(items.count < 65535 ? items.count : 65535);
  const auto shape = [&](int64_t blocks, bool overlap) {
    return Launch{dim3(static_cast<unsigned>(blocks), depth), dim3(kStatsThreads), 0, 1, false, stream, overlap};
  };
  const auto chunks = [&](int size, bool overlap) {
    if (!items.packed()) return shape(ceil_div(items.tokens, size), overlap);
    return Launch{dim3(static_cast<unsigned>(packed_tasks(items, size))), dim3(kStatsThreads), 0, 1, false, stream, overlap};
  };
  const bool whole = aligned && rows.channels % Chunk<scalar_t>::size == 0;
  cudaError_t error = launch(whole ? sum_chunks_kernel<scalar_t, true> : sum_chunks_kernel<scalar_t, false>,
                             chunks(kStatsChunk, false), rows, items, aligned, stats);
  if (error != cudaSuccess || !(stats.sums || stats.norms)) return error;
  error = launch(mean_kernel<scalar_t>, shape(ceil_div(rows.channels, kStatsThreads), true), items, rows.channels, stats);
  if (error != cudaSuccess) return error;
  return launch(whole ? mean_sqdist_kernel<scalar_t, true> : mean_sqdist_kernel<scalar_t, false>,
                chunks(kStatsThreads / 32, true), rows, items, aligned, stats);
}

#ifdef STS_KERNEL_TABLE
template <class scalar_t>
int64_t exact_centre_bits(float low, float high) {
  const scalar_t centre = exact_centre<scalar_t>(low, high);
  uint16_t bits;
  memcpy(&bits, &centre, 2);
  return bits;
}
#endif

STS_KERNEL(exact_centre_float16, exact_centre_bits<__half>);
STS_KERNEL(exact_centre_bfloat16, exact_centre_bits<__nv_bfloat16>);

// The first pick: the anchor, else the finite token nearest the mean, else the first token.
__device__ __forceinline__ int64_t first_pick(const Item& item, Key nearest) {
  if (item.anchor >= 0) return item.anchor;
  return key_value(nearest) < kInfinity ? key_index(nearest) : 0;
}

}  // namespace sts
