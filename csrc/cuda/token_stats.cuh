// Statistics of tokens and channels that a selection needs before the distances.
//
// What: for each token, whether it is finite (no NaN or infinity), and its squared distance to the mean of its item's finite tokens. The
//   nearest token is the default anchor. For tensor cores also: a centre per item, each token's squared norm after subtraction of the
//   centre, and a copy of the centred rows. Sums run over fixed token blocks in fixed order: an item's bits do not depend on its batch.
// Chosen when: always. Arrays that are null are skipped.
// Steps: (1) sum_token_blocks, a thread block per token block: sum, low and high of each channel. If a sum is not finite, the block finds
//   the tokens that are not, and sums again without them; (2) mean, a thread block per 32 channels: reduces the token blocks to mean and
//   centre; (3) mean_sqdist, a warp per token: squared distances to mean and centre, and the token's row of the centred copy.
// Synchronisation: three launches. Block barriers that vote on sums and tokens, and around the partial results of the warps.
#pragma once
#include "packed_plan.cuh"
#include "rule.cuh"

namespace sts {

constexpr int kTokenBlock = 16;  // tokens per token block, whose channels one thread block sums
constexpr int kTokenBlockThreads = 128, kChannelThreads = 256, kStatsThreads = 256;  // of (1), (2) and (3)
constexpr int kBlockChannels = 32;                                                   // per thread block of (2)

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
  uint32_t* row_min;   // (all tokens): all bits set, above every minimum of a row; or null
  // Centred rows of the finite tokens, or null. The subtraction is exact.
  //   16-bit features: (all tokens, centred_pitch(channels)) of scalar_t; padding channels are zero.
  //   float32: (all tokens, 2, centred_pitch(channels)) of bfloat16. Part 0 is the value rounded to bfloat16, part 1 the rounded remainder.
  void* centred;
  // Null where finite flags are all that is needed:
  void* centre;        // (items, channels) of scalar_t, 16-byte aligned
  float* mean;         // (items, channels)
  float* sums;         // (all token blocks, channels): over finite tokens
  float* counts;       // (all token blocks): number of finite tokens
  void *lows, *highs;  // (all token blocks, channels) of scalar_t: min and max over finite tokens, +inf and -inf without any
};

