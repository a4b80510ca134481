// Stage 1 of STS: all picks of all items in one launch, after their distances.
//   up to kMatrixTokens tokens: the weights of all pairs are stored once, and one block per item runs the picks, with the
//     potentials in registers and one barrier a pick;
//   above: nothing N x N is stored. Groups of resident blocks take an item each, recompute the distances to every pick, and
//     agree on the next one through a barrier of the group.
// Both see the same bits for every distance, so they pick the same tokens.
#pragma once
#include "pairwise_sqdist.cuh"
#include "token_mean.cuh"

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

constexpr int kRecomputeThreads = 256;

// Groups of `group_blocks` resident blocks; group g takes items g, g + groups, ... `potential` holds the distances to the mean
// on entry. `lowest` has two slots for every block, `arrived` a zero for every group.
template <class scalar_t, class Rule>
__global__ void __launch_bounds__(kRecomputeThreads)
    select_recomputed_kernel(Rows<scalar_t> rows, Items items, bool aligned, int group_blocks, Rule rule, float* potential, Key* lowest,
                             unsigned* arrived, int64_t* out) {
  __shared__ Key partial[2][32];
  const int group = blockIdx.x / group_blocks, groups = gridDim.x / group_blocks, rank = blockIdx.x % group_blocks;
  const int64_t first_token = static_cast<int64_t>(rank) * kRecomputeThreads + threadIdx.x;
  const int64_t token_step = static_cast<int64_t>(group_blocks) * kRecomputeThreads;
  GroupBarrier barrier(arrived + group, group_blocks);
  Key* slots = lowest + static_cast<int64_t>(group) * group_blocks * 2;
  int turn = 0;
  // The lowest key of the group. Slots are taken in turns like `partial`.
  const auto group_lowest = [&](Key best) {
    best = block_lowest(best, partial, turn);
    Key* turn_slots = slots + (turn & 1) * group_blocks;
    ++turn;
    if (threadIdx.x == 0) turn_slots[rank] = best;
    barrier.sync();
    best = kNoKey;
    for (int r = threadIdx.x % 32; r < group_blocks; r += 32) best = lower(best, turn_slots[r]);
    return warp_lowest(best);
  };

  for (int64_t b = group; b < items.count; b += groups) {
    const Item item = items[b];
    const int64_t entry = items.packed() ? 0 : b, picks = item.picks < item.tokens ? item.picks : item.tokens;
    int64_t* picked = out + item.out;
    if (rank == 0)
      for (int64_t step = picks + threadIdx.x; step < item.picks; step += kRecomputeThreads) picked[step] = -1;
    if (picks == 0) continue;
    float* mine = potential + entry * items.tokens + item.first;

    Key best = kNoKey;
    for (int64_t i = first_token; i < item.tokens; i += token_step) {
      const float distance = mine[i];
      mine[i] = distance < kInfinity ? Rule::start() : kLastResort;
      best = lower(best, make_key(distance, static_cast<uint32_t>(i)));
    }
    int64_t pick = first_pick(item, group_lowest(best));
    for (int64_t step = 0;; ++step) {
      if (rank == 0 && threadIdx.x == 0) picked[step] = pick;
      if (step + 1 == picks) break;
      const scalar_t* picked_row = rows.row(entry, item.first + pick);
      best = kNoKey;
      for (int64_t i = first_token; i < item.tokens; i += token_step) {
        float value = mine[i];
        if (i == pick) value = kInfinity;
        else if (value < kInfinity)
          value = Rule::add(value, rule.weight(sqdist_of(rows.row(entry, item.first + i), picked_row, rows.channels, aligned)));
        mine[i] = value;
        best = lower(best, make_key(value, static_cast<uint32_t>(i)));
      }
      pick = key_index(group_lowest(best));
    }
  }
}

// How a selection is laid out on the device.
struct SelectionPlan {
  bool stored;            // weights of all pairs in memory
  int64_t entries;        // batch entries whose weights are held at a time
  int groups, group_blocks;  // recomputed: blocks of the cooperative launch

  int64_t matrix_floats(int64_t tokens) const { return stored ? entries * tokens * tokens : 0; }
  int64_t keys() const { return 2 * static_cast<int64_t>(groups) * group_blocks; }
};

template <class scalar_t, class Rule>
SelectionPlan plan_selection(const Items& items, int64_t matrix_tokens = kMatrixTokens) {
  const int64_t entries = items.packed() ? 1 : items.count;
  if (items.tokens <= matrix_tokens) {
    const int64_t fit = kMatrixFloats / (items.tokens * items.tokens);
    return {true, entries < fit ? entries : fit, 0, 0};
  }
  const int resident = max_resident_blocks(select_recomputed_kernel<scalar_t, Rule>, kRecomputeThreads, 0);
  if (resident == 0) return {false, 0, 0, 0};
  const int groups = static_cast<int>(items.count < resident ? items.count : resident);
  const int64_t useful = ceil_div(items.tokens, kRecomputeThreads);
  return {false, 0, groups, static_cast<int>(useful < resident / groups ? useful : resident / groups)};
}

