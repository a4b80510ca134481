// Plan of a packed batch, computed on the device: ranges, matrix offsets and waves of the items. It is safe to use whatever cu_seqlens and
// cu_budgets hold.
//
// What: one block reads offsets, budgets and anchors, and writes for every item
//   - its range of rows and of output elements. Ranges ascend and are disjoint: an item that overlaps an item before it becomes empty;
//   - the offset of its matrix. Weights are block-diagonal: a matrix (n, matrix_pitch(n)) for an item of n tokens, one item after another;
//   - the number of tiles of pairs in the items before it. From a tile number its item is found by search.
//   A wave is a range of items whose matrices fit in memory together. The items of a wave that clusters may share are counted.
// Chosen when: the batch is packed. The host knows shapes but no offsets, so it knows bounds alone (PackedShape).
// Steps, for kPlanThreads items at a time, one per thread:
//   (1) prefix maximum of the ends: an item that begins before an earlier item ends becomes empty;
//   (2) prefix sums of the matrix floats, the tiles, the large items and those above kClusterFrom;
//   (3) waves: the first item whose matrix does not fit into the wave opens the next wave.
// Synchronisation: one block. __syncthreads in the scans, and before and after the thread of a wave's first item writes `opened_at`.
#pragma once
#include "rows.cuh"

namespace sts {

constexpr int kPlanThreads = 256;
constexpr int kPlanWarps = kPlanThreads / 32;
constexpr int64_t kClusterFrom = 1024;  // longer items with a matrix may be shared by a cluster (select_cluster.cuh)

// The matrix of weights of an item.
//   offset: floats from the begin of its wave; -1: the item is too long for a matrix
//   first_tile: tiles in all items before it
struct PackedMatrix {
  int64_t offset, first_tile;
};

// The first item of a wave, the first tile of that item, and the number of items before it that a cluster may share.
struct PackedWave {
  int64_t item, tile, shareable;
};

// The plan, in device memory. An item that is invalid, overlaps another or has no picks has no tokens and no picks.
// Invariant: items[b].first never decreases with b, empty items included: packed_task searches it.
struct PackedPlan {
  Item* items;             // (items)
  PackedMatrix* matrices;  // (items)
  PackedWave* waves;       // (waves + 1): empty waves and the end have the numbers of the whole batch
  int* large;              // (1 + most_large): the number of items that are too long for a matrix, then their indices
};

// Bounds of a plan that the host knows from the shapes.
struct PackedShape {
  int64_t stored_tokens;  // max tokens of an item with a matrix
  int tile;               // tokens along the side of a tile of pairs
  int64_t floats;         // max floats of the matrices of a wave
  int64_t waves;          // max waves
  int64_t most_large;     // max items without a matrix
};

// most_floats: the limit for PackedShape::floats, unless the largest possible matrix is larger.
inline PackedShape packed_shape(const Items& items, int64_t stored_tokens, int tile, int64_t most_floats) {
  const int64_t side = items.longest() < stored_tokens ? items.longest() : stored_tokens;
  const int64_t all = items.tokens * matrix_pitch(side), largest = side * matrix_pitch(side);
  const int64_t floats = all < most_floats ? all : most_floats < largest ? largest : most_floats;
  const int64_t large = items.longest() > stored_tokens ? items.tokens / (stored_tokens + 1) : 0;
  // The first item of a wave did not fit into the wave before: any two consecutive waves hold more than `floats` together. `all` bounds
  // the floats of all waves. Every wave has an item.
  const int64_t waves = floats > 0 ? 2 * ceil_div(all, floats) - 1 : 1;
  return {stored_tokens, tile, floats, waves < items.count ? waves : items.count, large < items.count ? large : items.count};
}

// Tiles of the upper triangle of side x side tiles, rounded up to an even number: clusters take two at a time (TriangleTile).
STS_HOST_DEVICE int64_t triangle_tiles(int64_t side) { return (side * (side + 1) / 2 + 1) / 2 * 2; }

// Max tiles of all items together. An item of n tokens has s = ceil(n / tile) tiles along a side, at most s * (s + 1) / 2 + 1 in all.
// The first product bounds the sum of s times (s + 1) / 2 of the longest item.
inline int64_t most_tiles(const Items& items, const PackedShape& shape) {
  const int64_t side = items.longest() < shape.stored_tokens ? items.longest() : shape.stored_tokens;
  return (items.tokens / shape.tile + items.count) * ceil_div(ceil_div(side, shape.tile) + 1, 2) + items.count;
}

// Exclusive scan by a block, of kCount numbers at once, starting from `carry`. value: in: of this thread; out: op of `carry` and of all
// threads before this one. carry: out: op of all. Numbers are at least 0: 0 is the identity of both ops, sum and maximum.
template <int kCount, class Op>
__device__ __forceinline__ void scan_block(int64_t (&value)[kCount], int64_t (&carry)[kCount], int64_t (*partial)[kCount], const Op& op) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    int64_t inclusive = value[i];
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const int64_t before = __shfl_up_sync(kFullWarp, inclusive, step);
      if (lane >= step) inclusive = op(before, inclusive);
    }
    if (lane == 31) partial[warp][i] = inclusive;
    value[i] = __shfl_up_sync(kFullWarp, inclusive, 1);
    if (lane == 0) value[i] = 0;
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    for (int w = 0; w < kPlanWarps; ++w) {
      if (w == warp) value[i] = op(carry[i], value[i]);
      carry[i] = op(carry[i], partial[w][i]);
    }
  }
  __syncthreads();  // all have read `partial` before the next scan
}

