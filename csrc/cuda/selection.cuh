// The plan, the scratch memory and the launches of a greedy selection, by any rule of selection_rule.h.
//
// What: a stored selection computes the weights of all pairs (sqdist_*.cuh), then makes all picks of all items in one launch: one block per
//   item (select_stored.cuh, or select_drafted.cuh), or a cluster of blocks where items are large and few (select_cluster.cuh). A streaming
//   selection stores nothing N x N: all resident blocks share one item, or a few (select_swept.cuh).
// Chosen when: stored up to kMatrixTokens tokens; streaming above, and above half as many tokens where few are picked (kFewPicks) without
//   tensor cores.
// Steps: (1) packed: the plan (packed_plan.cuh); (2) token stats; (3) stored, for as many items as kMatrixFloats or kWaveFloats hold at a
//   time: the weights, then the picks; (4) streaming: all picks of the other items.
// Synchronisation: launches, in stream order; they may overlap (Launch::overlap), and a kernel waits where it reads (await_predecessor).
// Packed: packed_plan.cuh finds the items on the device. Every item takes the path of its own size, whatever else is in the batch. Stored
//   items come first, in waves that fit kWaveFloats, then the longer items in one streaming launch.
#pragma once
#include "common/selection_plan.h"
#include "select_cluster.cuh"
#include "select_drafted.cuh"
#include "select_stored.cuh"
#include "select_swept.cuh"
#include "sqdist_wgmma.cuh"
#include "unit_rows.cuh"

