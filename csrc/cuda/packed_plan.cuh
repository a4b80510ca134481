// Packed items on a GPU, looked through once: what the kernels that follow work on, whatever numbers the offsets hold.
//
// What: one block reads offsets, budgets and anchors and writes, for every item,
//   where it is, with rows and places of its own: items lie one behind the other, and what overlaps an item before it is empty;
//   where its weights begin. The weights are block-diagonal: (n, matrix_pitch(n)) for an item of n tokens, one item after another;
//   how many tiles of pairs the items before it have: a tile's item is found by search.
//   Items whose weights do not fit in memory together are in several waves: runs of items, as long as they fit.
// Chosen when: the batch is packed. Sums of squares cannot be known on the host, which knows bounds alone (PackedShape).
// Steps, for kPlanThreads items at a time:
//   (1) an item's rows and places are its own if no item before ends behind their begin: a maximum scan;
//   (2) sums of the floats, tiles and large items before each: a sum scan;
//   (3) waves: the first item that does not fit opens the next.
// Synchronisation: one block; __syncthreads in the scans, and around what the thread of a wave's first item tells the others.
#pragma once
#include "rows.cuh"

namespace sts {

constexpr int kPlanThreads = 256;
constexpr int kPlanWarps = kPlanThreads / 32;

// Where an item's weights begin in the memory of its wave, in floats, or -1 where it is too long for weights; and how many tiles the items
// before it have.
struct PackedMatrix {
  int64_t offset, first_tile;
};

// The first item of a wave, and its first tile.
struct PackedWave {
  int64_t item, tile;
};

// Device memory. Items that are no use to a selection have no tokens and no picks; yet `first` never falls.
struct PackedPlan {
  Item* items;             // (items)
  PackedMatrix* matrices;  // (items)
  PackedWave* waves;       // (waves + 1): ends with (items, all tiles)
  int* large;              // (1 + most_large): how many items are too long for weights, and which
};

// What the host knows of packed items.
struct PackedShape {
  int64_t stored_tokens;  // weights are stored for items of up to so many tokens
  int tile;               // side of a tile of pairs
  int64_t floats;         // of weights, of a wave at the most
  int64_t waves;          // at the most
  int64_t most_large;     // items whose weights are not stored, at the most
};

// most_floats: of a wave, unless a single item may need more.
inline PackedShape packed_shape(const Items& items, int64_t stored_tokens, int tile, int64_t most_floats) {
  const int64_t side = items.longest() < stored_tokens ? items.longest() : stored_tokens;
  const int64_t all = items.tokens * matrix_pitch(side), largest = side * matrix_pitch(side);
  const int64_t floats = all < most_floats ? all : most_floats < largest ? largest : most_floats;
  const int64_t large = items.longest() > stored_tokens ? items.tokens / (stored_tokens + 1) : 0;
  // The first item of a wave did not fit into the wave before: two waves in a row hold more than `floats`. And every wave has an item.
  const int64_t waves = floats > 0 ? 2 * ceil_div(all, floats) - 1 : 1;
  return {stored_tokens, tile, floats, waves < items.count ? waves : items.count, large < items.count ? large : items.count};
}

// Tiles of all items, at the most.
inline int64_t most_tiles(const Items& items, const PackedShape& shape) {
  const int64_t side = items.longest() < shape.stored_tokens ? items.longest() : shape.stored_tokens;
  return (items.tokens / shape.tile + items.count) * ceil_div(ceil_div(side, shape.tile) + 1, 2);
}

// By a block: op of `value` of all threads before this one and of `carry`, which gets op of all. Numbers are not negative.
template <int kCount, class Op>
__device__ __forceinline__ void scan_block(int64_t (&value)[kCount], int64_t (&carry)[kCount], int64_t (*partial)[kCount], const Op& op) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    int64_t whole = value[i];
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const int64_t before = __shfl_up_sync(kFullWarp, whole, step);
      if (lane >= step) whole = op(before, whole);
    }
    if (lane == 31) partial[warp][i] = whole;
    value[i] = __shfl_up_sync(kFullWarp, whole, 1);
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

