// Stage 1 of STS: all picks of all items in one launch, after their distances.
//   up to kMatrixTokens tokens: the weights of all pairs are stored once, and one block per item runs the picks, with the
//     potentials in registers and one barrier a pick;
//   above: nothing N x N is stored. Groups of resident blocks take an item each and agree on every pick through a barrier. A
//     pick's row of weights that is not at hand is computed together with those of the tokens that look like the next picks, in
//     one pass over the features, and the rows are kept until they are needed or replaced. Guesses cost time, never a result:
//     potentials are exact at every pick.
#pragma once
#include "sqdist_mma.cuh"
#include "token_stats.cuh"

namespace sts {

constexpr int64_t kMatrixTokens = 8192;
constexpr int64_t kMatrixFloats = int64_t(1) << 26;  // weights held at a time: 256 MiB, one item of kMatrixTokens

// What is stored for a pair of tokens by the rule; the diagonal is never read.
template <class Rule>
struct StoreWeight {
  Rule rule;
  __device__ float operator()(float sqdist, bool) const { return rule.weight(sqdist); }
};

// The first pick: the anchor, else the finite token nearest the mean, else the first token.
__device__ __forceinline__ int64_t first_pick(const Item& item, Key nearest) {
  if (item.anchor >= 0) return item.anchor;
  return key_value(nearest) < kInfinity ? key_index(nearest) : 0;
}

// ---- stored weights ----

// One block per item of [first_item, first_item + gridDim.x). Thread t holds tokens t, t + blockDim.x, ...
template <class Rule, int kTokens>
__global__ void __launch_bounds__(1024, 1)
    select_stored_kernel(Items items, int64_t first_item, const float* weights, const float* mean_sqdist, Rule rule, int64_t* out) {
  __shared__ Key partial[2][32];
  const int64_t b = first_item + blockIdx.x;
  const Item item = items[b];
  const int tokens = static_cast<int>(item.tokens), threads = blockDim.x, tid = threadIdx.x;
  const int64_t stride = items.tokens;
  // A packed batch has one matrix, whose diagonal blocks are the items'.
  const float* matrix = weights + (items.packed() ? item.first * (stride + 1) : blockIdx.x * stride * stride);
  const float* from_mean = mean_sqdist + (items.packed() ? item.first : b * stride);
  int64_t* picked = out + item.out;

  const int64_t picks = item.picks < tokens ? item.picks : tokens;
  for (int64_t step = picks + tid; step < item.picks; step += threads) picked[step] = -1;
  if (picks == 0) return;

  float potential[kTokens];
  Key best = kNoKey;
#pragma unroll
  for (int t = 0; t < kTokens; ++t) {
    const int j = t * threads + tid;
    potential[t] = kInfinity;
    if (j >= tokens) continue;
    const float distance = from_mean[j];
    potential[t] = distance < kInfinity ? Rule::start() : kLastResort;
    best = lower(best, make_key(distance, j));
  }
  int pick = static_cast<int>(first_pick(item, block_lowest(best, partial, 0)));
  for (int step = 0;; ++step) {
    if (tid == 0) picked[step] = pick;
    if (step + 1 == picks) return;
    const float* row = matrix + pick * stride;
    best = kNoKey;
#pragma unroll
    for (int t = 0; t < kTokens; ++t) {
      const int j = t * threads + tid;
      if (j >= tokens) continue;
      potential[t] = j == pick ? kInfinity : Rule::add(potential[t], __ldg(row + j));
      best = lower(best, make_key(potential[t], j));
    }
    pick = static_cast<int>(key_index(block_lowest(best, partial, step + 1)));
  }
}

// ---- recomputed weights ----

constexpr int kRecomputeThreads = 256;
constexpr int kRecomputeWarps = kRecomputeThreads / 32;
constexpr int kLookahead = 8;        // rows computed in one pass at the most
constexpr int kCachedRows = 64;      // at the most: two for each lane of the warp that looks them up
constexpr int kSweepChannels = 128;  // of the points, in shared memory at a time

// Which rows of weights are at hand. All blocks of a group keep the same copy, since all decide alike from the same keys.
struct RowCache {
  int token[kCachedRows];  // -1: none
  int oldest;              // the row to give up next when none is free
  int row;                 // of the pick, after `plan_rows`
  int count;               // rows to compute now, of the tokens token[computed[0]], token[computed[1]], ...
  int computed[kLookahead];
};

// By one warp: finds the row of `pick`, whose key is `lowest`, and frees it for later. If it is not cached, decides which `wanted`
// rows to compute with it: those of the tokens of lowest key after it, which are finite, not picked and not cached. The keys to
// choose from are the lowest of every warp of the group, of which each lane offers two.
__device__ __forceinline__ void plan_rows(RowCache& cache, int cached_rows, int pick, Key lowest, const Key* keys, int key_count,
                                          int wanted) {
  const int lane = threadIdx.x % 32;
  int low = cache.token[lane], high = cache.token[lane + 32];  // rows `lane` and `lane + 32`
  const auto rows_with = [&](int token) {
    return static_cast<unsigned long long>(__ballot_sync(kFullWarp, high == token && lane + 32 < cached_rows)) << 32 |
           __ballot_sync(kFullWarp, low == token && lane < cached_rows);
  };
  const auto set = [&](int row, int token) {
    if (row == lane) low = token;
    if (row == lane + 32) high = token;
  };
  int row = __ffsll(static_cast<long long>(rows_with(pick))) - 1, count = 0;
  if (row < 0) {
    Key first = kNoKey, second = kNoKey;
    if (wanted > 1) {
      for (int k = lane; k < key_count; k += 32) {
        const Key key = keys[k] > lowest ? keys[k] : kNoKey;
        second = lower(second, key < first ? first : key);
        first = lower(first, key);
      }
    }
    int oldest = cache.oldest, token = pick;
    unsigned long long fresh = 0;  // rows given out here
    while (true) {
      if (!rows_with(token)) {
        int taken = __ffsll(static_cast<long long>(rows_with(-1))) - 1;
        if (taken < 0) {
          while (fresh >> oldest & 1) oldest = (oldest + 1) % cached_rows;
          taken = oldest;
          oldest = (oldest + 1) % cached_rows;
        }
        set(taken, token);
        fresh |= 1ull << taken;
        if (count == 0) row = taken;
        if (lane == 0) cache.computed[count] = taken;
        if (++count == wanted) break;
      }
      const Key next = warp_lowest(first);
      if (!(key_value(next) < kLastResort)) break;  // no more, or none that is finite
      if (first == next) {
        first = second;
        second = kNoKey;
      }
      token = static_cast<int>(key_index(next));
    }
    __syncwarp();  // every lane has read `oldest` before one writes it
    if (lane == 0) cache.oldest = oldest;
  }
  __syncwarp();
  cache.token[lane] = low;
  cache.token[lane + 32] = high;
  if (lane == 0) {
    cache.row = row;
    cache.count = count;
  }
}

// The weights of this block's tokens to the cache.count points, as rows of `cached`, `row_floats` apart.
template <class scalar_t, class Rule>
__device__ __forceinline__ void compute_rows(const Rows<scalar_t>& rows, int64_t entry, const Item& item, bool aligned, const Rule& rule,
                                             const RowCache& cache, int64_t first_token, int64_t token_step, float* cached,
                                             int64_t row_floats, float (*point)[kSweepChannels]) {
  constexpr int kVec = Chunk<scalar_t>::size, kUnroll = 4;  // loads in flight: 64 bytes of a row
  const int count = cache.count;
  for (int64_t begin = first_token; begin < item.tokens; begin += token_step) {
    const int64_t i = begin + threadIdx.x;
    const scalar_t* row = rows.row(entry, item.first + (i < item.tokens ? i : item.tokens - 1));
    float sum[kLookahead] = {};
    for (int c0 = 0; c0 < rows.channels; c0 += kSweepChannels) {
      __syncthreads();
      for (int e = threadIdx.x; e < count * kSweepChannels; e += kRecomputeThreads) {
        const int p = e / kSweepChannels, c = c0 + e % kSweepChannels;
        const int64_t token = item.first + cache.token[cache.computed[p]];
        point[p][e % kSweepChannels] = c < rows.channels ? to_float(rows.row(entry, token)[c]) : 0.f;
      }
      __syncthreads();
      for (int c = 0; c < kSweepChannels && c0 + c < rows.channels; c += kVec * kUnroll) {
        Chunk<scalar_t> x[kUnroll];
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) x[u] = load_channels(row, c0 + c + u * kVec, rows.channels, aligned);
#pragma unroll
        for (int u = 0; u < kUnroll; ++u)
#pragma unroll
          for (int p = 0; p < kLookahead; ++p) {
            if (p >= count) continue;
#pragma unroll
            for (int v = 0; v < kVec; ++v) {
              const float difference = x[u][v] - point[p][c + u * kVec + v];
              sum[p] = fmaf(difference, difference, sum[p]);
            }
          }
      }
    }
    if (i >= item.tokens) continue;
#pragma unroll
    for (int p = 0; p < kLookahead; ++p)
      if (p < count) cached[cache.computed[p] * row_floats + i] = rule.weight(sum[p]);
  }
}

