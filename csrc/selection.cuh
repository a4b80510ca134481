// Greedy selection by any rule of selection_rule.h: all picks of all items in one launch, after their distances.
//   up to kMatrixTokens tokens: the weights of all pairs are stored once, and one block per item runs the picks (select_stored.cuh), or
//     a cluster of blocks where items are large and few (select_cluster.cuh);
//   above, and from half as many tokens on where few are picked: nothing N x N is stored, and all blocks work on one item, or a few
//     (select_swept.cuh).
#pragma once
#include "select_cluster.cuh"
#include "select_stored.cuh"
#include "select_swept.cuh"
#include "selection_plan.h"
#include "sqdist_wgmma.cuh"
#include "unit_rows.cuh"

namespace sts {

constexpr int64_t kMatrixFloats = int64_t(1) << 26;  // weights held at a time: 256 MiB, one item of kMatrixTokens
constexpr int64_t kFewPicks = 64;  // few: less than one of so many tokens
constexpr int64_t kClusterFrom = 1024;  // items of more tokens are shared by a cluster

// What is stored for a pair of tokens (stored_value); on the diagonal the potential of a token that is picked. least: null, or for all
// tokens the ordered bits of the smallest in each row.
template <class Rule>
struct StoreWeight {
  static constexpr float kCancellation = sts::kCancellation;
  static constexpr bool kThreeProducts = std::is_same_v<Rule, Repulsion>;  // of float32 rows, for which others want differences
  Rule rule;
  uint32_t* least;
  __device__ float operator()(float sqdist, bool diagonal) const { return diagonal ? kInfinity : stored_value(rule, sqdist); }
};

// ---- plan and launch ----

// How a selection is laid out on the device; everything follows from the shapes, the element type and the device.
struct SelectionPlan {
  int64_t element_bytes;  // of the features
  bool from_mean;       // the first pick may be the token nearest the mean
  bool stored;          // weights of all pairs in memory
  int mma_tile;         // tokens in a tile on tensor cores, or 0 where differences are taken
  bool wgmma;           // stored: those of Hopper
  int64_t entries;      // stored: batch entries whose weights are held at a time
  int item_blocks;      // stored: blocks that share an item, a cluster if more than one
  bool least;           // the cluster's bound grows by the smallest weight of each pick's row
  int groups, group_blocks;  // swept: blocks of the cooperative launch
  int lookahead;             // max picks per exchange (cluster) or sweep; 1: the plain loop, in one block where weights are stored
};

// f(kernel, its shared memory) for the kernel that sweeps.
template <class scalar_t, class Rule, class F>
auto with_swept_kernel(bool mma, const F& f) {
  if constexpr (sizeof(scalar_t) == 2) {
    if (mma) return f(select_swept_kernel<MmaSweep<scalar_t>, scalar_t, Rule>, MmaSweep<scalar_t>::kSharedBytes);
  }
  return f(select_swept_kernel<DifferenceSweep<scalar_t>, scalar_t, Rule>, DifferenceSweep<scalar_t>::kSharedBytes);
}

// Blocks that share each item, of which `at_once` are under way: as many as there are multiprocessors for, if items are large.
template <class Rule>
int stored_item_blocks(const Items& items, int64_t at_once) {
  if (items.tokens <= kClusterFrom * (items.packed() ? items.count : 1)) return 1;  // on average where packed
  const int multiprocessors = device_sm_count();
  for (int blocks = 8; blocks >= 4; blocks /= 2) {
    if (at_once * blocks > multiprocessors) continue;
    const Launch shape = cluster_launch(items.tokens, at_once, blocks, nullptr);
    if (with_cluster_kernel<Rule>(items.tokens, [&](auto* kernel) { return clusters_fit(kernel, shape); })) return blocks;
  }
  return 1;
}

template <class scalar_t, class Rule>
SelectionPlan plan_selection(const Rows<scalar_t>& rows, const Items& items, int64_t matrix_tokens = kMatrixTokens,
                             int lookahead = kSweepPoints, bool wgmma = true) {
  const int64_t entries = items.packed() ? 1 : items.count;
  wgmma = wgmma && wgmma_serves<scalar_t, StoreWeight<Rule>>(items);
  const bool mma = mma_fits(rows, items), from_mean = Rule::kFromMean && !items.anchor;
  // Both kernels take the same bits for a distance by differences, so that the picks do not depend on how many they are. On tensor
  // cores they do not, where a pair is repaired.
  const bool few = !mma && !wgmma && !items.packed() && items.picks * kFewPicks < items.tokens;
  if (items.tokens <= (few ? matrix_tokens / 2 : matrix_tokens)) {
    const int64_t fit = kMatrixFloats / (items.tokens * matrix_pitch(items.tokens));
    const int64_t held = entries < fit ? entries : fit;
    const int64_t at_once = items.packed() ? items.count : held;
    const int item_blocks = lookahead > 1 ? stored_item_blocks<Rule>(items, at_once) : 1;
    const int tile = wgmma ? wgmma_tile(items.tokens, held) : mma ? mma_tile(items.tokens, held) : 0;
    return {sizeof(scalar_t), from_mean, true, tile, wgmma, held, item_blocks, kOfDistance<Rule>, 0, 0, lookahead};
  }
  const int resident = with_swept_kernel<scalar_t, Rule>(
      mma, [](auto* kernel, size_t shared_bytes) { return max_resident_blocks(kernel, kSweepThreads, shared_bytes); });
  if (resident == 0) return {};
  const int groups = static_cast<int>(items.count < resident ? items.count : resident);
  const int tile = mma ? MmaSweep<scalar_t>::kTile : DifferenceSweep<scalar_t>::kTile;
  const int64_t useful = ceil_div(items.tokens, tile);
  const int blocks = static_cast<int>(useful < resident / groups ? useful : resident / groups);
  // The weights of a sweep take no more memory than the features, unless those are narrow.
  const int64_t affordable = rows.channels * sizeof(scalar_t) / sizeof(float);
  const int most = affordable > kSweepPoints ? kSweepPoints : affordable < 4 ? 4 : static_cast<int>(affordable);
  return {sizeof(scalar_t), from_mean, false, mma ? tile : 0, false, 0, 0, false, groups, blocks, lookahead < most ? lookahead : most};
}

// Device memory of one selection besides its input and output. `allocate(bytes)` is called once for each part in use; parts that
// are not stay null.
struct SelectionScratch {
  TokenStats stats{};
  float* weights = nullptr;     // stored: (entries, tokens, matrix_pitch(tokens)); swept: (lookahead, all tokens)
  unsigned* marks = nullptr;    // stored on tensor cores, but for Hopper's: (entries, tiles, tiles)
  uint32_t* least = nullptr;    // stored, with items shared by clusters: the smallest weight of every row (all tokens)
  Key* keys = nullptr;          // swept: a SweepExchange for every group
  float* floats = nullptr;      // swept: the same
  unsigned* arrived = nullptr;  // swept: (groups)