namespace sts {

constexpr int64_t kMatrixFloats = int64_t(1) << 26;  // padded: max weights in memory at once: 256 MiB, one item of kMatrixTokens
constexpr int64_t kWaveFloats = int64_t(1) << 27;    // packed: max weights of a wave: 512 MiB. A wave lasts as long as its longest item
constexpr int64_t kFewPicks = 64;                    // "few" picks: K < N / kFewPicks

// Epilogue of the distances: the stored_value of a pair, and infinity on the diagonal, the potential of a picked token.
// row_min: null, or (all tokens): the ordered bits of the minimum of each row.
template <class Rule>
struct StoreWeight {
  static constexpr bool kOverlap = true;
  static constexpr float kCancellation = sts::kCancellation;
  static constexpr bool kThreeProducts = std::is_same_v<Rule, Repulsion>;  // float32 rows on tensor cores; other rules need differences
  Rule rule;
  uint32_t* row_min;
  __device__ float operator()(float sqdist, bool diagonal) const { return diagonal ? kInfinity : stored_value(rule, sqdist); }
};

// ---- plan and launch ----

// How a selection runs on the device. It follows from the shapes, the element type and the device alone.
struct SelectionPlan {
  int64_t element_bytes;             // of the features
  bool from_mean;                    // the first pick may be the token nearest the mean
  bool stored;                       // weights of all pairs in memory
  bool swept;                        // streaming: no weights stored. Packed: of the items that are too long
  bool mma;                          // distances on tensor cores (mma.sync) where wgmma is false, or by differences
  bool wgmma;                        // stored: distances by TMA and wgmma
  int tile;                          // stored: tokens along the side of a tile of pairs
  int64_t entries;                   // stored: batch entries whose weights are in memory at once
  int item_blocks;                   // stored: blocks per item; more than one: a cluster
  int64_t cluster_from;              // cluster: items of at most this many tokens take one block
  bool drafted;                      // stored, one block per item: picks are drafted and verified
  bool row_min;                      // cluster: the bound rises by the row minimum of each pick
  int groups, group_blocks, blocks;  // swept: max groups, blocks per group, and blocks of the cooperative launch
  int lookahead;                     // max picks per exchange, batch of drafts or sweep; 1: the plain loop, in one block if stored
  PackedShape packed;                // packed
};

// f(kernel, max points of a pass, tokens of a tile, bytes of shared memory) with the streaming kernel.
template <class scalar_t, class Rule, class F>
auto with_swept_kernel(bool mma, const F& f) {
  const auto call = [&](auto sweep) {
    using Sweep = decltype(sweep);
    return f(select_swept_kernel<Sweep, scalar_t, Rule>, Sweep::kPoints, Sweep::kTile, kSweptBytes<Sweep>);
  };
  if constexpr (sizeof(scalar_t) == 2) {
    if (mma) return call(MmaSweep<scalar_t>());
  }
  return call(DifferenceSweep<scalar_t>());
}

// Blocks per item of at most stored_tokens. Large items: 8, else 4, if `at_once` clusters of them fit the device. Else 1. Packed: the
// clusters of 4 need not fit, because the device counts the large items and decides which of them are shared (StoredItems::shares). The
// other items take a block each, one per SM, where the kernel for blocks alone has two: so they must leave a quarter of the SMs free.
template <class Rule>
int stored_item_blocks(const Items& items, int64_t stored_tokens, int64_t at_once) {
  const int64_t most_tokens = items.longest() < stored_tokens ? items.longest() : stored_tokens;
  if (most_tokens <= kClusterFrom) return 1;
  for (int blocks = 8; blocks >= 4; blocks /= 2) {
    const Launch shape = cluster_launch(most_tokens, at_once, blocks, nullptr);
    const int resident = with_cluster_kernel<Rule>(most_tokens, [&](auto* kernel) { return max_resident_clusters(kernel, shape); });
    const bool shareable = items.packed() && blocks == 4 && items.count * 4 <= int64_t(device_sm_count()) * 3;
    if (at_once <= resident || (shareable && resident > 0)) return blocks;
  }
  return 1;
}

// The streaming part of a plan, for at most `count` items of at most items.longest() tokens.
template <class scalar_t, class Rule>
bool plan_sweeps(const Rows<scalar_t>& rows, const Items& items, int64_t count, SelectionPlan& plan) {
  int resident, most, tile;
  with_swept_kernel<scalar_t, Rule>(plan.mma, [&](auto* kernel, int points, int tile_tokens, size_t shared_bytes) {
    resident = max_resident_blocks(kernel, kSweepThreads, shared_bytes);
    most = points, tile = tile_tokens;
  });
  if (resident == 0) return false;
  plan.swept = true;
  plan.groups = static_cast<int>(count < resident ? count : resident);
  const int64_t useful = ceil_div(items.longest(), tile);
  // A packed batch may have fewer long items than `count`; then each has more blocks. So a group may have up to all resident blocks.
  const int64_t share = items.packed() ? resident : resident / plan.groups;
  plan.group_blocks = static_cast<int>(useful < share ? useful : share);
  const int64_t blocks = int64_t(plan.groups) * plan.group_blocks;
  plan.blocks = static_cast<int>(blocks < resident ? blocks : resident);
  // after[lookahead][tokens] takes at most the memory of the features, but for very few channels.
  const int64_t affordable = rows.channels * sizeof(scalar_t) / sizeof(float);
  most = affordable > most ? most : affordable < 4 ? 4 : static_cast<int>(affordable);
  plan.lookahead = plan.lookahead < most ? plan.lookahead : most;
  return true;
}

template <class scalar_t, class Rule>
SelectionPlan plan_selection(const Rows<scalar_t>& rows, const Items& items, int64_t matrix_tokens = kMatrixTokens,
                             int lookahead = kMostSweepPoints, bool wgmma = true, int64_t wave_floats = kWaveFloats) {
  SelectionPlan plan{};
  plan.from_mean = Rule::kFromMean && !items.anchor;
  plan.element_bytes = sizeof(scalar_t);
  plan.mma = mma_fits(rows, items);
  plan.wgmma = wgmma && wgmma_serves<scalar_t, StoreWeight<Rule>>();
  plan.lookahead = lookahead;
  // The path may depend on k only if that cannot change the picks (prefix property). By differences the stored and the streaming kernel
  // compute the same bits. On tensor cores a repaired pair may differ, so there k must not decide.
  const bool few = !plan.mma && !plan.wgmma && !items.packed() && items.picks * kFewPicks < items.tokens;
  const int64_t stored_tokens = few ? matrix_tokens / 2 : matrix_tokens;
  plan.stored = items.packed() ? matrix_tokens > 0 : items.tokens <= stored_tokens;
  if (plan.stored) {
    const int64_t tokens = items.packed() ? ceil_div(items.tokens, items.count) : items.tokens;  // packed: the mean length
    const int64_t fit = items.packed() ? items.count : kMatrixFloats / (tokens * matrix_pitch(tokens));
    plan.entries = items.count < fit ? items.count : fit;
    plan.tile = plan.wgmma ? wgmma_tile(tokens, plan.entries)
                : plan.mma ? mma_tile(tokens, plan.entries)
                           : sqdist_tile(tokens, plan.entries);
    plan.item_blocks = lookahead > 1 ? stored_item_blocks<Rule>(items, stored_tokens, plan.entries) : 1;
    plan.cluster_from = kClusterFrom;
    if constexpr (kDraftable<Rule>) plan.drafted = plan.item_blocks == 1 && lookahead > 1 && drafts_pay(items);
    plan.row_min = kOfDistance<Rule>;
  }
  if (items.packed()) plan.packed = packed_shape(items, stored_tokens, plan.stored ? plan.tile : kLargeTile, wave_floats);
  if (items.packed() ? plan.packed.most_large > 0 : !plan.stored) {
    if (!plan_sweeps<scalar_t, Rule>(rows, items, items.packed() ? plan.packed.most_large : items.count, plan)) return {};
  }
  plan.wgmma = plan.wgmma && plan.stored;
  return plan;
}

// Scratch memory of a selection. `allocate(bytes)` is called once for each part in use; other parts are null.
struct SelectionScratch {
  TokenStats stats{};
  PackedPlan packed{};  // packed
  // Stored: (entries, tokens, matrix_pitch(tokens)), or the matrices of a wave. Streaming: after[][], (lookahead, all tokens).
  float* weights = nullptr;
  unsigned* marks = nullptr;    // mma.sync: see launch_sqdist_mma
  Key* keys = nullptr;          // swept: the keys of a SweepExchange per group
  float* floats = nullptr;      // swept: the floats of a SweepExchange per group
  unsigned* arrived = nullptr;  // swept: (groups)

