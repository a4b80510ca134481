// Statistics of tokens and channels that a selection needs before the distances.
//
// What: for each token, whether it is finite (no NaN or infinity), and its squared distance to the mean of its item's finite tokens. The
//   nearest token is the default anchor. For tensor cores also: a centre per item, each token's squared norm after subtraction of the
//   centre, and a copy of the centred rows. Sums run over fixed token blocks in fixed order: an item's bits do not depend on its batch.
// Chosen when: always. Arrays that are null are skipped.
// Steps: (1) sum_token_blocks, a thread block per token block: finite flags, then sum, low and high of each channel; (2) mean, a thread
//   block per 32 channels: reduces the token blocks to mean and centre; (3) mean_sqdist, a warp per token: squared distances to mean and
//   centre, and the token's row of the centred copy.
// Synchronisation: three launches. Block barriers around the finite flags, and around the partial results of the warps.
#pragma once
#include "packed_plan.cuh"
#include "rule.cuh"

namespace sts {

constexpr int kTokenBlock = 16;  // tokens per token block, whose channels one thread block sums
constexpr int kStatsThreads = 256;

// The (item, part) tasks of a thread block, where a part is `size` tokens of an item. Padded: blockIdx.x is the part, and blockIdx.y
// strides over the items. Packed: one task per thread block; packed_task finds its item.
struct StatsLoop {
  const Items& items;
  PackedTask task;
  __device__ __forceinline__ StatsLoop(const Items& items, int size)
      : items(items), task(items.packed() ? packed_task(items, size, blockIdx.x) : PackedTask{blockIdx.y, blockIdx.x}) {}
  __device__ __forceinline__ bool more() const { return task.item < items.count; }
  __device__ __forceinline__ void next() { task.item += items.packed() ? items.count : gridDim.y; }
};

// Index of the first token block of item b among those of all items; b = items.count gives the total. Packed: a bound from the item's first
// token alone, so an index between two items may be unused.
STS_HOST_DEVICE int64_t first_token_block(const Items& items, int64_t b, int64_t first_token) {
  return items.packed() ? first_token / kTokenBlock + b : b * ceil_div(items.tokens, kTokenBlock);
}
STS_HOST_DEVICE int64_t all_tokens(const Items& items) { return items.packed() ? items.tokens : items.count * items.tokens; }
STS_HOST_DEVICE int64_t all_token_blocks(const Items& items) { return first_token_block(items, items.count, items.tokens); }

// Row pitch of the centred copy in 16-bit elements: rows are 16-byte aligned.
STS_HOST_DEVICE int64_t centred_pitch(int64_t channels) { return ceil_div(channels, 8) * 8; }

struct TokenStats {
  float* mean_sqdist;  // (all tokens): squared distance to the mean, 0 without `mean`; infinity for a token that is not finite
  float* norms;        // (all tokens): squared norm of the centred row, NaN for a token that is not finite; or null
  void* centre;        // (items, channels) of scalar_t, 16-byte aligned; or null
  // Centred rows of the finite tokens, or null. The subtraction is exact.
  //   16-bit features: (all tokens, centred_pitch(channels)) of scalar_t; padding channels are zero.
  //   float32: (all tokens, 2, centred_pitch(channels)) of bfloat16. Part 0 is the value rounded to bfloat16, part 1 the rounded remainder.
  void* centred;
  // Scratch. Null where no distance to the mean is needed:
  float* sums;    // (all token blocks, channels): over finite tokens
  float* counts;  // (all token blocks): number of finite tokens
  float* mean;    // (items, channels)
  // Null where there is no centre:
  void *lows, *highs;  // (all token blocks, channels) of scalar_t: min and max over finite tokens, +inf and -inf without any
};

// Lays out the arrays that are needed, one allocate(bytes) each. from_mean: the distances to the mean are needed. centre: tensor cores run.
// centred: they read the centred copy.
template <class Allocate>
void take_token_stats(TokenStats& stats, const Items& items, int64_t channels, int64_t element_bytes, bool from_mean, bool centre,
                      bool centred, Allocate&& allocate) {
  const int64_t token_blocks = all_token_blocks(items);
  take_array(stats.mean_sqdist, all_tokens(items), allocate);
  take_array(stats.norms, centre ? all_tokens(items) : 0, allocate);
  if (centre) stats.centre = allocate(items.count * channels * element_bytes);
  if (centred) stats.centred = allocate(all_tokens(items) * centred_pitch(channels) * element_bytes);
  take_array(stats.sums, from_mean ? token_blocks * channels : 0, allocate);
  take_array(stats.counts, from_mean ? token_blocks : 0, allocate);
  take_array(stats.mean, from_mean ? items.count * channels : 0, allocate);
  if (centre) stats.lows = allocate(token_blocks * channels * element_bytes);
  if (centre) stats.highs = allocate(token_blocks * channels * element_bytes);
}

// A centre c for which x - c is exact for every element x in [low, high], by Sterbenz's lemma: x / 2 <= c <= 2 x in magnitude. Returns 0 if
// there is none: [low, high] contains 0, or its ends differ by more than a factor of 4. Such a channel has no large common offset.
template <class scalar_t>
__host__ __device__ __forceinline__ scalar_t exact_centre(float low, float high) {
  scalar_t centre;
  const bool negative = high < 0.f;
  const float min_abs = negative ? -high : low, max_abs = negative ? -low : high;  // |x| of the range
  float value = min_abs * 2.f < (min_abs + max_abs) / 2.f ? min_abs * 2.f : (min_abs + max_abs) / 2.f;
  from_float(value, centre);
  value = to_float(centre);
  const bool exact = min_abs > 0.f && value >= max_abs / 2.f && value <= min_abs * 2.f;
  from_float(!exact ? 0.f : negative ? -value : value, centre);
  return centre;
}

// (1) Finite flags, then sum, low and high of each channel, over one token block. kWhole: as in load_vec.
template <class scalar_t, bool kWhole>
__global__ void __launch_bounds__(kStatsThreads, 1)
    sum_token_blocks_kernel(Rows<scalar_t> rows, Items items, bool aligned, TokenStats stats) {
  __shared__ bool finite[kTokenBlock];
  constexpr int kVec = Vec16<scalar_t>::size;
  constexpr int kUnroll = 4, kWarpRows = kTokenBlock * 32 / kStatsThreads;  // 16-byte loads in flight per row; rows per warp
  static_assert(kTokenBlock <= 32, "a bit of a word for each token");
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  for (StatsLoop loop(items, kTokenBlock); loop.more(); loop.next()) {
    const int64_t b = loop.task.item;
    const Item item = items[b];
    const int64_t entry = items.packed() ? 0 : b;
    const int64_t begin = loop.task.part * kTokenBlock;
    if (begin >= item.tokens) continue;
    const int count = static_cast<int>(item.tokens - begin < kTokenBlock ? item.tokens - begin : kTokenBlock);
    const int64_t first = item.first + begin;
    // For latency, all loads of a step are issued before the first use. Rows past the end repeat the last row.
    const scalar_t* row[kWarpRows];
    float nan_probe[kWarpRows];  // sum of x - x, branch-free: 0, or NaN once a channel is not finite
#pragma unroll
    for (int r = 0; r < kWarpRows; ++r) {
      const int token = warp + r * (kStatsThreads / 32);
      row[r] = rows.row(entry, first + (token < count ? token : count - 1));
      nan_probe[r] = 0.f;
    }
    for (int first_c = lane * kVec; first_c < rows.channels; first_c += kUnroll * 32 * kVec) {
      Vec16<scalar_t> x[kWarpRows][kUnroll];
#pragma unroll
      for (int r = 0; r < kWarpRows; ++r)
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) x[r][u] = load_vec<kWhole>(row[r], first_c + u * 32 * kVec, rows.channels, aligned);
#pragma unroll
      for (int r = 0; r < kWarpRows; ++r)
#pragma unroll
        for (int u = 0; u < kUnroll; ++u)
#pragma unroll
          for (int i = 0; i < kVec; ++i) nan_probe[r] += x[r][u][i] - x[r][u][i];
    }
#pragma unroll
    for (int r = 0; r < kWarpRows; ++r) {
      const int token = warp + r * (kStatsThreads / 32);
      const bool token_finite = __all_sync(kFullWarp, nan_probe[r] == 0.f);
      if (lane != 0 || token >= count) continue;
      finite[token] = token_finite;
      stats.mean_sqdist[entry * items.tokens + first + token] = token_finite ? 0.f : kInfinity;
    }
    __syncthreads();  // `finite` is complete
    const unsigned finite_mask = __ballot_sync(kFullWarp, lane < count && finite[lane]);
    const int64_t token_block = first_token_block(items, b, item.first) + loop.task.part;
    if (stats.sums || stats.lows) {
      for (int c = threadIdx.x * kVec; c < rows.channels; c += kStatsThreads * kVec) {
        float sum[kVec] = {}, low[kVec], high[kVec];
#pragma unroll
        for (int i = 0; i < kVec; ++i) low[i] = kInfinity, high[i] = -kInfinity;
        const scalar_t* column = rows.row(entry, first);
        Vec16<scalar_t> x[kTokenBlock];
#pragma unroll
        for (int u = 0; u < kTokenBlock; ++u) {
          x[u] = load_vec<kWhole>(column, c, rows.channels, aligned);
          if (u + 1 < count) column += rows.row_stride;
        }
#pragma unroll
        for (int u = 0; u < kTokenBlock; ++u) {
          const bool token_finite = finite_mask >> u & 1;  // select, not branch: the compiler would move the loads behind a branch
#pragma unroll
          for (int i = 0; i < kVec; ++i) {
            sum[i] += token_finite ? x[u][i] : 0.f;
            low[i] = fminf(low[i], token_finite ? x[u][i] : kInfinity);
            high[i] = fmaxf(high[i], token_finite ? x[u][i] : -kInfinity);
          }
        }
#pragma unroll
        for (int i = 0; i < kVec; ++i) {
          if (c + i >= rows.channels) continue;
          const int64_t at = token_block * rows.channels + c + i;
          if (stats.sums) stats.sums[at] = sum[i];
          if (!stats.lows) continue;
          from_float(low[i], static_cast<scalar_t*>(stats.lows)[at]);
          from_float(high[i], static_cast<scalar_t*>(stats.highs)[at]);
        }
      }
      if (stats.sums && threadIdx.x == 0) stats.counts[token_block] = static_cast<float>(__popc(finite_mask));
    }
    __syncthreads();  // all warps have read `finite`, which the next task overwrites
  }
}