// Groups of `group_blocks` resident blocks; group g takes items g, g + groups, ... `potential` holds the distances to the mean
// on entry. cached: `cached_rows` rows of all tokens. keys: two for every block and every warp. arrived: a zero for every group.
template <class scalar_t, class Rule>
__global__ void __launch_bounds__(kRecomputeThreads, 2)
    select_recomputed_kernel(Rows<scalar_t> rows, Items items, bool aligned, int group_blocks, int cached_rows, int lookahead, Rule rule,
                             float* potential, float* cached, Key* keys, unsigned* arrived, int64_t* out) {
  __shared__ Key partial[2][32];
  __shared__ RowCache cache;
  __shared__ float point[kLookahead][kSweepChannels];
  const int group = blockIdx.x / group_blocks, groups = gridDim.x / group_blocks, rank = blockIdx.x % group_blocks, tid = threadIdx.x;
  const int64_t first_token = static_cast<int64_t>(rank) * kRecomputeThreads;
  const int64_t token_step = static_cast<int64_t>(group_blocks) * kRecomputeThreads;
  GroupBarrier barrier(arrived + group, group_blocks);
  const int group_warps = group_blocks * kRecomputeWarps;
  Key* group_keys = keys + static_cast<int64_t>(group) * 2 * (group_blocks + group_warps);
  const Key* warp_keys = nullptr;
  int turn = 0;
  // The lowest key of the group; those of its warps are in warp_keys. Keys are written in turns like `partial`.
  const auto group_lowest = [&](Key best) {
    Key* block_keys = group_keys + (turn & 1) * (group_blocks + group_warps);
    best = warp_lowest(best);
    if (tid % 32 == 0) block_keys[group_blocks + rank * kRecomputeWarps + tid / 32] = best;
    best = block_lowest(best, partial, turn++);
    if (tid == 0) block_keys[rank] = best;
    barrier.sync();
    warp_keys = block_keys + group_blocks;
    best = kNoKey;
    for (int r = tid % 32; r < group_blocks; r += 32) best = lower(best, block_keys[r]);
    return warp_lowest(best);
  };

  for (int64_t b = group; b < items.count; b += groups) {
    const Item item = items[b];
    const int64_t entry = items.packed() ? 0 : b, picks = item.picks < item.tokens ? item.picks : item.tokens;
    int64_t* picked = out + item.out;
    if (rank == 0)
      for (int64_t step = picks + tid; step < item.picks; step += kRecomputeThreads) picked[step] = -1;
    if (picks == 0) continue;
    const int64_t first_row = entry * items.tokens + item.first;  // among all tokens
    float* mine = potential + first_row;
    __syncthreads();
    if (tid < kCachedRows) cache.token[tid] = -1;
    if (tid == 0) cache.oldest = 0;

    Key best = kNoKey;
    for (int64_t i = first_token + tid; i < item.tokens; i += token_step) {
      const float distance = mine[i];
      mine[i] = distance < kInfinity ? Rule::start() : kLastResort;
      best = lower(best, make_key(distance, static_cast<uint32_t>(i)));
    }
    best = group_lowest(best);
    int64_t pick = first_pick(item, best);
    for (int64_t step = 0;; ++step) {
      if (rank == 0 && tid == 0) picked[step] = pick;
      if (step + 1 == picks) break;
      if (tid < 32) {
        // The keys of the first turn are distances to the mean and say nothing about the picks to come.
        const int64_t left = step == 0 ? 1 : picks - 1 - step;
        plan_rows(cache, cached_rows, static_cast<int>(pick), best, warp_keys, group_warps,
                  left < lookahead ? static_cast<int>(left) : lookahead);
      }
      __syncthreads();
      if (cache.count)
        compute_rows(rows, entry, item, aligned, rule, cache, first_token, token_step, cached + first_row, all_tokens(items), point);
      __syncthreads();
      if (tid == 0) cache.token[cache.row] = -1;  // used once
      const float* weight = cached + cache.row * all_tokens(items) + first_row;
      best = kNoKey;
      for (int64_t i = first_token + tid; i < item.tokens; i += token_step) {
        const float value = i == pick ? kInfinity : Rule::add(mine[i], weight[i]);
        mine[i] = value;
        best = lower(best, make_key(value, static_cast<uint32_t>(i)));
      }
      best = group_lowest(best);
      pick = key_index(best);
    }
  }
}