  static int64_t marks_of(const SelectionPlan& plan, const Items& items) {
    const int64_t side = ceil_div(items.tokens, kMarkTile), parts = plan.tile / kMarkTile;
    return items.packed() ? most_tiles(items, plan.packed) * parts * parts : plan.entries * side * side;
  }

  template <class Allocate>
  SelectionScratch(const SelectionPlan& plan, const Items& items, int64_t channels, Allocate&& allocate) {
    const int64_t stored = items.packed() ? plan.packed.floats : items.tokens * matrix_pitch(items.tokens);
    const int64_t held = plan.stored ? items.packed() ? stored : plan.entries * stored : 0;
    const int64_t drafted = plan.swept ? plan.lookahead * all_tokens(items) : 0;
    take_token_stats(stats, items, channels, plan.element_bytes, plan.from_mean, plan.mma || plan.wgmma, plan.wgmma,
                     plan.item_blocks > 1 && plan.row_min, allocate);
    take_array(weights, held > drafted ? held : drafted, allocate);
    take_array(marks, plan.stored && plan.mma && !plan.wgmma ? marks_of(plan, items) : 0, allocate);
    take_array(keys, SweepExchange::keys(plan.blocks), allocate);
    take_array(floats, plan.groups * SweepExchange::floats(), allocate);
    take_array(arrived, plan.groups, allocate);
    if (!items.packed()) return;
    take_array(packed.items, items.count, allocate);
    take_array(packed.matrices, items.count, allocate);
    take_array(packed.waves, plan.packed.waves + 1, allocate);
    take_array(packed.large, plan.packed.most_large + 1, allocate);
  }
};

// The launches of one selection.
template <class scalar_t, class Rule>
class SelectionLaunch {
 public:
  SelectionLaunch(const Rows<scalar_t>& rows, const Items& items, const SelectionPlan& plan, const SelectionScratch& scratch, Rule rule,
                  int64_t* out, cudaStream_t stream)
      : rows_(rows), items_(items), plan_(plan), scratch_(scratch), rule_(rule), out_(out), stream_(stream) {}