// (2) Mean and centre of each item. A lane owns a channel; warp w reduces the token blocks w, w + kWarps, ...
template <class scalar_t>
__global__ void __launch_bounds__(kStatsThreads, 1) mean_kernel(Items items, int channels, TokenStats stats) {
  await_predecessor();
  constexpr int kWarps = kStatsThreads / 32, kUnroll = 6;  // kUnroll: token blocks whose loads are in flight together
  __shared__ float sums[kWarps][32], counts[kWarps], lows[kWarps][32], highs[kWarps][32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, c = blockIdx.x * 32 + lane;
  const auto *const all_lows = static_cast<const scalar_t*>(stats.lows), *const all_highs = static_cast<const scalar_t*>(stats.highs);
  for (int64_t b = blockIdx.y; b < items.count; b += gridDim.y) {
    const Item item = items[b];
    const int64_t begin = first_token_block(items, b, item.first), end = begin + ceil_div(item.tokens, kTokenBlock);
    float sum = 0.f, count = 0.f, low = kInfinity, high = -kInfinity;
    for (int64_t token_block = begin + warp; token_block < end; token_block += kUnroll * kWarps) {
      float each_sum[kUnroll], each_count[kUnroll], each_low[kUnroll], each_high[kUnroll];
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        const bool inside = token_block + u * kWarps < end && c < channels;
        const int64_t at = (token_block + u * kWarps) * channels + c;
        each_sum[u] = inside && stats.sums ? stats.sums[at] : 0.f;
        each_count[u] = inside && stats.sums ? stats.counts[token_block + u * kWarps] : 0.f;
        each_low[u] = inside && all_lows ? to_float(all_lows[at]) : kInfinity;
        each_high[u] = inside && all_highs ? to_float(all_highs[at]) : -kInfinity;
      }
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        sum += each_sum[u];
        count += each_count[u];
        low = fminf(low, each_low[u]);
        high = fmaxf(high, each_high[u]);
      }
    }
    __syncthreads();  // warp 0 has read the partial results of the previous item
    sums[warp][lane] = sum, lows[warp][lane] = low, highs[warp][lane] = high;
    if (lane == 0) counts[warp] = count;
    __syncthreads();
    if (warp != 0 || c >= channels) continue;
#pragma unroll
    for (int w = 1; w < kWarps; ++w) {
      sum += sums[w][lane];
      count += counts[w];
      low = fminf(low, lows[w][lane]);
      high = fmaxf(high, highs[w][lane]);
    }
    if (stats.mean) stats.mean[b * channels + c] = count > 0.f ? sum / count : 0.f;
    if (stats.centre) static_cast<scalar_t*>(stats.centre)[b * channels + c] = exact_centre<scalar_t>(low, high);
  }
}