// Lays out the arrays that are needed, one allocate(bytes) each. from_mean: distances to the mean are needed. centre: tensor cores run.
// centred: they read the centred copy. row_min: they find the minimum of each row.
template <class Allocate>
void take_token_stats(TokenStats& stats, const Items& items, int64_t channels, int64_t element_bytes, bool from_mean, bool centre,
                      bool centred, bool row_min, Allocate&& allocate) {
  const int64_t token_blocks = all_token_blocks(items);
  take_array(stats.mean_sqdist, all_tokens(items), allocate);
  take_array(stats.norms, centre ? all_tokens(items) : 0, allocate);
  take_array(stats.row_min, row_min ? all_tokens(items) : 0, allocate);
  if (centred) stats.centred = allocate(all_tokens(items) * centred_pitch(channels) * element_bytes);
  if (!from_mean && !centre) return;
  stats.centre = allocate(items.count * channels * element_bytes);
  take_array(stats.mean, items.count * channels, allocate);
  take_array(stats.sums, token_blocks * channels, allocate);
  take_array(stats.counts, token_blocks, allocate);
  stats.lows = allocate(token_blocks * channels * element_bytes);
  stats.highs = allocate(token_blocks * channels * element_bytes);
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

template <class scalar_t>
__device__ __forceinline__ Vec16<scalar_t> filled(float value) {
  scalar_t elements[Vec16<scalar_t>::size];
#pragma unroll
  for (int i = 0; i < Vec16<scalar_t>::size; ++i) from_float(value, elements[i]);
  Vec16<scalar_t> vec;
  memcpy(vec.word, elements, 16);
  return vec;
}

// Stores 16 bytes of a row from channel c on, up to its end. kWhole: all of them, 16-byte aligned.
template <bool kWhole, class scalar_t>
__device__ __forceinline__ void store_vec(const Vec16<scalar_t>& vec, scalar_t* row, int c, int channels) {
  if constexpr (kWhole) {
    *reinterpret_cast<uint4*>(row + c) = {vec.word[0], vec.word[1], vec.word[2], vec.word[3]};
  } else {
#pragma unroll
    for (int i = 0; i < Vec16<scalar_t>::size; ++i)
      if (c + i < channels) from_float(vec[i], row[c + i]);
  }
}

// The same for floats.
template <bool kWhole, int kCount>
__device__ __forceinline__ void store_floats(const float (&values)[kCount], float* row, int c, int channels) {
#pragma unroll
  for (int i = 0; i < kCount; i += 4) {
    Vec16<float> vec;
    memcpy(vec.word, values + i, 16);
    store_vec<kWhole>(vec, row, c + i, channels);
  }
}

// Four elements of a row.
template <class T>
struct alignas(4 * sizeof(T)) Four {
  T element[4];
  __device__ __forceinline__ float operator[](int i) const { return to_float(element[i]); }
};

// The four from channel c on; past its end others of the row. kWhole: all or none are past it, and they are aligned.
template <bool kWhole, class T>
__device__ __forceinline__ Four<T> load_four(const T* row, int c, int channels) {
  if constexpr (kWhole) {
    return *reinterpret_cast<const Four<T>*>(row + (c < channels ? c : 0));
  } else {
    Four<T> four;
#pragma unroll
    for (int i = 0; i < 4; ++i) four.element[i] = row[c + i < channels ? c + i : channels - 1];
    return four;
  }
}

// (1) Sum, low and high of each channel over one token block, and which tokens are finite. kWhole: as in load_vec.
template <class scalar_t, bool kWhole>
__global__ void __launch_bounds__(kTokenBlockThreads, 3)
    sum_token_blocks_kernel(Rows<scalar_t> rows, Items items, bool aligned, TokenStats stats) {
  constexpr int kVec = Vec16<scalar_t>::size;
  static_assert(kTokenBlock <= 32, "a bit of a word for each token");
  for (StatsLoop loop(items, kTokenBlock); loop.more(); loop.next()) {
    const int64_t b = loop.task.item;
    const Item item = items[b];
    const int64_t entry = items.entry(b);
    const int64_t begin = loop.task.part * kTokenBlock;
    if (begin >= item.tokens) continue;
    const int count = static_cast<int>(item.tokens - begin < kTokenBlock ? item.tokens - begin : kTokenBlock);
    const int64_t first = item.first + begin, token_block = first_token_block(items, b, item.first) + loop.task.part;
    unsigned finite = (2u << (count - 1)) - 1;  // bit t: token t of the block is finite, as is assumed of all at first
    for (bool known = false;; known = true) {
      bool all_finite = true;
      for (int c = threadIdx.x * kVec; c < rows.channels; c += kTokenBlockThreads * kVec) {
        float sum[kVec] = {};
        Vec16<scalar_t> x[kTokenBlock], low, high;
        if (finite) {
          // All loads are issued before the first use. In place of a token that is not finite or past the end, a finite one is read again,
          // which changes neither low nor high.
          const scalar_t *next = rows.row(entry, first), *row = next + (__ffs(finite) - 1) * rows.row_stride;
#pragma unroll
          for (int t = 0; t < kTokenBlock; ++t) {
            row = finite >> t & 1 ? next : row;
            next += rows.row_stride;
            x[t] = load_vec<kWhole>(row, c, rows.channels, aligned);
          }
          low = high = x[0];
#pragma unroll
          for (int t = 0; t < kTokenBlock; ++t) {
            const float counts = finite >> t & 1 ? 1.f : 0.f;
#pragma unroll
            for (int w = 0; w < 4; ++w) {
              low.word[w] = lower_elements(low.word[w], x[t].word[w], scalar_t());
              high.word[w] = higher_elements(high.word[w], x[t].word[w], scalar_t());
            }
#pragma unroll
            for (int i = 0; i < kVec; ++i) sum[i] = fmaf(x[t][i], counts, sum[i]);
          }
#pragma unroll
          for (int i = 0; i < kVec; ++i) all_finite &= sum[i] - sum[i] == 0.f;
        } else {
          low = filled<scalar_t>(kInfinity), high = filled<scalar_t>(-kInfinity);
        }
        if (!stats.mean) continue;
        const int64_t row = token_block * rows.channels;
        store_floats<kWhole>(sum, stats.sums + row, c, rows.channels);
        store_vec<kWhole>(low, static_cast<scalar_t*>(stats.lows) + row, c, rows.channels);
        store_vec<kWhole>(high, static_cast<scalar_t*>(stats.highs) + row, c, rows.channels);
      }
      if (known || !__syncthreads_or(!all_finite)) break;
      // A sum that is not finite: of a token that is not, or of an overflow. The sums are computed again, of the finite tokens.
      for (int t = 0; t < count; ++t) {
        float probe = 0.f;  // sum of x - x: 0, or NaN once a channel is not finite
        for (int c = threadIdx.x * kVec; c < rows.channels; c += kTokenBlockThreads * kVec) {
          const Vec16<scalar_t> x = load_vec<kWhole>(rows.row(entry, first + t), c, rows.channels, aligned);
#pragma unroll
          for (int i = 0; i < kVec; ++i) probe += x[i] - x[i];
        }
        if (__syncthreads_or(probe != 0.f)) finite &= ~(1u << t);
      }
    }
    if (static_cast<int>(threadIdx.x) < count) {
      const int64_t token = entry * items.tokens + first + threadIdx.x;
      stats.mean_sqdist[token] = finite >> threadIdx.x & 1 ? 0.f : kInfinity;
      if (stats.row_min) stats.row_min[token] = ~0u;
    }
    if (stats.mean && threadIdx.x == 0) stats.counts[token_block] = static_cast<float>(__popc(finite));
  }
}

// (2) Mean and centre of each item. A thread has four channels of the token blocks r, r + kRows, ...; lanes l, l + 8, ... have the same
// channels. kWhole: whole vectors of four channels.
template <class scalar_t, bool kWhole>
__global__ void __launch_bounds__(kChannelThreads, 2) mean_kernel(Items items, int channels, TokenStats stats) {
  await_predecessor();
  constexpr int kLanes = kBlockChannels / 4, kRows = kChannelThreads / kLanes, kWarps = kChannelThreads / 32;
  constexpr int kUnroll = kWhole ? 6 : 2;  // token blocks whose loads are in flight together
  __shared__ float sums[kWarps][kBlockChannels], counts[kWarps], lows[kWarps][kBlockChannels], highs[kWarps][kBlockChannels];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, c = blockIdx.x * kBlockChannels + lane % kLanes * 4;
  const auto *const all_lows = static_cast<const scalar_t*>(stats.lows), *const all_highs = static_cast<const scalar_t*>(stats.highs);
  for (int64_t b = blockIdx.y; b < items.count; b += gridDim.y) {
    const Item item = items[b];
    const int64_t begin = first_token_block(items, b, item.first), end = begin + ceil_div(item.tokens, kTokenBlock);
    float sum[4] = {}, low[4], high[4], count = 0.f;
#pragma unroll
    for (int i = 0; i < 4; ++i) low[i] = kInfinity, high[i] = -kInfinity;
    for (int64_t token_block = begin + threadIdx.x / kLanes; token_block < end; token_block += kUnroll * kRows) {
      // All loads are issued before the first use. Past the end the last token block is read again.
      int64_t at[kUnroll];
      float each_count[kUnroll];
      Four<float> each_sum[kUnroll];
      Four<scalar_t> each_low[kUnroll], each_high[kUnroll];
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) at[u] = token_block + u * kRows < end ? token_block + u * kRows : end - 1;
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        each_count[u] = stats.counts[at[u]];
        each_sum[u] = load_four<kWhole>(stats.sums + at[u] * channels, c, channels);
        each_low[u] = load_four<kWhole>(all_lows + at[u] * channels, c, channels);
        each_high[u] = load_four<kWhole>(all_highs + at[u] * channels, c, channels);
      }
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        const bool inside = token_block + u * kRows < end;
        count += inside ? each_count[u] : 0.f;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          sum[i] += inside ? each_sum[u][i] : 0.f;
          low[i] = fminf(low[i], each_low[u][i]);
          high[i] = fmaxf(high[i], each_high[u][i]);
        }
      }
    }
