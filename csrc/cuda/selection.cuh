// Greedy selection by any rule of selection_rule.h: all picks of all items in one launch, after their distances.
//   up to kMatrixTokens tokens: the weights of all pairs are stored once, and one block per item runs the picks (select_stored.cuh), or
//     a cluster of blocks where items are large and few (select_cluster.cuh);
//   above, and from half as many tokens on where few are picked: nothing N x N is stored, and all blocks work on one item, or a few
//     (select_swept.cuh).
// The items of a packed batch are looked through on the device (packed_plan.cuh). Each goes the way of its own size, whatever else is in the
// batch: first those with weights, in waves of as many as fit, then the longer ones.
#pragma once
#include "common/selection_plan.h"
#include "select_cluster.cuh"
#include "select_stored.cuh"
#include "select_swept.cuh"
#include "sqdist_wgmma.cuh"
#include "unit_rows.cuh"

namespace sts {

constexpr int64_t kMatrixFloats = int64_t(1) << 26;  // weights held at a time: 256 MiB, one item of kMatrixTokens
constexpr int64_t kWaveFloats = int64_t(1) << 27;    // packed: 512 MiB. Picks of a wave take as long as its longest item's
constexpr int kTileBlocks = 4;                       // packed: blocks that take tiles in turns, for each SM
constexpr int64_t kFewPicks = 64;                    // few: less than one of so many tokens
constexpr int64_t kClusterFrom = 1024;               // items of more tokens are shared by a cluster

// What is stored for a pair of tokens (stored_value); on the diagonal the potential of a token that is picked. row_min: null, or for all
// tokens the ordered bits of the smallest in each row.
template <class Rule>
struct StoreWeight {
  static constexpr bool kOverlap = true;
  static constexpr float kCancellation = sts::kCancellation;
  static constexpr bool kThreeProducts = std::is_same_v<Rule, Repulsion>;  // of float32 rows, for which others want differences
  Rule rule;
  uint32_t* row_min;
  __device__ float operator()(float sqdist, bool diagonal) const { return diagonal ? kInfinity : stored_value(rule, sqdist); }
};

// ---- plan and launch ----

// How a selection is laid out on the device; everything follows from the shapes, the element type and the device.
struct SelectionPlan {
  int64_t element_bytes;             // of the features
  bool from_mean;                    // the first pick may be the token nearest the mean
  bool stored;                       // weights of all pairs in memory
  bool swept;                        // else; packed: of items that are too long
  bool mma;                          // distances on tensor cores, or by differences
  bool wgmma;                        // stored: on those of Hopper
  int tile;                          // stored: tokens along the side of a tile of pairs
  int64_t entries;                   // stored: batch entries whose weights are held at a time
  int item_blocks;                   // stored: blocks that share an item, a cluster if more than one
  bool row_min;                      // the cluster's bound grows by the smallest weight of each pick's row
  int groups, group_blocks, blocks;  // swept: of the cooperative launch, at the most
  int held;                          // swept: tokens of a block whose potentials lie in its shared memory
  int lookahead;                     // max picks per exchange (cluster) or sweep; 1: the plain loop, in one block where weights are stored
  PackedShape packed;                // packed
};

// f(kernel, a function of `held` that gives its shared memory) for the kernel that sweeps.
template <class scalar_t, class Rule, class F>
auto with_swept_kernel(bool mma, const F& f) {
  if constexpr (sizeof(scalar_t) == 2) {
    if (mma) return f(select_swept_kernel<MmaSweep<scalar_t>, scalar_t, Rule>, swept_shared_bytes<MmaSweep<scalar_t>>);
  }
  return f(select_swept_kernel<DifferenceSweep<scalar_t>, scalar_t, Rule>, swept_shared_bytes<DifferenceSweep<scalar_t>>);
}

// Blocks that share each item, of which `at_once` are under way: as many as there are SMs for, if items are large.
template <class Rule>
int stored_item_blocks(const Items& items, int64_t at_once) {
  if (items.tokens <= kClusterFrom * (items.packed() ? items.count : 1)) return 1;  // on average where packed
  const int sms = device_sm_count();
  const int64_t most_tokens = items.longest() < kMatrixTokens ? items.longest() : kMatrixTokens;
  for (int blocks = 8; blocks >= 4; blocks /= 2) {
    if (at_once * blocks > sms) continue;
    const Launch shape = cluster_launch(most_tokens, at_once, blocks, nullptr);
    if (with_cluster_kernel<Rule>(most_tokens, [&](auto* kernel) { return clusters_fit(kernel, shape); })) return blocks;
  }
  return 1;
}

// The part of a plan that is for sweeps of items of up to items.longest() tokens. count: of such items, at the most.
template <class scalar_t, class Rule>
bool plan_sweeps(const Rows<scalar_t>& rows, const Items& items, int64_t count, SelectionPlan& plan) {
  const auto resident_of = [&](int held) {
    return with_swept_kernel<scalar_t, Rule>(
        plan.mma, [&](auto* kernel, auto shared_bytes) { return max_resident_blocks(kernel, kSweepThreads, shared_bytes(held)); });
  };
  const int resident = resident_of(0);
  if (resident == 0) return false;
  plan.swept = true;
  plan.groups = static_cast<int>(count < resident ? count : resident);
  const int tile = plan.mma ? MmaSweep<scalar_t>::kTile : DifferenceSweep<scalar_t>::kTile;
  const int64_t useful = ceil_div(items.longest(), tile);
  // A packed batch may have fewer such items, that then have more blocks each.
  const int64_t share = items.packed() ? resident : resident / plan.groups;
  plan.group_blocks = static_cast<int>(useful < share ? useful : share);
  const int64_t blocks = int64_t(plan.groups) * plan.group_blocks;
  plan.blocks = static_cast<int>(blocks < resident ? blocks : resident);
  // The potentials of a block's tokens lie in its shared memory, if as many blocks are resident with it. How many blocks share a packed
  // item is known on the device alone, which decides there what fits.
  const int64_t slots = items.packed() ? kHeldTokens : ceil_div(useful, plan.group_blocks) * tile;
  plan.held = slots <= kHeldTokens && resident_of(static_cast<int>(slots)) >= plan.blocks ? static_cast<int>(slots) : 0;
  // Else they take no more memory than the features, unless those are narrow.
  const int64_t affordable = rows.channels * sizeof(scalar_t) / sizeof(float);
  const int most = affordable > kSweepPoints ? kSweepPoints : affordable < 4 ? 4 : static_cast<int>(affordable);
  plan.lookahead = plan.lookahead < most ? plan.lookahead : most;
  return true;
}

template <class scalar_t, class Rule>
SelectionPlan plan_selection(const Rows<scalar_t>& rows, const Items& items, int64_t matrix_tokens = kMatrixTokens,
                             int lookahead = kSweepPoints, bool wgmma = true, int64_t wave_floats = kWaveFloats) {
  SelectionPlan plan{};
  plan.from_mean = Rule::kFromMean && !items.anchor;
  plan.element_bytes = sizeof(scalar_t);
  plan.mma = mma_fits(rows, items);
  plan.wgmma = wgmma && wgmma_serves<scalar_t, StoreWeight<Rule>>();
  plan.lookahead = lookahead;
  // Both kernels take the same bits for a distance by differences, so that the picks do not depend on how many they are. On tensor
  // cores they do not, where a pair is repaired.
  const bool few = !plan.mma && !plan.wgmma && !items.packed() && items.picks * kFewPicks < items.tokens;
  const int64_t stored_tokens = few ? matrix_tokens / 2 : matrix_tokens;
  plan.stored = items.packed() ? matrix_tokens > 0 : items.tokens <= stored_tokens;
  if (plan.stored) {
    const int64_t tokens = items.packed() ? ceil_div(items.tokens, items.count) : items.tokens;  // packed: on average
    const int64_t fit = items.packed() ? items.count : kMatrixFloats / (tokens * matrix_pitch(tokens));
    plan.entries = items.count < fit ? items.count : fit;
    plan.tile = plan.wgmma ? wgmma_tile(tokens, plan.entries)
                : plan.mma ? mma_tile(tokens, plan.entries)
                           : sqdist_tile(tokens, plan.entries);
    plan.item_blocks = lookahead > 1 ? stored_item_blocks<Rule>(items, plan.entries) : 1;
    plan.row_min = kOfDistance<Rule>;
  }
  if (items.packed()) plan.packed = packed_shape(items, stored_tokens, plan.stored ? plan.tile : kLargeTile, wave_floats);
  if (items.packed() ? plan.packed.most_large > 0 : !plan.stored) {
    if (!plan_sweeps<scalar_t, Rule>(rows, items, items.packed() ? plan.packed.most_large : items.count, plan)) return {};
  }
  plan.wgmma = plan.wgmma && plan.stored;
  return plan;
}

// Device memory of one selection besides its input and output. `allocate(bytes)` is called once for each part in use; parts that
// are not stay null.
struct SelectionScratch {
  TokenStats stats{};
  PackedPlan packed{};       // packed
  float* weights = nullptr;  // stored: (entries, tokens, matrix_pitch(tokens)), or a wave's; swept, not held: (lookahead, all tokens)
  unsigned* marks =
      nullptr;  // stored on tensor cores, but for Hopper's: (entries, side, side) tiles of kMarkTile tokens, or (tiles, parts)
  uint32_t* row_min = nullptr;  // stored, with items shared by clusters: the smallest weight of every row (all tokens)
  Key* keys = nullptr;          // swept: a SweepExchange for every group
  float* floats = nullptr;      // swept: the same
  unsigned* arrived = nullptr;  // swept: (groups)