// ---- plan and launch ----

// How a selection is laid out on the device; everything follows from the shapes, the element type and the device.
struct SelectionPlan {
  bool stored;          // weights of all pairs in memory
  int mma_tile;         // stored: the tiles of sqdist_mma.cuh, or 0 where pairwise_sqdist.cuh computes
  int64_t entries;      // stored: batch entries whose weights are held at a time
  int groups, group_blocks;  // recomputed: blocks of the cooperative launch
  int lookahead;             // recomputed: rows computed in one pass
  int cached_rows;           // recomputed: rows kept, in no more memory than the features where that is more than a few
};

template <class scalar_t, class Rule>
SelectionPlan plan_selection(const Rows<scalar_t>& rows, const Items& items, int64_t matrix_tokens = kMatrixTokens,
                             int lookahead = kLookahead) {
  const int64_t entries = items.packed() ? 1 : items.count;
  if (items.tokens <= matrix_tokens) {
    const int64_t fit = kMatrixFloats / (items.tokens * items.tokens);
    const int64_t held = entries < fit ? entries : fit;
    return {true, mma_fits(rows, items) ? mma_tile(items.tokens, held) : 0, held, 0, 0, 0, 0};
  }
  const int resident = max_resident_blocks(select_recomputed_kernel<scalar_t, Rule>, kRecomputeThreads, 0);
  if (resident == 0) return {};
  const int groups = static_cast<int>(items.count < resident ? items.count : resident);
  const int64_t useful = ceil_div(items.tokens, kRecomputeThreads);
  const int blocks = static_cast<int>(useful < resident / groups ? useful : resident / groups);
  const int64_t affordable = rows.channels * sizeof(scalar_t) / sizeof(float);
  const int cached_rows = affordable > kCachedRows ? kCachedRows : affordable < kLookahead ? kLookahead : static_cast<int>(affordable);
  return {false, 0, 0, groups, blocks, lookahead, cached_rows};
}