#pragma unroll
    for (int offset = kLanes; offset < 32; offset *= 2) {
      count += __shfl_xor_sync(kFullWarp, count, offset);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        sum[i] += __shfl_xor_sync(kFullWarp, sum[i], offset);
        low[i] = fminf(low[i], __shfl_xor_sync(kFullWarp, low[i], offset));
        high[i] = fmaxf(high[i], __shfl_xor_sync(kFullWarp, high[i], offset));
      }
    }
    __syncthreads();  // the partial results of the previous item have been read
    if (lane < kLanes) {
#pragma unroll
      for (int i = 0; i < 4; ++i) sums[warp][lane * 4 + i] = sum[i], lows[warp][lane * 4 + i] = low[i], highs[warp][lane * 4 + i] = high[i];
      if (lane == 0) counts[warp] = count;
    }
    __syncthreads();
    // Warp 0 writes the means, warp 1 the centres.
    const int own = blockIdx.x * kBlockChannels + lane;
    if (own >= channels) continue;
    if (warp == 0) {
      float total = 0.f, tokens = 0.f;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) total += sums[w][lane], tokens += counts[w];
      stats.mean[b * channels + own] = tokens > 0.f ? total / tokens : 0.f;
    } else if (warp == 1) {
      float lowest = kInfinity, highest = -kInfinity;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) lowest = fminf(lowest, lows[w][lane]), highest = fmaxf(highest, highs[w][lane]);
      static_cast<scalar_t*>(stats.centre)[b * channels + own] = exact_centre<scalar_t>(lowest, highest);
    }
  }
}