template <class Unused = void>
__global__ void __launch_bounds__(kPlanThreads) plan_packed_kernel(Items items, PackedShape shape, PackedPlan plan) {
  __shared__ int64_t end_partial[kPlanWarps][2], sum_partial[kPlanWarps][3], opened_at;
  int64_t ends[2] = {};              // of rows and places so far
  int64_t sums[3] = {};              // floats, tiles, large items so far
  int64_t wave = 0, wave_begin = 0;  // the floats before it
  if (threadIdx.x == 0) plan.waves[0] = {0, 0};
  for (int64_t begin = 0; begin < items.count; begin += kPlanThreads) {
    const int64_t b = begin + threadIdx.x;
    Item item{};
    if (b < items.count) item = items[b];

    // (1)
    int64_t before[2] = {item.first + item.tokens, item.out + item.picks};
    scan_block(before, ends, end_partial, [](int64_t a, int64_t c) { return a > c ? a : c; });
    const bool own = item.valid && item.first >= before[0] && item.out >= before[1];
    if (!own) item.first = before[0];
    if (!own || item.picks == 0) item.tokens = item.picks = 0;

    // (2)
    const bool large = item.tokens > shape.stored_tokens;
    const bool weighed = !large && item.tokens > 1 && item.picks > 1;  // a single pick needs no weights
    const int64_t floats = weighed ? item.tokens * matrix_pitch(item.tokens) : 0, side = weighed ? ceil_div(item.tokens, shape.tile) : 0;
    int64_t sum[3] = {floats, side * (side + 1) / 2, large};
    scan_block(sum, sums, sum_partial, [](int64_t a, int64_t c) { return a + c; });
    if (b < items.count) plan.items[b] = item;
    if (large && sum[2] < shape.most_large) plan.large[1 + sum[2]] = static_cast<int>(b);

    // (3)
    int64_t offset = -1;
    for (;;) {
      const int fit = __syncthreads_count(sum[0] + floats - wave_begin <= shape.floats);  // of the first threads, as sums rise
      const int tid = static_cast<int>(threadIdx.x);
      if (offset < 0 && tid < fit) offset = sum[0] - wave_begin;
      if (fit == kPlanThreads) break;
      ++wave;
      if (tid == fit) {
        opened_at = sum[0];
        if (wave < shape.waves) plan.waves[wave] = {b, sum[1]};
      }
      __syncthreads();
      wave_begin = opened_at;
    }
    if (b < items.count) plan.matrices[b] = {large ? -1 : offset, sum[1]};
  }
  for (int64_t w = wave + 1 + threadIdx.x; w <= shape.waves; w += kPlanThreads) plan.waves[w] = {items.count, sums[1]};
  if (threadIdx.x == 0) plan.large[0] = static_cast<int>(sums[2] < shape.most_large ? sums[2] : shape.most_large);
}

inline cudaError_t launch_packed_plan(const Items& items, const PackedShape& shape, const PackedPlan& plan, cudaStream_t stream) {
  return launch(plan_packed_kernel<>, Launch{dim3(1), dim3(kPlanThreads), 0, 1, false, stream}, items, shape, plan);
}

// By a warp: the last number in [first, last) of which at_most(number) holds, as it does of `first` and of all numbers up to some.
template <class F>
__device__ __forceinline__ int64_t last_of(int64_t first, int64_t last, const F& at_most) {
  while (last - first > 1) {
    const int64_t step = ceil_div(last - first, 32), mine = first + threadIdx.x % 32 * step;
    const unsigned holds = __ballot_sync(kFullWarp, mine < last && at_most(mine)) | 1u;
    first += (31 - __clz(static_cast<int>(holds))) * step;
    last = first + step < last ? first + step : last;
  }
  return first;
}

// By a warp: which item, and which part of `size` tokens of it, is number `task` of packed_tasks(items, size). The part may be past the
// item's end.
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