// Device memory of one selection besides its input and output. `allocate(bytes)` is called once for each part in use; parts that
// are not stay null.
struct SelectionScratch {
  TokenStats stats{};
  float* weights = nullptr;     // stored: (entries, tokens, tokens); recomputed: (cached_rows, all tokens)
  unsigned* marks = nullptr;    // stored on tensor cores: (entries, tiles, tiles)
  Key* keys = nullptr;          // recomputed: (groups, 2, blocks and warps)
  unsigned* arrived = nullptr;  // recomputed: (groups)

  template <class Allocate>
  SelectionScratch(const SelectionPlan& plan, const Items& items, int64_t channels, Allocate&& allocate) {
    const auto take = [&](auto*& part, int64_t count) {
      if (count) part = static_cast<std::remove_reference_t<decltype(part)>>(allocate(count * static_cast<int64_t>(sizeof(*part))));
    };
    const int64_t chunks = items.anchor ? 0 : all_chunks(items), tiles = mark_tiles(items.tokens);
    take(stats.mean_sqdist, all_tokens(items));
    take(stats.norms, plan.mma_tile ? all_tokens(items) : 0);
    take(stats.sums, chunks * channels);
    take(stats.counts, chunks);
    take(stats.mean, items.anchor ? 0 : items.count * channels);
    take(weights, plan.stored ? plan.entries * items.tokens * items.tokens : plan.cached_rows * all_tokens(items));
    take(marks, plan.mma_tile ? plan.entries * tiles * tiles : 0);
    take(keys, 2 * static_cast<int64_t>(plan.groups) * plan.group_blocks * (1 + kRecomputeWarps));
    take(arrived, plan.groups);
  }
};