// One block. A template, so that several translation units may hold the definition.
template <class Unused = void>
__global__ void __launch_bounds__(kPlanThreads) plan_packed_kernel(Items items, PackedShape shape, PackedPlan plan) {
  __shared__ int64_t end_partial[kPlanWarps][2], sum_partial[kPlanWarps][4], opened_at;
  int64_t ends[2] = {};              // maximum end so far, of rows and of output elements
  int64_t sums[4] = {};              // floats, tiles, large items, shareable items so far
  int64_t wave = 0, wave_begin = 0;  // wave_begin: floats in all waves before `wave`
  if (threadIdx.x == 0) plan.waves[0] = {0, 0, 0};
  for (int64_t begin = 0; begin < items.count; begin += kPlanThreads) {
    const int64_t b = begin + threadIdx.x;
    Item item{};
    if (b < items.count) item = items[b];

    // (1) ranges
    int64_t before[2] = {item.first + item.tokens, item.out + item.picks};
    scan_block(before, ends, end_partial, [](int64_t a, int64_t c) { return a > c ? a : c; });
    const bool disjoint = item.valid && item.first >= before[0] && item.out >= before[1];
    if (!disjoint) item.first = before[0];
    if (!disjoint || item.picks == 0) item.tokens = item.picks = 0;

    // (2) prefix sums
    const bool large = item.tokens > shape.stored_tokens;
    const bool stored = !large && item.tokens > 1 && item.picks > 1;  // a single pick needs no weights
    const int64_t floats = stored ? item.tokens * matrix_pitch(item.tokens) : 0, side = stored ? ceil_div(item.tokens, shape.tile) : 0;
    int64_t sum[4] = {floats, triangle_tiles(side), large, stored && item.tokens > kClusterFrom};
    scan_block(sum, sums, sum_partial, [](int64_t a, int64_t c) { return a + c; });
    if (b < items.count) plan.items[b] = item;
    if (large && sum[2] < shape.most_large) plan.large[1 + sum[2]] = static_cast<int>(b);

    // (3) waves. Every iteration places the items that fit into the current wave. The first thread whose item does not fit opens the next.
    int64_t offset = -1;
    for (;;) {
      const int fit = __syncthreads_count(sum[0] + floats - wave_begin <= shape.floats);  // threads 0 .. fit - 1: sums ascend
      const int tid = static_cast<int>(threadIdx.x);
      if (offset < 0 && tid < fit) offset = sum[0] - wave_begin;
      if (fit == kPlanThreads) break;
      ++wave;
      if (tid == fit) {
        opened_at = sum[0];
        if (wave < shape.waves) plan.waves[wave] = {b, sum[1], sum[3]};
      }
      __syncthreads();
      wave_begin = opened_at;
    }
    if (b < items.count) plan.matrices[b] = {large ? -1 : offset, sum[1]};
  }
  for (int64_t w = wave + 1 + threadIdx.x; w <= shape.waves; w += kPlanThreads) plan.waves[w] = {items.count, sums[1], sums[3]};
  if (threadIdx.x == 0) plan.large[0] = static_cast<int>(sums[2] < shape.most_large ? sums[2] : shape.most_large);
}

inline cudaError_t launch_packed_plan(const Items& items, const PackedShape& shape, const PackedPlan& plan, cudaStream_t stream) {
  return launch(plan_packed_kernel<>, Launch{dim3(1), dim3(kPlanThreads), 0, 1, false, stream}, items, shape, plan);
}

// By a warp: the last number in [first, last) for which at_most holds, by 32-ary search. Invariant: at_most holds for `first`, and is
// monotone (true, then false).
template <class F>
__device__ __forceinline__ int64_t last_of(int64_t first, int64_t last, const F& at_most) {
  while (last - first > 1) {
    const int64_t step = ceil_div(last - first, 32), probe = first + threadIdx.x % 32 * step;
    const unsigned holds = __ballot_sync(kFullWarp, probe < last && at_most(probe)) | 1u;
    first += (31 - __clz(static_cast<int>(holds))) * step;
    last = first + step < last ? first + step : last;
  }
  return first;
}

// Tasks over a packed batch: parts of `size` tokens of an item. packed_tasks is their number, packed_task(task), by a warp, the item and
// the part. A part may be past the end of the item.
struct PackedTask {
  int64_t item, part;
};
STS_HOST_DEVICE int64_t packed_tasks(const Items& items, int size) { return items.tokens / size + items.count; }
__device__ __forceinline__ PackedTask packed_task(const Items& items, int size, int64_t task) {
  const auto first_task = [&](int64_t b) { return items.planned[b].first / size + b; };
  const int64_t b = last_of(0, items.count, [&](int64_t i) { return first_task(i) <= task; });
  return {b, task < first_task(b) ? items.tokens : task - first_task(b)};
}

}  // namespace sts
