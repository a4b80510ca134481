// VisPruner's rounds: all rounds of all items in one launch, after the distances of all listed tokens.
// What: a list of tokens. A round takes of each at an even place its smallest distance to one at an odd place, removes the even ones with
//   the smallest, and lists the others by descending distance rank before the odd ones. Distances are those of unit rows, 2 - 2 cosine.
// Chosen when: always. Lists are short enough that the distances of all pairs can be stored.
// Steps: (1) the list: finite tokens first, the other ones only where too few are finite; (2) the smallest distance of each even
//   token, a warp a token; (3) its rank among the even ones, by counting those before it: its place in the next list, if it stays.
// Synchronisation: a group of resident blocks takes an item, with a barrier of the group after each step. The list and the distances
//   that a step reads are written in the step before. Lists alternate between two halves.
#pragma once
#include "sqdist_tiles.cuh"
#include "unit_rows.cuh"

namespace sts {

constexpr int kDedupThreads = 512, kDedupWarps = kDedupThreads / 32;
constexpr int64_t kDedupFloats = int64_t(1) << 26;  // distances held at a time: 256 MiB

// What a list has: places up to the first -1, finite tokens among them, and whether every value makes sense.
struct ListCounts {
  int length, finite;
  bool valid;
};

// By a warp: counts the list, and writes its finite places to `list` if it is not null; the places of spoiled tokens follow.
__device__ __forceinline__ ListCounts read_list(const int64_t* listed, const uint8_t* state, int count, int64_t tokens, int* list) {
  const int lane = threadIdx.x % 32;
  ListCounts counts{count, 0, true};
  for (int begin = 0; begin < count; begin += 32) {
    const int64_t token = begin + lane < count ? listed[begin + lane] : 0;
    if (__any_sync(kFullWarp, token < -1 || token >= tokens)) counts.valid = false;
    const unsigned ends = __ballot_sync(kFullWarp, token == -1);
    if (ends && counts.length == count) counts.length = begin + __ffs(static_cast<int>(ends)) - 1;
  }
  for (int begin = 0; begin < counts.length; begin += 32)
    counts.finite += __popc(__ballot_sync(kFullWarp, begin + lane < counts.length && state[begin + lane] != kSpoiledRow));
  if (!list) return counts;
  int finite = 0, spoiled = counts.finite;
  for (int begin = 0; begin < counts.length; begin += 32) {
    const int place = begin + lane;
    const bool there = place < counts.length, good = there && state[place] != kSpoiledRow;
    const unsigned goods = __ballot_sync(kFullWarp, good), bads = __ballot_sync(kFullWarp, there && !good), below = (1u << lane) - 1;
    if (good)
      list[finite + __popc(goods & below)] = place;
    else if (there)
      list[spoiled + __popc(bads & below)] = place;
    finite += __popc(goods);
    spoiled += __popc(bads);
  }
  return counts;
}

// Entries [first, first + entries) of the batch; groups of `group_blocks` resident blocks take them in turn. listed: (batch, count).
// state: (batch, count), as unit_rows_kernel leaves it. sqdist: (entries, count, count). lists: (groups, 2, count). closest:
// (groups, count). arrived: a zero for every group. out: (batch, keep).
static __global__ void __launch_bounds__(kDedupThreads, 2)
    dedup_select_kernel(int64_t first, int64_t entries, int64_t tokens, int count, int keep, int step, int group_blocks,
                        const int64_t* listed, const uint8_t* state, const float* sqdist, int* lists, float* closest, unsigned* arrived,
                        int64_t* out) {
  __shared__ ListCounts counts;
  const int group = blockIdx.x / group_blocks, groups = gridDim.x / group_blocks, rank = blockIdx.x % group_blocks;
  const int tid = threadIdx.x, lane = tid % 32;
  const int group_warp = rank * kDedupWarps + tid / 32, group_warps = group_blocks * kDedupWarps;
  GroupBarrier barrier(arrived + group, group_blocks);
  int *list = lists + group * 2 * static_cast<int64_t>(count), *next = list + count;
  closest += group * static_cast<int64_t>(count);

  for (int64_t entry = group; entry < entries; entry += groups) {
    const int64_t* const token = listed + (first + entry) * count;
    const uint8_t* const mine = state + (first + entry) * count;
    const float* const matrix = sqdist + entry * count * count;

    // (1) the list
    __syncthreads();  // the counts of the item before have been read
    if (tid < 32) {
      const ListCounts found = read_list(token, mine, count, tokens, rank == 0 ? list : nullptr);
      if (lane == 0) counts = found;
    }
    barrier.sync();
    int left = counts.finite > keep ? counts.finite : counts.length < keep ? counts.length : keep;
    if (!counts.valid) left = 0;

    while (left > keep) {
      const int evens = (left + 1) / 2, odds = left / 2, most = left - keep < evens ? left - keep : evens,
                remove = step < most ? step : most;
      // (2) the smallest distance of each even token
      for (int e = group_warp; e < evens; e += group_warps) {
        const int row = list[2 * e];
        const bool zero = mine[row] == kZeroRow;
        const float* const distances = matrix + static_cast<int64_t>(row) * count;
        float least = kInfinity;
#pragma unroll 4
        for (int o = lane; o < odds; o += 32) {
          const int other = list[2 * o + 1];
          least = fminf(least, zero || mine[other] == kZeroRow ? 2.f : distances[other]);  // a zero row has cosine 0
        }
        least = lanes_lowest<1, 32>(least);
        if (lane == 0) closest[e] = least;
      }
      barrier.sync();
      // (3) its rank: equal distances count in the order of the list
      for (int e = group_warp; e < evens; e += group_warps) {
        const float own = closest[e];
        unsigned before = 0;
#pragma unroll 4
        for (int f = lane; f < evens; f += 32) before += closest[f] < own || (closest[f] == own && f < e);
        before = __reduce_add_sync(kFullWarp, before);
        if (lane == 0 && static_cast<int>(before) >= remove) next[before - remove] = list[2 * e];
      }
      for (int o = rank * kDedupThreads + tid; o < odds; o += group_blocks * kDedupThreads) next[evens - remove + o] = list[2 * o + 1];
      barrier.sync();
      int* const last = list;
      list = next;
      next = last;
      left -= remove;
    }
    if (rank == 0)
      for (int i = tid; i < keep; i += kDedupThreads) out[(first + entry) * keep + i] = i < left ? token[list[i]] : -1;
  }
}

// ---- plan and launch ----

struct DedupPlan {
  int64_t entries;           // batch entries whose distances are held at a time
  int groups, group_blocks;  // of the launch for so many
};

inline DedupPlan plan_dedup(int64_t batch, int64_t count) {
  const int64_t fit = kDedupFloats / (count * count), entries = batch < fit ? batch : fit;
  const int resident = max_resident_blocks(dedup_select_kernel, kDedupThreads, 0);
  if (resident == 0) return {entries, 0, 0};
  const int groups = static_cast<int>(entries < resident ? entries : resident);
  const int64_t useful = ceil_div(count, 2 * kDedupWarps);  // a warp for each even token
  return {entries, groups, static_cast<int>(useful < resident / groups ? useful : resident / groups)};
}

// Device memory besides input and output. `allocate(bytes)` is called once for each part.
struct DedupScratch {
  float *unit, *sqdist, *closest;
  uint8_t* state;
  int* lists;
  unsigned* arrived;

  template <class Allocate>
  DedupScratch(const DedupPlan& plan, int64_t batch, int64_t count, int64_t channels, Allocate&& allocate) {
    const auto take = [&](auto*& part, int64_t size) {
      part = static_cast<std::remove_reference_t<decltype(part)>>(allocate(size * static_cast<int64_t>(sizeof(*part))));
    };
    take(unit, batch * count * unit_pitch(channels));
    take(sqdist, plan.entries * count * count);
    take(closest, plan.groups * count);
    take(state, batch * count);
    take(lists, plan.groups * 2 * count);
    take(arrived, plan.groups);
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
  const Items items{batch, count, 0, nullptr, nullptr, nullptr, nullptr};
  for (int64_t first = 0; first < batch; first += plan.entries) {
    const int64_t entries = batch - first < plan.entries ? batch - first : plan.entries;
    error = launch_sqdist_tiles(units, items, first, entries, StoreSqdist{}, items.tokens, scratch.sqdist, stream);
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
