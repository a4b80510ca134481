// What a selection needs to know of its tokens before their distances.
//
// What: whether each is finite; how far it is from the mean of its item's finite tokens (the nearest is the default anchor); for tensor
//   cores the item's centre, each token's squared norm from there, and a copy of the rows less the centre. Sums run over fixed chunks of
//   tokens in fixed order: an item's numbers do not depend on what else is in the batch.
// Chosen when: always; of the numbers those whose arrays are there.
// Steps: (1) sum_chunks, a block a chunk: which tokens are finite, then the sums, lows and highs of their channels; (2) mean, a block 32
//   channels: the mean and the centre of all chunks; (3) mean_sqdist, a warp a token: its distances to both, and its row of the copy.
// Synchronisation: three launches. Block barriers between finding finite tokens and using them, and around the sums of an item's warps.
#pragma once
#include "packed_plan.cuh"
#include "rule.cuh"

namespace sts {

constexpr int kStatsChunk = 16;  // tokens whose channels one block sums
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

// Channels of the centred copy: whole 16-byte chunks.
STS_HOST_DEVICE int64_t centred_pitch(int64_t channels) { return ceil_div(channels, 8) * 8; }

struct TokenStats {
  float* mean_sqdist;  // (all tokens): distance to the mean, or 0 where items have anchors; infinite for a token that is not finite
  float* norms;        // (all tokens): squared distance to the centre, NaN of a token that is not finite; or null
  void* centre;        // (items, channels): elements of the features' type, 16-byte aligned; or null
  // The finite rows less the centre, exactly, or null. 16-bit features: (all tokens, centred_pitch(channels)), the last channels zero.
  // float32: (all tokens, 2, centred_pitch(channels)) of bfloat16, whose first part is the nearest element and the second that of the rest.
  void* centred;
  // Scratch. Null where items have anchors:
  float* sums;    // (all chunks, channels)
  float* counts;  // (all chunks): finite tokens
  float* mean;    // (items, channels)
  // Null where there is no centre:
  void *lows, *highs;  // (all chunks, channels): of the finite tokens, elements of the features' type; infinite where there is none
};

// Scratch for the stats that are wanted, each part taken by allocate(bytes): the distances to the mean; what tensor cores need, and the
// centred copy besides.
template <class Allocate>
void take_token_stats(TokenStats& stats, const Items& items, int64_t channels, int64_t element_bytes, bool from_mean, bool centre,
                      bool centred, Allocate&& allocate) {
  const auto take = [&](auto*& part, int64_t count) {
    if (count) part = static_cast<std::remove_reference_t<decltype(part)>>(allocate(count * static_cast<int64_t>(sizeof(*part))));
  };
  const int64_t chunks = all_chunks(items);
  take(stats.mean_sqdist, all_tokens(items));
  take(stats.norms, centre ? all_tokens(items) : 0);
  if (centre) stats.centre = allocate(items.count * channels * element_bytes);
  if (centred) stats.centred = allocate(all_tokens(items) * centred_pitch(channels) * element_bytes);
  take(stats.sums, from_mean ? chunks * channels : 0);
  take(stats.counts, from_mean ? chunks : 0);
  take(stats.mean, from_mean ? items.count * channels : 0);
  if (centre) stats.lows = allocate(chunks * channels * element_bytes);
  if (centre) stats.highs = allocate(chunks * channels * element_bytes);
}

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

// (1) kWhole: every row is whole chunks that can be read 16 bytes at a time.
template <class scalar_t, bool kWhole>
__global__ void __launch_bounds__(kStatsThreads, 1) sum_chunks_kernel(Rows<scalar_t> rows, Items items, bool aligned, TokenStats stats) {
  __shared__ bool finite[kStatsChunk];
  constexpr int kVec = Vec16<scalar_t>::size;
  constexpr int kUnroll = 4, kWarpRows = kStatsChunk * 32 / kStatsThreads;  // loads under way together: of each of so many rows
  static_assert(kStatsChunk <= 32, "a bit of a word for each token");
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  for (StatsTurn turn(items, kStatsChunk); turn.more(); turn.next()) {
    const int64_t b = turn.task.item;
    const Item item = items[b];
    const int64_t entry = items.packed() ? 0 : b;
    const int64_t begin = turn.task.part * kStatsChunk;
    if (begin >= item.tokens) continue;
    const int count = static_cast<int>(item.tokens - begin < kStatsChunk ? item.tokens - begin : kStatsChunk);
    const int64_t first = item.first + begin;
    // All loads of a warp's rows, and then of a thread's columns, are issued before one is used. Rows past the end repeat the last one.
    const scalar_t* row[kWarpRows];
    float zero[kWarpRows];  // NaN once a channel is not finite: no branch an element
#pragma unroll
    for (int r = 0; r < kWarpRows; ++r) {
      const int at = warp + r * (kStatsThreads / 32);
      row[r] = rows.row(entry, first + (at < count ? at : count - 1));
      zero[r] = 0.f;
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
          for (int i = 0; i < kVec; ++i) zero[r] += x[r][u][i] - x[r][u][i];
    }
#pragma unroll
    for (int r = 0; r < kWarpRows; ++r) {
      const int at = warp + r * (kStatsThreads / 32);
      const bool good = __all_sync(kFullWarp, zero[r] == 0.f);
      if (lane != 0 || at >= count) continue;
      finite[at] = good;
      stats.mean_sqdist[entry * items.tokens + first + at] = good ? 0.f : kInfinity;
    }
    __syncthreads();  // `finite` is whole
    const unsigned usable = __ballot_sync(kFullWarp, lane < count && finite[lane]);
    const int64_t chunk = first_chunk(items, b, item.first) + turn.task.part;
    if (stats.sums || stats.lows) {
      for (int c = threadIdx.x * kVec; c < rows.channels; c += kStatsThreads * kVec) {
        float sum[kVec] = {}, low[kVec], high[kVec];
#pragma unroll
        for (int i = 0; i < kVec; ++i) low[i] = kInfinity, high[i] = -kInfinity;
        const scalar_t* column = rows.row(entry, first);
        Vec16<scalar_t> x[kStatsChunk];
#pragma unroll
        for (int u = 0; u < kStatsChunk; ++u) {
          x[u] = load_vec<kWhole>(column, c, rows.channels, aligned);
          if (u + 1 < count) column += rows.row_stride;
        }
#pragma unroll
        for (int u = 0; u < kStatsChunk; ++u) {
          const bool used = usable >> u & 1;  // no branch: the loads would be moved behind it
#pragma unroll
          for (int i = 0; i < kVec; ++i) {
            sum[i] += used ? x[u][i] : 0.f;
            low[i] = fminf(low[i], used ? x[u][i] : kInfinity);
            high[i] = fmaxf(high[i], used ? x[u][i] : -kInfinity);
          }
        }
#pragma unroll
        for (int i = 0; i < kVec; ++i) {
          if (c + i >= rows.channels) continue;
          const int64_t at = chunk * rows.channels + c + i;
          if (stats.sums) stats.sums[at] = sum[i];
          if (!stats.lows) continue;
          from_float(low[i], static_cast<scalar_t*>(stats.lows)[at]);
          from_float(high[i], static_cast<scalar_t*>(stats.highs)[at]);
        }
      }
      if (stats.sums && threadIdx.x == 0) stats.counts[chunk] = static_cast<float>(__popc(usable));
    }
    __syncthreads();
  }
}

// (2) The mean and the centre of each item, a block for 32 channels: warp w has the chunks w, w + kWarps, ...
template <class scalar_t>
__global__ void __launch_bounds__(kStatsThreads, 1) mean_kernel(Items items, int channels, TokenStats stats) {
  await_predecessor();
  constexpr int kWarps = kStatsThreads / 32, kUnroll = 6;  // chunks whose loads are under way together
  __shared__ float sums[kWarps][32], counts[kWarps], lows[kWarps][32], highs[kWarps][32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, c = blockIdx.x * 32 + lane;
  const auto *const all_lows = static_cast<const scalar_t*>(stats.lows), *const all_highs = static_cast<const scalar_t*>(stats.highs);
  for (int64_t b = blockIdx.y; b < items.count; b += gridDim.y) {
    const Item item = items[b];
    const int64_t begin = first_chunk(items, b, item.first), end = begin + ceil_div(item.tokens, kStatsChunk);
    float sum = 0.f, count = 0.f, low = kInfinity, high = -kInfinity;
    for (int64_t chunk = begin + warp; chunk < end; chunk += kUnroll * kWarps) {
      float each_sum[kUnroll], each_count[kUnroll], each_low[kUnroll], each_high[kUnroll];
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        const bool inside = chunk + u * kWarps < end && c < channels;
        const int64_t at = (chunk + u * kWarps) * channels + c;
        each_sum[u] = inside && stats.sums ? stats.sums[at] : 0.f;
        each_count[u] = inside && stats.sums ? stats.counts[chunk + u * kWarps] : 0.f;
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
    __syncthreads();  // the item before has been read
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

// (3) How far each token is from the mean and from the centre of its item.
template <class scalar_t, bool kWhole>
__global__ void __launch_bounds__(kStatsThreads) mean_sqdist_kernel(Rows<scalar_t> rows, Items items, bool aligned, TokenStats stats) {
  await_predecessor();
  constexpr int kVec = Vec16<scalar_t>::size, kWarps = kStatsThreads / 32;
  constexpr int kUnroll = 4, kParts = kVec / Vec16<float>::size;  // loads under way together; chunks of the mean for one of the row
  const int lane = threadIdx.x % 32;
  for (StatsTurn turn(items, kWarps); turn.more(); turn.next()) {
    const int64_t b = turn.task.item, i = turn.task.part * kWarps + threadIdx.x / 32;
    const Item item = items[b];
    if (i >= item.tokens) continue;
    const int64_t entry = items.packed() ? 0 : b;
    const int64_t token = entry * items.tokens + item.first + i;
    if (stats.mean_sqdist[token] != 0.f) {  // not finite
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
      Vec16<scalar_t> x[kUnroll], common[kUnroll]{};
      Vec16<float> around[kUnroll][kParts]{};
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        const int c = first_c + u * 32 * kVec;
        x[u] = load_vec<kWhole>(row, c, rows.channels, aligned);
        if (centre) common[u] = load_vec<kWhole>(centre, c, rows.channels, rows.channels % kVec == 0);
        if (!mean) continue;
#pragma unroll
        for (int p = 0; p < kParts; ++p) around[u][p] = load_vec<kWhole>(mean, c + p * 4, rows.channels, rows.channels % 4 == 0);
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
        const int c = first_c + u * 32 * kVec;
        if (!copy || c >= rows.channels) continue;
        if constexpr (sizeof(scalar_t) == 2) {
          uint4 words;
          words.x = subtract_pairs(x[u].word[0], common[u].word[0], scalar_t());
          words.y = subtract_pairs(x[u].word[1], common[u].word[1], scalar_t());
          words.z = subtract_pairs(x[u].word[2], common[u].word[2], scalar_t());
          words.w = subtract_pairs(x[u].word[3], common[u].word[3], scalar_t());
          *reinterpret_cast<uint4*>(copy + c * 2) = words;
        } else {
          __nv_bfloat16 nearest[4], rest[4];
#pragma unroll
          for (int v = 0; v < 4; ++v) {
            const float from_centre = x[u][v] - common[u][v];
            from_float(from_centre, nearest[v]);
            from_float(from_centre - to_float(nearest[v]), rest[v]);
          }
          uint2 words;
          memcpy(&words, nearest, 8);
          *reinterpret_cast<uint2*>(copy + c * 2) = words;
          memcpy(&words, rest, 8);
          *reinterpret_cast<uint2*>(copy + (pitch + c) * 2) = words;
        }
      }
    }
    sum = warp_sum(sum);
    norm = warp_sum(norm);
    __syncwarp();  // every lane has read the distance before one writes it
    if (lane != 0) continue;
    // Beyond float32's range (or a mean that is): after all others, yet before the tokens that are not finite.
    stats.mean_sqdist[token] = sum < kNonFinitePotential ? sum : kNonFinitePotential;
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
  const bool whole = aligned && rows.channels % Vec16<scalar_t>::size == 0;
  cudaError_t error = launch(whole ? sum_chunks_kernel<scalar_t, true> : sum_chunks_kernel<scalar_t, false>, chunks(kStatsChunk, false),
                             rows, items, aligned, stats);
  if (error != cudaSuccess || !(stats.sums || stats.norms)) return error;
  error = launch(mean_kernel<scalar_t>, shape(ceil_div(rows.channels, 32), true), items, rows.channels, stats);
  if (error != cudaSuccess) return error;
  return launch(whole ? mean_sqdist_kernel<scalar_t, true> : mean_sqdist_kernel<scalar_t, false>, chunks(kStatsThreads / 32, true), rows,
                items, aligned, stats);
}

// The first pick: the anchor, else the finite token nearest the mean, else the first token.
__device__ __forceinline__ int64_t first_pick(const Item& item, Key nearest) {
  if (item.anchor >= 0) return item.anchor;
  return key_value(nearest) < kInfinity ? key_index(nearest) : 0;
}

}  // namespace sts