// Device memory of one selection besides its input and output; sizes in elements. Parts a plan does not use may be null.
struct SelectionScratch {
  MeanScratch mean;
  float* weights;     // matrix_floats
  Key* lowest;        // keys
  unsigned* arrived;  // groups
};

template <class scalar_t, class Rule>
cudaError_t launch_selection(const Rows<scalar_t>& rows, const Items& items, const SelectionPlan& plan, const SelectionScratch& scratch,
                             Rule rule, int64_t* out, cudaStream_t stream) {
  cudaError_t error = cudaSuccess;
  // Places that no item's budget covers would otherwise stay unwritten; -1 is all bits set.
  if (items.packed()) error = cudaMemsetAsync(out, 0xff, items.picks * sizeof(int64_t), stream);
  if (error == cudaSuccess) error = launch_token_mean(rows, items, scratch.mean, stream);
  if (error != cudaSuccess) return error;

  if (!plan.stored) {
    if (plan.groups == 0) return cudaErrorLaunchOutOfResources;
    error = cudaMemsetAsync(scratch.arrived, 0, plan.groups * sizeof(unsigned), stream);
    if (error != cudaSuccess) return error;
    const Launch shape{dim3(plan.groups * plan.group_blocks), dim3(kRecomputeThreads), 0, 1, true, stream};
    return launch(select_recomputed_kernel<scalar_t, Rule>, shape, rows, items, rows_aligned(rows), plan.group_blocks, rule,
                  scratch.mean.sqdist, scratch.lowest, scratch.arrived, out);
  }
  const auto select = [&](auto kernel, int64_t tokens_per_thread, int64_t first, int64_t count) {
    const auto threads = static_cast<unsigned>(ceil_div(ceil_div(items.tokens, tokens_per_thread), 32) * 32);
    const Launch shape{dim3(static_cast<unsigned>(count)), dim3(threads), 0, 1, false, stream};
    return launch(kernel, shape, items, first, scratch.weights, scratch.mean.sqdist, rule, out);
  };
  const int64_t entries = items.packed() ? 1 : items.count;
  for (int64_t first = 0; first < entries; first += plan.entries) {
    const int64_t held = entries - first < plan.entries ? entries - first : plan.entries;
    const int64_t count = items.packed() ? items.count : held;
    error = launch_sqdist_tiles(rows, items, first, held, StoreWeight<Rule>{rule}, scratch.weights, stream);
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
// For tests, with the scratch as arrays: per_token (all tokens), sums (chunks, channels + 1) and mean (batch, channels) or null,
// weights (entries, tokens, tokens), keys (2, blocks) and arrived (blocks). Dense where cu_seqlens is null, else tokens = T and
// k = total_k. Items of at most matrix_tokens tokens go through stored weights.
template <class scalar_t>
cudaError_t launch_repulsion_select(const scalar_t* features, int64_t batch, int64_t tokens, int64_t channels, int64_t batch_stride,
                                    int64_t row_stride, int64_t k, float eps, const int64_t* anchor, const int64_t* num_tokens,
                                    const int64_t* cu_seqlens, const int64_t* cu_budgets, int64_t matrix_tokens, float* per_token,
                                    float* sums, float* mean, float* weights, uint64_t* keys, unsigned* arrived, int64_t* out,
                                    cudaStream_t stream) {
  const Rows<scalar_t> rows{features, batch_stride, row_stride, static_cast<int>(channels)};
  const Items items{batch, tokens, k, num_tokens, cu_seqlens, cu_budgets, anchor};
  MeanScratch mean_scratch{per_token, nullptr, nullptr, nullptr};
  if (!anchor) mean_scratch = {per_token, sums, sums + all_chunks(items) * channels, mean};
  return launch_selection(rows, items, plan_selection<scalar_t, Repulsion>(items, matrix_tokens),
                          {mean_scratch, weights, reinterpret_cast<Key*>(keys), arrived}, Repulsion{eps}, out, stream);
}
#endif

STS_KERNEL(repulsion_select_float32, launch_repulsion_select<float>);
STS_KERNEL(repulsion_select_float16, launch_repulsion_select<__half>);
STS_KERNEL(repulsion_select_bfloat16, launch_repulsion_select<__nv_bfloat16>);

}  // namespace sts