  template <class Allocate>
  SelectionScratch(const SelectionPlan& plan, const Items& items, int64_t channels, Allocate&& allocate) {
    const auto take = [&](auto*& part, int64_t count) {
      if (count) part = static_cast<std::remove_reference_t<decltype(part)>>(allocate(count * static_cast<int64_t>(sizeof(*part))));
    };
    const int64_t tiles = mark_tiles(items.tokens);
    take_token_stats(stats, items, channels, plan.element_bytes, plan.from_mean, plan.mma_tile, plan.wgmma, allocate);
    take(weights, plan.stored ? plan.entries * items.tokens * matrix_pitch(items.tokens) : plan.lookahead * all_tokens(items));
    take(marks, plan.stored && plan.mma_tile && !plan.wgmma ? plan.entries * tiles * tiles : 0);
    take(least, plan.item_blocks > 1 && plan.least ? all_tokens(items) : 0);
    take(keys, plan.groups * SweepExchange::keys(plan.group_blocks));
    take(floats, plan.groups * SweepExchange::floats());
    take(arrived, plan.groups);
  }
};

template <class scalar_t, class Rule>
cudaError_t launch_selection(const Rows<scalar_t>& rows, const Items& items, const SelectionPlan& plan, const SelectionScratch& scratch,
                             Rule rule, int64_t* out, cudaStream_t stream) {
  cudaError_t error = cudaSuccess;
  // Places that no item's budget covers would otherwise stay unwritten; -1 is all bits set.
  if (items.packed()) error = cudaMemsetAsync(out, 0xff, items.picks * sizeof(int64_t), stream);
  if (error == cudaSuccess && scratch.least) error = cudaMemsetAsync(scratch.least, 0xff, all_tokens(items) * sizeof(uint32_t), stream);
  if (error == cudaSuccess) error = launch_token_stats(rows, items, scratch.stats, stream);
  if (error != cudaSuccess) return error;

  if (!plan.stored) {
    if (plan.groups == 0) return cudaErrorLaunchOutOfResources;
    error = cudaMemsetAsync(scratch.arrived, 0, plan.groups * sizeof(unsigned), stream);
    if (error != cudaSuccess) return error;
    return with_swept_kernel<scalar_t, Rule>(plan.mma_tile, [&](auto* kernel, size_t shared_bytes) {
      const Launch shape{dim3(plan.groups * plan.group_blocks), dim3(kSweepThreads), shared_bytes, 1, true, stream};
      return launch(kernel, shape, rows, items, rows_aligned(rows), plan.group_blocks, plan.lookahead, rule, scratch.stats.norms,
                    static_cast<const scalar_t*>(scratch.stats.centre), scratch.stats.mean_sqdist, scratch.weights, scratch.keys,
                    scratch.floats, scratch.arrived, out);
    });
  }
  const int64_t pitch = matrix_pitch(items.tokens);
  const auto weigh = [&](int64_t first, int64_t entries) {
    const StoreWeight<Rule> store{rule, scratch.least};
    if constexpr (kWgmmaServes<scalar_t, StoreWeight<Rule>>) {
      if (plan.wgmma)
        return launch_sqdist_wgmma(rows, items, first, entries, plan.mma_tile, scratch.stats, store, pitch, scratch.weights, stream);
    }
    if constexpr (sizeof(scalar_t) == 2) {
      if (plan.mma_tile)
        return launch_sqdist_mma(rows, items, first, entries, plan.mma_tile, scratch.stats, store, scratch.marks, pitch, scratch.weights,
                                 stream);
    }
    return launch_sqdist_tiles(rows, items, first, entries, store, pitch, scratch.weights, stream);
  };
  const auto select = [&](int64_t first, int64_t count) {
    if (plan.item_blocks > 1) {
      const Launch shape = cluster_launch(items.tokens, count, plan.item_blocks, stream);
      return with_cluster_kernel<Rule>(items.tokens, [&](auto* kernel) {
        return launch(kernel, shape, items, first, plan.lookahead, scratch.weights, scratch.least, scratch.stats.mean_sqdist, rule, out);
      });
    }
    const int64_t most_picks = items.picks < items.tokens ? items.picks : items.tokens;
    return with_stored_kernel<Rule>(items.tokens, [&](auto* kernel, int warps, size_t report_bytes) {
      const Launch shape{dim3(static_cast<unsigned>(count)), dim3(32 * warps), report_bytes + most_picks * sizeof(int), 1, false, stream};
      return launch(kernel, shape, items, first, scratch.weights, scratch.stats.mean_sqdist, rule, out);
    });
  };
  const int64_t entries = items.packed() ? 1 : items.count;
  for (int64_t first = 0; first < entries; first += plan.entries) {
    const int64_t held = entries - first < plan.entries ? entries - first : plan.entries;
    const int64_t count = items.packed() ? items.count : held;
    error = weigh(first, held);
    if (error != cudaSuccess) return error;
    error = select(first, count);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

#ifdef STS_KERNEL_TABLE
// For tests: a selection as the ops run it. notes, if not null, is given what is noted on the way: where blocks share an item the least
// weights, else of stored weights on tensor cores the marks (SelectionScratch), of sweeps how often the blocks of the first group have
// come to a barrier. Items of at most matrix_tokens tokens go through stored weights, shared by item_blocks blocks each (0: as planned).
// wgmma: where the device has it.
// Every part of the scratch is an allocation of its own, filled with NaN.
template <class scalar_t, class Rule>
cudaError_t run_selection(const Rows<scalar_t>& rows, const Items& items, int64_t matrix_tokens, int item_blocks, int lookahead, bool wgmma,
                          Rule rule, unsigned* notes, int64_t* out, cudaStream_t stream) {
  SelectionPlan plan = plan_selection<scalar_t, Rule>(rows, items, matrix_tokens, lookahead, wgmma);
  if (plan.stored && item_blocks) plan.item_blocks = item_blocks;
  void* parts[16];
  int count = 0;
  const SelectionScratch scratch(plan, items, rows.channels, [&](int64_t bytes) -> void* {
    parts[count] = nullptr;
    if (cudaMalloc(&parts[count], bytes) != cudaSuccess || cudaMemsetAsync(parts[count], 0xff, bytes, stream) != cudaSuccess) return nullptr;
    return parts[count++];
  });
  cudaError_t error = launch_selection(rows, items, plan, scratch, rule, out, stream);
  if (error == cudaSuccess) error = cudaStreamSynchronize(stream);
  const unsigned* noted = scratch.least ? scratch.least : scratch.marks ? scratch.marks : scratch.arrived;
  const int64_t tiles = mark_tiles(items.tokens);
  const int64_t num_noted = scratch.least ? all_tokens(items) : scratch.marks ? plan.entries * tiles * tiles : 1;
  if (error == cudaSuccess && notes && noted) error = cudaMemcpy(notes, noted, num_noted * sizeof *notes, cudaMemcpyDeviceToDevice);
  while (count) cudaFree(parts[--count]);
  return error;
}

// The same on unit rows.
template <class scalar_t, class Rule>
cudaError_t run_unit_selection(const Rows<scalar_t>& rows, const Items& items, int64_t matrix_tokens, int item_blocks, int lookahead,
                               Rule rule, int64_t* out, cudaStream_t stream) {
  const int64_t entries = items.packed() ? 1 : items.count, floats = entries * items.tokens * unit_pitch(rows.channels);
  void* unit = nullptr;
  cudaError_t error = cudaMalloc(&unit, floats * sizeof(float));
  if (error == cudaSuccess) error = cudaMemsetAsync(unit, 0xff, floats * sizeof(float), stream);
  if (error == cudaSuccess) error = launch_unit_rows(rows, entries, items.tokens, items.tokens, nullptr, static_cast<float*>(unit), nullptr, stream);
  const Rows<float> unit_rows = unit_rows_of(static_cast<const float*>(unit), items.tokens, rows.channels);
  if (error == cudaSuccess)
    error = run_selection(unit_rows, items, matrix_tokens, item_blocks, lookahead, true, UnitRows<Rule>{rule}, nullptr, out, stream);
  cudaFree(unit);
  return error;
}
#endif

}  // namespace sts
