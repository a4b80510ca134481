// Duplicate removal by VisPruner: all rounds of all items in one launch, over stored distances of all listed tokens.
//
// What: each item has a list of tokens. A round finds, for each token at an even position, its smallest distance to a token at an odd
//   position. It removes at most `step` even tokens, those with the smallest of these distances. The next list has the remaining even
//   tokens by ascending distance, then the odd tokens. Distances are of unit rows: 2 - 2 cosine.
// Chosen when: always. Lists are short enough that the distances of all pairs can be stored.
// Steps: (1) the list: finite tokens first, others only if too few are finite. Then each round: (2) the smallest distance of each even
//   token, a warp per token; (3) its rank among the even tokens, by counting. The rank is its position in the next list, unless removed.
// Synchronisation: a group of resident blocks takes an item, with a group barrier after each step. A step reads what the previous step
//   wrote. The list is double-buffered.
#pragma once
#include "sqdist_tiles.cuh"
#include "unit_rows.cuh"

namespace sts {

constexpr int kDedupThreads = 512, kDedupWarps = kDedupThreads / 32;
constexpr int64_t kDedupFloats = int64_t(1) << 26;  // distances stored at a time: 256 MiB

// length: positions before the first -1. finite: those whose row is not invalid. valid: every value of the list is -1 or a token.
struct ListCounts {
  int length, finite;
  bool valid;
};

// By one warp: counts the list. Writes the positions of its finite tokens to `list`, unless null, and then those of its invalid rows: a
// stable partition by ballot.
__device__ __forceinline__ ListCounts read_list(const int64_t* listed, const uint8_t* state, int count, int64_t tokens, int* list) {
  const int lane = threadIdx.x % 32;
  ListCounts counts{count, 0, true};
  for (int begin = 0; begin < count; begin += 32) {
    const int64_t token = begin + lane < count ? listed[begin + lane] : 0;
    if (__any_sync(kFullWarp, token < -1 || token >= tokens)) counts.valid = false;
    const unsigned end_mask = __ballot_sync(kFullWarp, token == -1);
    if (end_mask && counts.length == count) counts.length = begin + __ffs(static_cast<int>(end_mask)) - 1;
  }
  for (int begin = 0; begin < counts.length; begin += 32)
    counts.finite += __popc(__ballot_sync(kFullWarp, begin + lane < counts.length && state[begin + lane] != kInvalidRow));
  if (!list) return counts;
  int valid_end = 0, invalid_end = counts.finite;
  for (int begin = 0; begin < counts.length; begin += 32) {
    const int position = begin + lane;
    const bool in_list = position < counts.length, is_valid = in_list && state[position] != kInvalidRow;
    const unsigned valid_mask = __ballot_sync(kFullWarp, is_valid), invalid_mask = __ballot_sync(kFullWarp, in_list && !is_valid),
                   lower_lanes = (1u << lane) - 1;
    if (is_valid)
      list[valid_end + __popc(valid_mask & lower_lanes)] = position;
    else if (in_list)
      list[invalid_end + __popc(invalid_mask & lower_lanes)] = position;
    valid_end += __popc(valid_mask);
    invalid_end += __popc(invalid_mask);
  }
  return counts;
}

// Entries [first, first + entries) of the batch; groups of `group_blocks` resident blocks stride over them.
//   listed (batch, count), state (batch, count) of unit_rows_kernel, sqdist (entries, count, count)
//   lists (groups, 2, count): positions in `listed`, double-buffered; closest (groups, count): smallest distance of each even token
//   arrived (groups): counters of the group barriers, 0 before the launch; out (batch, keep)
static __global__ void __launch_bounds__(kDedupThreads, 2)
    dedup_select_kernel(int64_t first, int64_t entries, int64_t tokens, int count, int keep, int step, int group_blocks,
                        const int64_t* listed, const uint8_t* state, const float* sqdist, int* lists, float* closest, unsigned* arrived,
                        int64_t* out) {
  __shared__ ListCounts counts;
  const int group = blockIdx.x / group_blocks, groups = gridDim.x / group_blocks, block_in_group = blockIdx.x % group_blocks;
  const int tid = threadIdx.x, lane = tid % 32;
  const int group_warp = block_in_group * kDedupWarps + tid / 32, group_warps = group_blocks * kDedupWarps;
  GroupBarrier barrier(arrived + group, group_blocks);
  int *list = lists + group * 2 * static_cast<int64_t>(count), *next = list + count;
  closest += group * static_cast<int64_t>(count);

  for (int64_t entry = group; entry < entries; entry += groups) {
    const int64_t* const token = listed + (first + entry) * count;
    const uint8_t* const row_state = state + (first + entry) * count;
    const float* const matrix = sqdist + entry * count * count;

    // (1) the list
    __syncthreads();  // all threads have read the counts of the previous item
    if (tid < 32) {
      const ListCounts found = read_list(token, row_state, count, tokens, block_in_group == 0 ? list : nullptr);
      if (lane == 0) counts = found;
    }
    barrier.sync();
    int remaining = counts.finite > keep ? counts.finite : counts.length < keep ? counts.length : keep;
    if (!counts.valid) remaining = 0;

    while (remaining > keep) {
      const int evens = (remaining + 1) / 2, odds = remaining / 2, max_removed = remaining - keep < evens ? remaining - keep : evens,
                removed = step < max_removed ? step : max_removed;
      // (2) the smallest distance of each even token
      for (int e = group_warp; e < evens; e += group_warps) {
        const int row = list[2 * e];
        const bool zero = row_state[row] == kZeroRow;
        const float* const distances = matrix + static_cast<int64_t>(row) * count;
        float min_distance = kInfinity;
#pragma unroll 4
        for (int o = lane; o < odds; o += 32) {
          const int other = list[2 * o + 1];
          min_distance = fminf(min_distance, zero || row_state[other] == kZeroRow ? 2.f : distances[other]);  // a zero row has cosine 0
        }
        min_distance = lanes_min<1, 32>(min_distance);
        if (lane == 0) closest[e] = min_distance;
      }
      barrier.sync();
      // (3) rank of each even token; ties: the order of the list
      for (int e = group_warp; e < evens; e += group_warps) {
        const float distance = closest[e];
        unsigned rank = 0;
#pragma unroll 4
        for (int f = lane; f < evens; f += 32) rank += closest[f] < distance || (closest[f] == distance && f < e);
        rank = __reduce_add_sync(kFullWarp, rank);
        if (lane == 0 && static_cast<int>(rank) >= removed) next[rank - removed] = list[2 * e];
      }
      for (int o = block_in_group * kDedupThreads + tid; o < odds; o += group_blocks * kDedupThreads)
        next[evens - removed + o] = list[2 * o + 1];
      barrier.sync();
      int* const previous = list;
      list = next;
      next = previous;
      remaining -= removed;
    }
    if (block_in_group == 0)
      for (int i = tid; i < keep; i += kDedupThreads) out[(first + entry) * keep + i] = i < remaining ? token[list[i]] : -1;
  }
}

// ---- plan and launch ----

struct DedupPlan {
  int64_t entries;           // batch entries whose distances are stored at a time
  int groups, group_blocks;  // of the launch for these entries
};

inline DedupPlan plan_dedup(int64_t batch, int64_t count) {
  const int64_t max_entries = kDedupFloats / (count * count), entries = batch < max_entries ? batch : max_entries;
  const int resident = max_resident_blocks(dedup_select_kernel, kDedupThreads, 0);
  if (resident == 0) return {entries, 0, 0};
  const int groups = static_cast<int>(entries < resident ? entries : resident);
  const int64_t max_useful = ceil_div(count, 2 * kDedupWarps);  // a warp per even token
  return {entries, groups, static_cast<int>(max_useful < resident / groups ? max_useful : resident / groups)};
}

// Scratch in device memory; shapes as at the kernel. allocate(bytes) is called once per array.
struct DedupScratch {
  float *unit, *sqdist, *closest;
  uint8_t* state;
  int* lists;
  unsigned* arrived;