  cudaError_t run() {
    if (!plan_.stored && !plan_.swept) return cudaErrorLaunchOutOfResources;
    cudaError_t error = cudaSuccess;
    if (items_.packed()) {
      // -1 (all bits set) where no budget covers the output: the kernels write the picks of items alone.
      error = cudaMemsetAsync(out_, 0xff, items_.picks * sizeof(int64_t), stream_);
      if (error == cudaSuccess) error = launch_packed_plan(items_, plan_.packed, scratch_.packed, stream_);
      items_.planned = scratch_.packed.items;
    }
    if (error == cudaSuccess) error = launch_token_stats(rows_, items_, scratch_.stats, stream_);
    if (error == cudaSuccess && plan_.stored) error = items_.packed() ? select_waves() : select_entries();
    return error == cudaSuccess && plan_.swept ? sweep() : error;
  }

 private:
  // Padded: plan_.entries entries at a time.
  cudaError_t select_entries() {
    const int64_t pitch = matrix_pitch(items_.tokens);
    for (int64_t first = 0; first < items_.count; first += plan_.entries) {
      const int64_t held = items_.count - first < plan_.entries ? items_.count - first : plan_.entries;
      cudaError_t error = weigh(PaddedTiles{items_.tokens, items_.num_tokens, first, held, pitch, plan_.tile});
      if (error != cudaSuccess) return error;
      const int resident = plan_.item_blocks > 1 || plan_.drafted ? 0 : resident_rows(items_, held);
      const StoredItems stored{items_, scratch_.weights, first, nullptr, nullptr, plan_.cluster_from, 0, resident};
      const auto in_blocks = [&](auto* kernel, int warps, size_t report_bytes) {
        const size_t bytes = resident_offset(report_bytes, items_) + resident * pitch * sizeof(float);
        return select_in_blocks(kernel, stored, held, warps, bytes);
      };
      error = plan_.item_blocks > 1 ? select_in_clusters(stored, items_.tokens, held)
              : plan_.drafted       ? select_by_drafts(stored, held)
                                    : with_stored_kernel<Rule>(items_.tokens, in_blocks);
      if (error != cudaSuccess) return error;
    }
    return cudaSuccess;
  }

  // Packed: wave by wave; the last waves may be empty. Every wave launches a block or a cluster per item of the batch: those of items of
  // other waves return at once.
  cudaError_t select_waves() {
    const int64_t longest = items_.longest() < plan_.packed.stored_tokens ? items_.longest() : plan_.packed.stored_tokens;
    const int64_t most_picks = items_.picks < longest ? items_.picks : longest;
    const int sms = device_sm_count();
    const int64_t tiles = most_tiles(items_, plan_.packed);
    for (int64_t w = 0; w < plan_.packed.waves; ++w) {
      const PackedTiles at{scratch_.packed.items, scratch_.packed.matrices, scratch_.packed.waves + w, tiles, plan_.tile};
      cudaError_t error = weigh(at);
      if (error != cudaSuccess) return error;
      const StoredItems stored{items_, scratch_.weights, 0, at.wave, at.matrices, plan_.cluster_from, sms, 0};
      const auto in_blocks = [&](auto* kernel, int warps, size_t report_bytes) {
        return select_in_blocks(kernel, stored, items_.count, warps, report_bytes + most_picks * sizeof(int));
      };
      error = plan_.item_blocks > 1 ? select_in_clusters(stored, longest, items_.count)
              : plan_.drafted       ? select_by_drafts(stored, items_.count)
                                    : with_packed_kernel<Rule>(longest, in_blocks);
      if (error != cudaSuccess) return error;
    }
    return cudaSuccess;
  }