  static int64_t marks_of(const SelectionPlan& plan, const Items& items) {
    const int64_t side = ceil_div(items.tokens, kMarkTile), parts = plan.tile / kMarkTile;
    return items.packed() ? most_tiles(items, plan.packed) * parts * parts : plan.entries * side * side;
  }

  template <class Allocate>
  SelectionScratch(const SelectionPlan& plan, const Items& items, int64_t channels, Allocate&& allocate) {
    const auto take = [&](auto*& part, int64_t count) {
      if (count) part = static_cast<std::remove_reference_t<decltype(part)>>(allocate(count * static_cast<int64_t>(sizeof(*part))));
    };
    const int64_t stored = items.packed() ? plan.packed.floats : items.tokens * matrix_pitch(items.tokens);
    const int64_t held = plan.stored ? items.packed() ? stored : plan.entries * stored : 0;
    const int64_t drafted = plan.swept && (!plan.held || items.packed()) ? plan.lookahead * all_tokens(items) : 0;
    take_token_stats(stats, items, channels, plan.element_bytes, plan.from_mean, plan.mma || plan.wgmma, plan.wgmma, allocate);
    take(weights, held > drafted ? held : drafted);
    take(marks, plan.stored && plan.mma && !plan.wgmma ? marks_of(plan, items) : 0);
    take(row_min, plan.item_blocks > 1 && plan.row_min ? all_tokens(items) : 0);
    take(keys, SweepExchange::keys(plan.blocks));
    take(floats, plan.groups * SweepExchange::floats());
    take(arrived, plan.groups);
    if (!items.packed()) return;
    take(packed.items, items.count);
    take(packed.matrices, items.count);
    take(packed.waves, plan.packed.waves + 1);
    take(packed.large, plan.packed.most_large + 1);
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
      // Places that no item's budget covers would otherwise stay unwritten; -1 is all bits set.
      error = cudaMemsetAsync(out_, 0xff, items_.picks * sizeof(int64_t), stream_);
      if (error == cudaSuccess) error = launch_packed_plan(items_, plan_.packed, scratch_.packed, stream_);
      items_.planned = scratch_.packed.items;
    }
    if (error == cudaSuccess && scratch_.row_min)
      error = cudaMemsetAsync(scratch_.row_min, 0xff, all_tokens(items_) * sizeof(uint32_t), stream_);
    if (error == cudaSuccess) error = launch_token_stats(rows_, items_, scratch_.stats, stream_);
    if (error == cudaSuccess && plan_.stored) error = items_.packed() ? select_waves() : select_entries();
    return error == cudaSuccess && plan_.swept ? sweep() : error;
  }