  template <class Allocate>
  DedupScratch(const DedupPlan& plan, int64_t batch, int64_t count, int64_t channels, Allocate&& allocate) {
    take_array(unit, batch * count * unit_pitch(channels), allocate);
    take_array(sqdist, plan.entries * count * count, allocate);
    take_array(closest, plan.groups * count, allocate);
    take_array(state, batch * count, allocate);
    take_array(lists, plan.groups * 2 * count, allocate);
    take_array(arrived, plan.groups, allocate);
  }
};

// listed: (batch, count), contiguous. out: (batch, keep).
template <class scalar_t>
cudaError_t launch_dedup(const Rows<scalar_t>& rows, int64_t batch, int64_t tokens, const int64_t* listed, int64_t count, int64_t keep,
                         int64_t step, const DedupPlan& plan, const DedupScratch& scratch, int64_t* out, cudaStream_t stream) {
  if (plan.groups == 0) return cudaErrorLaunchOutOfResources;
  cudaError_t error = launch_unit_rows(rows, batch, tokens, count, listed, scratch.unit, scratch.state, stream);
  if (error != cudaSuccess) return error;
  const int64_t pitch = unit_pitch(rows.channels);
  const Rows<float> units{scratch.unit, count * pitch, pitch, static_cast<int>(pitch)};
  for (int64_t first = 0; first < batch; first += plan.entries) {
    const int64_t entries = batch - first < plan.entries ? batch - first : plan.entries;
    error = launch_sqdist_tiles(units, count, first, entries, StoreSqdist{}, scratch.sqdist, stream);
    if (error == cudaSuccess) error = cudaMemsetAsync(scratch.arrived, 0, plan.groups * sizeof(unsigned), stream);
    if (error != cudaSuccess) return error;
    const Launch shape{dim3(plan.groups * plan.group_blocks), dim3(kDedupThreads), 0, 1, true, stream};
    error = launch(dedup_select_kernel, shape, first, entries, tokens, static_cast<int>(count), static_cast<int>(keep),
                   static_cast<int>(step < count ? step : count), plan.group_blocks, listed, scratch.state, scratch.sqdist, scratch.lists,
                   scratch.closest, scratch.arrived, out);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace sts