// (3) Squared distances of each token to the mean and the centre of its item, and its row of the centred copy.
template <class scalar_t, bool kWhole>
__global__ void __launch_bounds__(kStatsThreads) mean_sqdist_kernel(Rows<scalar_t> rows, Items items, bool aligned, TokenStats stats) {
  await_predecessor();
  constexpr int kVec = Vec16<scalar_t>::size, kWarps = kStatsThreads / 32;
  constexpr int kUnroll = 4, kMeanVecs = kVec / Vec16<float>::size;  // 16-byte loads in flight; vectors of the mean per vector of the row
  const int lane = threadIdx.x % 32;
  for (StatsLoop loop(items, kWarps); loop.more(); loop.next()) {
    const int64_t b = loop.task.item, i = loop.task.part * kWarps + threadIdx.x / 32;
    const Item item = items[b];
    if (i >= item.tokens) continue;
    const int64_t entry = items.packed() ? 0 : b;
    const int64_t token = entry * items.tokens + item.first + i;
    if (stats.mean_sqdist[token] != 0.f) {  // infinity, by (1): not finite
      if (stats.norms && lane == 0) stats.norms[token] = __uint_as_float(0x7fc00000u);
      continue;
    }
    const scalar_t* row = rows.row(entry, item.first + i);
    const float* mean = stats.mean ? stats.mean + b * rows.channels : nullptr;
    const scalar_t* centre = stats.centre ? static_cast<const scalar_t*>(stats.centre) + b * rows.channels : nullptr;
    const int64_t pitch = centred_pitch(rows.channels);
    char* const copy = stats.centred ? static_cast<char*>(stats.centred) + token * pitch * static_cast<int64_t>(sizeof(scalar_t)) : nullptr;
    float sum = 0.f, norm = 0.f;
    for (int first_c = lane * kVec; first_c < rows.channels; first_c += kUnroll * 32 * kVec) {
      Vec16<scalar_t> x[kUnroll], centre_vec[kUnroll]{};
      Vec16<float> mean_vec[kUnroll][kMeanVecs]{};
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        const int c = first_c + u * 32 * kVec;
        x[u] = load_vec<kWhole>(row, c, rows.channels, aligned);
        if (centre) centre_vec[u] = load_vec<kWhole>(centre, c, rows.channels, rows.channels % kVec == 0);
        if (!mean) continue;
#pragma unroll
        for (int p = 0; p < kMeanVecs; ++p) mean_vec[u][p] = load_vec<kWhole>(mean, c + p * 4, rows.channels, rows.channels % 4 == 0);
      }
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
#pragma unroll
        for (int v = 0; v < kVec; ++v) {
          if (first_c + u * 32 * kVec + v >= rows.channels) continue;
          const float from_mean = mean ? x[u][v] - mean_vec[u][v / 4][v % 4] : 0.f, from_centre = x[u][v] - centre_vec[u][v];
          sum = fmaf(from_mean, from_mean, sum);
          norm = fmaf(from_centre, from_centre, norm);
        }
        const int c = first_c + u * 32 * kVec;
        if (!copy || c >= rows.channels) continue;
        if constexpr (sizeof(scalar_t) == 2) {
          uint4 packed;
          packed.x = subtract_pairs(x[u].word[0], centre_vec[u].word[0], scalar_t());
          packed.y = subtract_pairs(x[u].word[1], centre_vec[u].word[1], scalar_t());
          packed.z = subtract_pairs(x[u].word[2], centre_vec[u].word[2], scalar_t());
          packed.w = subtract_pairs(x[u].word[3], centre_vec[u].word[3], scalar_t());
          *reinterpret_cast<uint4*>(copy + c * 2) = packed;
        } else {
          __nv_bfloat16 high[4], low[4];
#pragma unroll
          for (int v = 0; v < 4; ++v) {
            const float from_centre = x[u][v] - centre_vec[u][v];
            from_float(from_centre, high[v]);
            from_float(from_centre - to_float(high[v]), low[v]);
          }
          uint2 packed;
          memcpy(&packed, high, 8);
          *reinterpret_cast<uint2*>(copy + c * 2) = packed;
          memcpy(&packed, low, 8);
          *reinterpret_cast<uint2*>(copy + (pitch + c) * 2) = packed;
        }
      }
    }
    sum = warp_sum(sum);
    norm = warp_sum(norm);
    __syncwarp();  // every lane has read mean_sqdist[token], which lane 0 overwrites
    if (lane != 0) continue;
    // A sum that overflowed (infinity, or NaN from an overflowed mean) is clamped: it sorts after all other finite tokens, but before
    // infinity.
    stats.mean_sqdist[token] = sum < kNonFinitePotential ? sum : kNonFinitePotential;
    if (stats.norms) stats.norms[token] = norm;
  }
}