 private:
  // As many entries at a time as there is memory for.
  cudaError_t select_entries() {
    const int64_t pitch = matrix_pitch(items_.tokens), most_picks = items_.picks < items_.tokens ? items_.picks : items_.tokens;
    for (int64_t first = 0; first < items_.count; first += plan_.entries) {
      const int64_t held = items_.count - first < plan_.entries ? items_.count - first : plan_.entries;
      cudaError_t error = weigh([&](auto mma, const auto& store) {
        if constexpr (kWgmmaServes<scalar_t, StoreWeight<Rule>>) {
          if (plan_.wgmma)
            return launch_sqdist_wgmma(rows_, items_, first, held, plan_.tile, scratch_.stats, store, pitch, scratch_.weights, stream_);
        }
        if constexpr (decltype(mma)::value)
          return launch_sqdist_mma(rows_, items_, first, held, plan_.tile, scratch_.stats, store, scratch_.marks, pitch, scratch_.weights,
                                   stream_);
        else
          return launch_sqdist_tiles(rows_, items_, first, held, store, pitch, scratch_.weights, stream_);
      });
      if (error != cudaSuccess) return error;
      const StoredItems stored{items_, scratch_.weights, first, nullptr, nullptr};
      const auto in_blocks = [&](auto* kernel, int warps, size_t report_bytes) {
        return select_in_blocks(kernel, stored, held, warps, report_bytes + most_picks * sizeof(int));
      };
      error = plan_.item_blocks > 1 ? select_in_clusters(stored, items_.tokens, held) : with_stored_kernel<Rule>(items_.tokens, in_blocks);
      if (error != cudaSuccess) return error;
    }
    return cudaSuccess;
  }