  // The weights of the pairs of `tiles`.
  template <class Tiles>
  cudaError_t weigh(const Tiles& tiles) {
    const StoreWeight<Rule> store{rule_, scratch_.stats.row_min};
    if constexpr (kWgmmaServes<scalar_t, StoreWeight<Rule>>) {
      if (plan_.wgmma) return launch_sqdist_wgmma(rows_, items_, tiles, scratch_.stats, store, scratch_.weights, stream_);
    }
    if constexpr (sizeof(scalar_t) == 2) {
      if (plan_.mma) return launch_sqdist_mma(rows_, tiles, scratch_.stats, store, scratch_.marks, scratch_.weights, stream_);
    }
    return launch_sqdist_tiles(rows_, tiles, store, scratch_.weights, stream_);
  }

  template <class Kernel>
  cudaError_t select_in_blocks(Kernel* kernel, const StoredItems& stored, int64_t blocks, int warps, size_t shared_bytes) {
    const Launch shape{dim3(static_cast<unsigned>(blocks)), dim3(32 * warps), shared_bytes, 1, false, stream_, true};
    return launch(kernel, shape, stored, scratch_.stats.mean_sqdist, rule_, out_);
  }

  cudaError_t select_by_drafts(const StoredItems& stored, int64_t blocks) {
    if constexpr (kDraftable<Rule>) {
      const Launch shape{dim3(static_cast<unsigned>(blocks)),
                         dim3(32 * kEncodeWarps),
                         static_cast<size_t>(drafted_shared_bytes(items_)),
                         1,
                         false,
                         stream_,
                         true};
      return launch(select_drafted_kernel<Rule>, shape, stored, plan_.lookahead, scratch_.stats.mean_sqdist, rule_, out_);
    }
    return cudaErrorInvalidValue;
  }

  cudaError_t select_in_clusters(const StoredItems& stored, int64_t tokens, int64_t count) {
    const Launch shape = cluster_launch(tokens, count, plan_.item_blocks, stream_);
    return with_cluster_kernel<Rule>(tokens, [&](auto* kernel) {
      return launch(kernel, shape, stored, plan_.lookahead, scratch_.stats.row_min, scratch_.stats.mean_sqdist, rule_, out_);
    });
  }

  cudaError_t sweep() {
    const cudaError_t error = cudaMemsetAsync(scratch_.arrived, 0, plan_.groups * sizeof(unsigned), stream_);
    if (error != cudaSuccess) return error;
    return with_swept_kernel<scalar_t, Rule>(plan_.mma, [&](auto* kernel, int, int, size_t shared_bytes) {
      const Launch shape{dim3(plan_.blocks), dim3(kSweepThreads), shared_bytes, 1, true, stream_};
      return launch(kernel, shape, rows_, items_, scratch_.packed.large, rows_aligned(rows_), plan_.groups, plan_.group_blocks,
                    plan_.lookahead, rule_, scratch_.stats.norms, static_cast<const scalar_t*>(scratch_.stats.centre),
                    scratch_.stats.mean_sqdist, scratch_.weights, scratch_.keys, scratch_.floats, scratch_.arrived, out_);
    });
  }

  const Rows<scalar_t>& rows_;
  Items items_;
  const SelectionPlan& plan_;
  const SelectionScratch& scratch_;
  Rule rule_;
  int64_t* out_;
  cudaStream_t stream_;
};

template <class scalar_t, class Rule>
cudaError_t launch_selection(const Rows<scalar_t>& rows, const Items& items, const SelectionPlan& plan, const SelectionScratch& scratch,
                             Rule rule, int64_t* out, cudaStream_t stream) {
  return SelectionLaunch<scalar_t, Rule>(rows, items, plan, scratch, rule, out, stream).run();
}

}  // namespace sts