template <class scalar_t, class Rule>
cudaError_t launch_selection(const Rows<scalar_t>& rows, const Items& items, const SelectionPlan& plan, const SelectionScratch& scratch,
                             Rule rule, int64_t* out, cudaStream_t stream) {
  cudaError_t error = cudaSuccess;
  // Places that no item's budget covers would otherwise stay unwritten; -1 is all bits set.
  if (items.packed()) error = cudaMemsetAsync(out, 0xff, items.picks * sizeof(int64_t), stream);
  if (error == cudaSuccess) error = launch_token_stats(rows, items, scratch.stats, stream);
  if (error != cudaSuccess) return error;

  if (!plan.stored) {
    if (plan.groups == 0) return cudaErrorLaunchOutOfResources;
    error = cudaMemsetAsync(scratch.arrived, 0, plan.groups * sizeof(unsigned), stream);
    if (error != cudaSuccess) return error;
    const Launch shape{dim3(plan.groups * plan.group_blocks), dim3(kRecomputeThreads), 0, 1, true, stream};
    return launch(select_recomputed_kernel<scalar_t, Rule>, shape, rows, items, rows_aligned(rows), plan.group_blocks, plan.cached_rows,
                  plan.lookahead, rule, scratch.stats.mean_sqdist, scratch.weights, scratch.keys, scratch.arrived, out);
  }
  const auto weigh = [&](int64_t first, int64_t entries) {
    const StoreWeight<Rule> store{rule};
    if constexpr (sizeof(scalar_t) == 2) {
      if (plan.mma_tile)
        return launch_sqdist_mma(rows, items, first, entries, plan.mma_tile, scratch.stats.norms, store, scratch.marks, scratch.weights, stream);
    }
    return launch_sqdist_tiles(rows, items, first, entries, store, scratch.weights, stream);
  };
  const auto select = [&](auto kernel, int64_t tokens_per_thread, int64_t first, int64_t count) {
    const auto threads = static_cast<unsigned>(ceil_div(ceil_div(items.tokens, tokens_per_thread), 32) * 32);
    const Launch shape{dim3(static_cast<unsigned>(count)), dim3(threads), 0, 1, false, stream};
    return launch(kernel, shape, items, first, scratch.weights, scratch.stats.mean_sqdist, rule, out);
  };
  const int64_t entries = items.packed() ? 1 : items.count;
  for (int64_t first = 0; first < entries; first += plan.entries) {
    const int64_t held = entries - first < plan.entries ? entries - first : plan.entries;
    const int64_t count = items.packed() ? items.count : held;
    error = weigh(first, held);
    if (error != cudaSuccess) return error;
    // As many threads as tokens up to 1024: the fewer tokens a thread holds, the shorter the chain from pick to pick.
    if (items.tokens <= 1024) error = select(select_stored_kernel<Rule, 1>, 1, first, count);
    else if (items.tokens <= 2048) error = select(select_stored_kernel<Rule, 2>, 2, first, count);
    else if (items.tokens <= 4096) error = select(select_stored_kernel<Rule, 4>, 4, first, count);
    else error = select(select_stored_kernel<Rule, 8>, 8, first, count);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

#ifdef STS_KERNEL_TABLE
// For tests: padded where cu_seqlens is null, else packed with tokens = T and k = total_k. Items of at most matrix_tokens tokens go
// through stored weights. Every part of the scratch is an allocation of its own, filled with NaN.
template <class scalar_t>
cudaError_t launch_repulsion_select(const scalar_t* features, int64_t batch, int64_t tokens, int64_t channels, int64_t batch_stride,
                                    int64_t row_stride, int64_t k, float eps, const int64_t* anchor, const int64_t* num_tokens,
                                    const int64_t* cu_seqlens, const int64_t* cu_budgets, int64_t matrix_tokens, int lookahead,
                                    int64_t* out, cudaStream_t stream) {
  const Rows<scalar_t> rows{features, batch_stride, row_stride, static_cast<int>(channels)};
  const Items items{batch, tokens, k, num_tokens, cu_seqlens, cu_budgets, anchor};
  const SelectionPlan plan = plan_selection<scalar_t, Repulsion>(rows, items, matrix_tokens, lookahead);
  void* parts[16];
  int count = 0;
  const SelectionScratch scratch(plan, items, channels, [&](int64_t bytes) -> void* {
    parts[count] = nullptr;
    if (cudaMalloc(&parts[count], bytes) != cudaSuccess || cudaMemsetAsync(parts[count], 0xff, bytes, stream) != cudaSuccess) return nullptr;
    return parts[count++];
  });
  cudaError_t error = launch_selection(rows, items, plan, scratch, Repulsion{eps}, out, stream);
  if (error == cudaSuccess) error = cudaStreamSynchronize(stream);
  while (count) cudaFree(parts[--count]);
  return error;
}
// A field of the plan for features of 16-byte aligned rows.
template <class scalar_t>
int64_t selection_plan(int64_t batch, int64_t tokens, int64_t channels, bool packed, int field) {
  const int64_t offsets[1] = {};
  const Rows<scalar_t> rows{nullptr, tokens * channels, channels, static_cast<int>(channels)};
  const Items items{batch, tokens, tokens, nullptr, packed ? offsets : nullptr, nullptr, nullptr};
  const SelectionPlan plan = plan_selection<scalar_t, Repulsion>(rows, items);
  const int64_t fields[] = {plan.stored, plan.mma_tile, plan.entries, plan.groups, plan.group_blocks, plan.lookahead,
                            plan.cached_rows};
  return fields[field];
}
#endif

STS_KERNEL(selection_plan_float32, selection_plan<float>);
STS_KERNEL(selection_plan_bfloat16, selection_plan<__nv_bfloat16>);
STS_KERNEL(repulsion_select_float32, launch_repulsion_select<float>);
STS_KERNEL(repulsion_select_float16, launch_repulsion_select<__half>);
STS_KERNEL(repulsion_select_bfloat16, launch_repulsion_select<__nv_bfloat16>);

}  // namespace sts