  // Wave by wave; later ones may be empty. A block for every item there is, of which those of other waves have nothing to do.
  cudaError_t select_waves() {
    const int64_t longest = items_.longest() < plan_.packed.stored_tokens ? items_.longest() : plan_.packed.stored_tokens;
    const int64_t most_picks = items_.picks < longest ? items_.picks : longest;
    const int64_t tiles = most_tiles(items_, plan_.packed), most_blocks = int64_t(kTileBlocks) * device_sm_count();
    const int64_t blocks = tiles < most_blocks ? tiles : most_blocks;
    for (int64_t w = 0; w < plan_.packed.waves; ++w) {
      const PackedTiles at{scratch_.packed.items, scratch_.packed.matrices, scratch_.packed.waves + w, plan_.tile, 1};
      cudaError_t error = weigh([&](auto mma, const auto& store) {
        if constexpr (kWgmmaServes<scalar_t, StoreWeight<Rule>>) {
          if (plan_.wgmma) return launch_sqdist_wgmma(rows_, items_, at, tiles, scratch_.stats, store, scratch_.weights, stream_);
        }
        if constexpr (decltype(mma)::value)
          return launch_sqdist_mma(rows_, at, blocks, scratch_.stats, store, scratch_.marks, scratch_.weights, stream_);
        else
          return launch_sqdist_tiles(rows_, at, blocks, store, scratch_.weights, stream_);
      });
      if (error != cudaSuccess) return error;
      const StoredItems stored{items_, scratch_.weights, 0, at.wave, at.matrices};
      const auto in_blocks = [&](auto* kernel, int warps, size_t report_bytes) {
        return select_in_blocks(kernel, stored, items_.count, warps, report_bytes + most_picks * sizeof(int));
      };
      error = plan_.item_blocks > 1 ? select_in_clusters(stored, longest, items_.count) : with_packed_kernel<Rule>(longest, in_blocks);
      if (error != cudaSuccess) return error;
    }
    return cudaSuccess;
  }

  // f(whether on tensor cores, what is stored of a pair).
  template <class F>
  cudaError_t weigh(const F& f) {
    const StoreWeight<Rule> store{rule_, scratch_.row_min};
    if constexpr (sizeof(scalar_t) == 2) {
      if (plan_.mma) return f(std::true_type(), store);
    }
    return f(std::false_type(), store);
  }

  template <class Kernel>
  cudaError_t select_in_blocks(Kernel* kernel, const StoredItems& stored, int64_t blocks, int warps, size_t shared_bytes) {
    const Launch shape{dim3(static_cast<unsigned>(blocks)), dim3(32 * warps), shared_bytes, 1, false, stream_, true};
    return launch(kernel, shape, stored, scratch_.stats.mean_sqdist, rule_, out_);
  }

  cudaError_t select_in_clusters(const StoredItems& stored, int64_t tokens, int64_t count) {
    const Launch shape = cluster_launch(tokens, count, plan_.item_blocks, stream_);
    return with_cluster_kernel<Rule>(tokens, [&](auto* kernel) {
      return launch(kernel, shape, stored, plan_.lookahead, scratch_.row_min, scratch_.stats.mean_sqdist, rule_, out_);
    });
  }

  cudaError_t sweep() {
    const cudaError_t error = cudaMemsetAsync(scratch_.arrived, 0, plan_.groups * sizeof(unsigned), stream_);
    if (error != cudaSuccess) return error;
    return with_swept_kernel<scalar_t, Rule>(plan_.mma, [&](auto* kernel, auto shared_bytes) {
      const Launch shape{dim3(plan_.blocks), dim3(kSweepThreads), shared_bytes(plan_.held), 1, true, stream_};
      return launch(kernel, shape, rows_, items_, scratch_.packed.large, rows_aligned(rows_), plan_.groups, plan_.group_blocks,
                    plan_.lookahead, plan_.held, rule_, scratch_.stats.norms, static_cast<const scalar_t*>(scratch_.stats.centre),
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