template <class scalar_t>
cudaError_t launch_token_stats(const Rows<scalar_t>& rows, const Items& items, const TokenStats& stats, cudaStream_t stream) {
  const bool aligned = rows_aligned(rows);
  const auto shape = [&](int64_t blocks, bool overlap) {
    return Launch{dim3(static_cast<unsigned>(blocks), grid_extent(items.count)), dim3(kStatsThreads), 0, 1, false, stream, overlap};
  };
  const auto parts = [&](int size, bool overlap) {
    if (!items.packed()) return shape(ceil_div(items.tokens, size), overlap);
    return Launch{dim3(static_cast<unsigned>(packed_tasks(items, size))), dim3(kStatsThreads), 0, 1, false, stream, overlap};
  };
  const bool whole = aligned && rows.channels % Vec16<scalar_t>::size == 0;
  cudaError_t error = launch(whole ? sum_token_blocks_kernel<scalar_t, true> : sum_token_blocks_kernel<scalar_t, false>,
                             parts(kTokenBlock, false), rows, items, aligned, stats);
  if (error != cudaSuccess || !(stats.sums || stats.norms)) return error;
  error = launch(mean_kernel<scalar_t>, shape(ceil_div(rows.channels, 32), true), items, rows.channels, stats);
  if (error != cudaSuccess) return error;
  return launch(whole ? mean_sqdist_kernel<scalar_t, true> : mean_sqdist_kernel<scalar_t, false>, parts(kStatsThreads / 32, true), rows,
                items, aligned, stats);
}

// The first pick: the anchor, else the finite token nearest the mean, else token 0. nearest: the lowest key (distance, token) of the item.
__device__ __forceinline__ int64_t first_pick(const Item& item, Key nearest) {
  if (item.anchor >= 0) return item.anchor;
  return key_value(nearest) < kInfinity ? key_index(nearest) : 0;
}

}  // namespace sts