// (3) Squared distances of each token to the mean and the centre of its item, and its row of the centred copy.
template <class scalar_t, bool kWhole>
__global__ void __launch_bounds__(kStatsThreads, 2) mean_sqdist_kernel(Rows<scalar_t> rows, Items items, bool aligned, TokenStats stats) {
  await_predecessor();
  constexpr int kVec = Vec16<scalar_t>::size, kWarps = kStatsThreads / 32;
  constexpr int kUnroll = 4, kMeanVecs = kVec / Vec16<float>::size;  // 16-byte loads in flight; vectors of the mean per vector of the row
  const int lane = threadIdx.x % 32;
  for (StatsLoop loop(items, kWarps); loop.more(); loop.next()) {
    const int64_t b = loop.task.item, i = loop.task.part * kWarps + threadIdx.x / 32;
    const Item item = items[b];
    if (i >= item.tokens) continue;
    const int64_t entry = items.entry(b);
    const int64_t token = entry * items.tokens + item.first + i;
    const bool finite = stats.mean_sqdist[token] == 0.f;  // by (1): 0 or infinity. Loaded together with the row
    const scalar_t* row = rows.row(entry, item.first + i);
    const float* mean = stats.mean + b * rows.channels;
    const scalar_t* centre = static_cast<const scalar_t*>(stats.centre) + b * rows.channels;
    const int64_t pitch = centred_pitch(rows.channels);
    char* const copy = stats.centred ? static_cast<char*>(stats.centred) + token * pitch * static_cast<int64_t>(sizeof(scalar_t)) : nullptr;
    float sum = 0.f, norm = 0.f;
    for (int first_c = lane * kVec; first_c < rows.channels; first_c += kUnroll * 32 * kVec) {
      Vec16<scalar_t> x[kUnroll], centre_vec[kUnroll];
      Vec16<float> mean_vec[kUnroll][kMeanVecs];
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        const int c = first_c + u * 32 * kVec;
        x[u] = load_vec<kWhole>(row, c, rows.channels, aligned);
        centre_vec[u] = load_vec<kWhole>(centre, c, rows.channels, rows.channels % kVec == 0);
#pragma unroll
        for (int p = 0; p < kMeanVecs; ++p) mean_vec[u][p] = load_vec<kWhole>(mean, c + p * 4, rows.channels, rows.channels % 4 == 0);
      }
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
#pragma unroll
        for (int v = 0; v < kVec; ++v) {
          const float from_mean = x[u][v] - mean_vec[u][v / 4][v % 4], from_centre = x[u][v] - centre_vec[u][v];
          sum = fmaf(from_mean, from_mean, sum);  // channels past the end are zeros
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
    if (finite) stats.mean_sqdist[token] = sum < kNonFinitePotential ? sum : kNonFinitePotential;
    if (stats.norms) stats.norms[token] = finite ? norm : kNaN;
  }
}

template <class scalar_t>
cudaError_t launch_token_stats(const Rows<scalar_t>& rows, const Items& items, const TokenStats& stats, cudaStream_t stream) {
  const bool aligned = rows_aligned(rows);
  const auto shape = [&](int64_t blocks, int threads, bool overlap) {
    return Launch{dim3(static_cast<unsigned>(blocks), grid_extent(items.count)), dim3(threads), 0, 1, false, stream, overlap};
  };
  const auto parts = [&](int size, int threads, bool overlap) {
    if (!items.packed()) return shape(ceil_div(items.tokens, size), threads, overlap);
    return Launch{dim3(static_cast<unsigned>(packed_tasks(items, size))), dim3(threads), 0, 1, false, stream, overlap};
  };
  const bool whole = aligned && rows.channels % Vec16<scalar_t>::size == 0;
  cudaError_t error = launch(whole ? sum_token_blocks_kernel<scalar_t, true> : sum_token_blocks_kernel<scalar_t, false>,
                             parts(kTokenBlock, kTokenBlockThreads, false), rows, items, aligned, stats);
  if (error != cudaSuccess || !stats.mean) return error;
  error = launch(rows.channels % 4 == 0 ? mean_kernel<scalar_t, true> : mean_kernel<scalar_t, false>,
                 shape(ceil_div(rows.channels, kBlockChannels), kChannelThreads, true), items, rows.channels, stats);
  if (error != cudaSuccess) return error;
  return launch(whole ? mean_sqdist_kernel<scalar_t, true> : mean_sqdist_kernel<scalar_t, false>,
                parts(kStatsThreads / 32, kStatsThreads, true), rows, items, aligned, stats);
}

// The first pick: the anchor, else the finite token nearest the mean, else token 0. nearest: the lowest key (distance, token) of the item.
__device__ __forceinline__ int64_t first_pick(const Item& item, Key nearest) {
  if (item.anchor >= 0) return item.anchor;
  return key_value(nearest) < kInfinity ? key_index(nearest) : 0;
}

}  // namespace sts
