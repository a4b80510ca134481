// Streaming selection, for items of any size: nothing N x N is stored. Picks are drafted, and one pass over the features verifies them.
//
// What: a group of resident blocks shares an item and streams its features. A sweep is one iteration of draft, pass, verify and commit. A
//   wrong draft costs time and never a result: the picks are those of the plain loop, bit for bit.
//   The current pick of a sweep is known to be right; its weights are not added yet.
// Chosen when: the matrix does not fit (kMatrixTokens), or few of many tokens are picked without tensor cores.
// Steps, for every sweep:
//   (1) candidates: every block chooses the same tokens of low potential from the offers of all blocks. The distances of all pairs of
//     candidates are computed once per group, each block a part;
//   (2) draft: every block runs the same plain loop among the candidates, in shared memory. draft[0] is the current pick;
//   (3) pass: every block computes the distances of its tokens to the drafts from the features. It adds their weights in draft order and
//     keeps after[p][token], the potential after draft[p];
//   (4) verify: each warp has kept its argmin of after[p] during the pass; the group reduces them. draft[p + 1] is accepted if it is
//     argmin after[p] and all drafts before it are accepted. The argmin after the last accepted draft is the next current pick;
//   (5) commit: after[last accepted draft] becomes the potentials. Every block offers its lowest tokens.
//   Potentials and after[][] of a block's tokens are private to the block. Step (5) reads one row of after[][].
// Rules: any. For the first draft all potentials may be equal (no `start`). Then the candidates are the tokens furthest from the mean
//   (repulsion) or of the lowest indices, and few drafts are accepted.
// Synchronisation: three barriers of the group per sweep (GroupBarrier; the launch is cooperative): after (1), in (4) before a block reads
//   the lowest keys of the others, and after (5).
#pragma once
#include "sqdist_sweep.cuh"
#include "token_stats.cuh"

namespace sts {

// An offer is the key of a token of low potential, proposed as a candidate.
constexpr int kWarpOffers = 2;                          // offers of a warp to its block
constexpr int kMostOffers = kWarpOffers * kSweepWarps;  // max offers of a block to its group
constexpr int kGroupOffers = 512;                       // target number of offers of a group
constexpr int kLaneCandidates = 6;                      // max candidates per lane of the drafting warp
constexpr int kLaneDrafts = 5;                          // drafts per candidate of a lane
constexpr int kCandidates = 1 + kLaneCandidates * 32;   // candidate 0 is the current pick
constexpr int kPairs = kCandidates * (kCandidates - 1) / 2;

// Offers per block of a group of `blocks`: kGroupOffers / blocks, from kWarpOffers to kMostOffers.
STS_HOST_DEVICE int block_offers(int blocks) {
  const int share = (kGroupOffers + blocks - 1) / blocks;
  return share < kWarpOffers ? kWarpOffers : share < kMostOffers ? share : kMostOffers;
}

// Dynamic shared memory of a block: in (2) the values of all pairs of candidates, in (1) and (3) the shared memory of Sweep.
template <class Sweep>
constexpr size_t kSweptBytes = Sweep::kSharedBytes > kPairs * sizeof(float) ? Sweep::kSharedBytes : kPairs * sizeof(float);

// Global memory that the blocks of a group share. A barrier of the group lies between writing, reading and writing again `offers` and
// `pair`. `lowest` is double-buffered: two calls of find_argmin may follow each other without another barrier between them.
struct SweepExchange {
  Key* offers;  // (block_offers, blocks of the group): each block's tokens of lowest potential
  Key* lowest;  // (2, kMostSweepPoints, blocks of the group): each block's lowest key after each draft
  float* pair;  // (kPairs): stored_value of all pairs of candidates, see pair_index

  STS_HOST_DEVICE static int64_t keys(int blocks) { return static_cast<int64_t>(blocks) * (kMostOffers + 2 * kMostSweepPoints); }
  STS_HOST_DEVICE static int64_t floats() { return kPairs; }
  static __device__ __forceinline__ SweepExchange of(int group, Key* keys_of_all, float* floats_of_all, int blocks) {
    Key* const group_keys = keys_of_all + group * keys(blocks);
    return {group_keys, group_keys + blocks * kMostOffers, floats_of_all + group * floats()};
  }
};
static_assert(kPairs % 4 == 0, "16-byte loads");

// Tokens that may be drafted, in shared memory. Candidate 0 is the current pick.
struct Candidates {
  int token[kCandidates];  // -1: absent
  float potential[kCandidates], parameter[kCandidates];
};

// The kCount lowest keys that a lane has inserted, ascending.
template <int kCount>
struct LowestKeys {
  Key key[kCount];
  __device__ __forceinline__ LowestKeys() {
#pragma unroll
    for (int i = 0; i < kCount; ++i) key[i] = kNoKey;
  }
  __device__ __forceinline__ void insert(Key next) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const Key low = lower(key[i], next);
      next = key[i] < next ? next : key[i];
      key[i] = low;
    }
  }
  // By a warp: removes the lowest key of all lanes and returns it.
  __device__ __forceinline__ Key pop() {
    const Key lowest = warp_lowest(key[0]);
    if (key[0] == lowest) {
#pragma unroll
      for (int i = 0; i + 1 < kCount; ++i) key[i] = key[i + 1];
      key[kCount - 1] = kNoKey;
    }
    return lowest;
  }
};

// By a warp: f(key) for all keys[0 .. count), lane-strided, with kUnroll loads in flight per lane. Past the end f(kNoKey).
template <class F>
__device__ __forceinline__ void for_keys(const Key* keys, int count, const F& f) {
  constexpr int kUnroll = 16;
  for (int begin = threadIdx.x % 32; begin < count; begin += 32 * kUnroll) {
    Key key[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) key[u] = begin + 32 * u < count ? keys[begin + 32 * u] : kNoKey;
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) f(key[u]);
  }
}

// The item of a block and the block's share of it.
template <class scalar_t>
struct SweptItem {
  Item item;
  int64_t entry;      // of the rows
  int64_t first_row;  // index of the item's token 0 among all tokens
  const float* norms;
  const scalar_t* centre;
  float *potential, *after;  // by token of the item
  int64_t stride;            // after[p * stride + token]
  int slots, picks;          // slots: tokens of this block, in whole tiles
};

// Static shared memory of a block. It holds uniform values too, as the pass leaves no registers for them.
template <class scalar_t, int kPoints>
struct SweptShared {
  SweptItem<scalar_t> share;
  SweepExchange exchange;
  Candidates candidates;
  int candidate_count;
  SweepPoints draft;
  float draft_parameter[kPoints];
  Key offered[kMostOffers];
  Key lowest_of_warp[kSweepWarps][kPoints], argmin[kPoints];  // the lowest key after draft[p]: of each warp, and of the group
};

// (1) By a warp, with the same result in every block: each lane takes the lowest keys of its strided share of the offers, one key (so 32
// candidates) for every kLaneDrafts drafts. Returns the number of candidates, absent ones included. parameter_of: of a token.
template <class F>
__device__ __forceinline__ int choose_candidates(const Key* offers, int count, int pick, int max_drafts, const F& parameter_of,
                                                 Candidates& candidates) {
  const int lane = threadIdx.x % 32;
  LowestKeys<kLaneCandidates> lane_lowest;
  for_keys(offers, count, [&](Key offer) { lane_lowest.insert(static_cast<int>(key_index(offer)) == pick ? kNoKey : offer); });
  if (lane == 0) {
    candidates.token[0] = pick;
    candidates.parameter[0] = parameter_of(pick);
  }
  int rows = 0;
#pragma unroll
  for (int h = 0; h < kLaneCandidates; ++h) {
    const int slot = 1 + 32 * h + lane;
    const bool present = kLaneDrafts * h < max_drafts && lane_lowest.key[h] != kNoKey;
    candidates.token[slot] = present ? static_cast<int>(key_index(lane_lowest.key[h])) : -1;
    candidates.potential[slot] = present ? key_value(lane_lowest.key[h]) : kInfinity;
    candidates.parameter[slot] = present ? parameter_of(static_cast<int>(key_index(lane_lowest.key[h]))) : 0.f;
    rows += __any_sync(kFullWarp, present);
  }
  return 1 + 32 * rows;
}

// (2) By a warp, with the same result in every block: the plain loop among the candidates. pair: see SweepExchange.
// first: the first draft of the item. Its offers hold minus the distance to the mean if Rule::kFromMean, so potentials begin at
// Rule::start.
template <class Rule>
__device__ __forceinline__ void draft_picks(const Candidates& candidates, bool first, const Rule& rule, const float* pair, int max_drafts,
                                            SweepPoints& draft) {
  const int lane = threadIdx.x % 32;
  float potential[kLaneCandidates];
#pragma unroll
  for (int h = 0; h < kLaneCandidates; ++h) {
    const int slot = 1 + 32 * h + lane;
    potential[h] = candidates.token[slot] < 0 ? kInfinity : first && Rule::kFromMean ? Rule::start(0.f, 0.f) : candidates.potential[slot];
  }
  int chosen = 0, count = 1;
  while (count < max_drafts) {
    const float pick_parameter = candidates.parameter[chosen];
    uint32_t order[kLaneCandidates], low = ~0u;
#pragma unroll
    for (int h = 0; h < kLaneCandidates; ++h) {
      const int slot = 1 + 32 * h + lane;
      potential[h] = slot == chosen || potential[h] == kInfinity
                         ? kInfinity
                         : after_pick(rule, potential[h], pair[pair_index(chosen, slot)], candidates.parameter[slot], pick_parameter);
      order[h] = order_of<Rule>(potential[h]);
      low = min(low, order[h]);
    }
    const uint32_t lowest = __reduce_min_sync(kFullWarp, low);
    if (lowest >= order_of<Rule>(kNonFinitePotential)) break;
    int slot = 1 + lane;  // of `low`
#pragma unroll
    for (int h = 1; h < kLaneCandidates; ++h) slot = order[h] == low ? 1 + 32 * h + lane : slot;
    chosen = static_cast<int>(__reduce_min_sync(kFullWarp, low == lowest ? static_cast<uint32_t>(slot) : ~0u));
    if (lane == 0) draft.token[count] = candidates.token[chosen];
    ++count;
  }
  if (lane == 0) {
    draft.token[0] = candidates.token[0];
    draft.count = count;
  }
}

// What the pass needs of a token.
struct SweptToken {
  float potential, parameter;
};

// One block of a group, which runs the steps of a sweep with the others.
template <class Sweep, class scalar_t, class Rule>
struct SweptBlock {
  static constexpr int kPoints = Sweep::kPoints;
  const Rows<scalar_t>& rows;
  const Items& items;
  const Rule& rule;
  bool aligned;
  SweptShared<scalar_t, kPoints>& shared;
  float* pair;  // dynamic shared memory
  int rank, blocks;
  GroupBarrier barrier;
  int buffer = 0;  // its parity selects a buffer of SweepExchange::lowest

  __device__ __forceinline__ static int lane() { return threadIdx.x % 32; }
  __device__ __forceinline__ static int warp() { return threadIdx.x / 32; }
  // The token of a slot: the tiles of an item go round-robin to the blocks of the group. May be past the end.
  __device__ __forceinline__ int64_t token_of(int slot) const {
    return (static_cast<int64_t>(slot / Sweep::kTile) * blocks + rank) * Sweep::kTile + slot % Sweep::kTile;
  }
  __device__ __forceinline__ float parameter_of(int64_t i) const {
    return kOfDistance<Rule> ? 0.f : items.parameter_of(shared.share.first_row + i);
  }

  // Writes the offers of this block: the lowest of the kWarpOffers lowest keys of each warp.
  __device__ __forceinline__ void offer(LowestKeys<kWarpOffers> low) {
#pragma unroll
    for (int h = 0; h < kWarpOffers; ++h) {
      const Key key = low.pop();
      if (lane() == 0) shared.offered[h * kSweepWarps + warp()] = key;
    }
    __syncthreads();
    if (warp() != 0) return;
    Key lane_key = lane() < kMostOffers ? shared.offered[lane()] : kNoKey;
    for (int h = 0; h < block_offers(blocks); ++h) {
      const Key key = warp_lowest(lane_key);
      if (lane_key == key) lane_key = kNoKey;
      if (lane() == 0) shared.exchange.offers[h * blocks + rank] = key;
    }
  }

  // argmin[p], p < count: the lowest key after draft[p] of all blocks. `lowest`: in lane p that of the warp.
  __device__ __forceinline__ void find_argmin(Key lowest, int count) {
    const int tid = threadIdx.x;
    Key* const block_lowest = shared.exchange.lowest + (buffer++ & 1) * blocks * kMostSweepPoints;
    if (lane() < count) shared.lowest_of_warp[warp()][lane()] = lowest;
    __syncthreads();
    if (tid < count) {
      Key best = kNoKey;
#pragma unroll
      for (int w = 0; w < kSweepWarps; ++w) best = lower(best, shared.lowest_of_warp[w][tid]);
      block_lowest[tid * blocks + rank] = best;
    }
    barrier.sync();
    // Each warp reduces the points warp, warp + kSweepWarps, ... together, so that their loads overlap.
    constexpr int kWarpPoints = kPoints / kSweepWarps;
    Key best[kWarpPoints];
#pragma unroll
    for (int r = 0; r < kWarpPoints; ++r) best[r] = kNoKey;
#pragma unroll 4
    for (int block = lane(); block < blocks; block += 32)
#pragma unroll
      for (int r = 0; r < kWarpPoints; ++r) {
        const int p = warp() + r * kSweepWarps;
        if (p < count) best[r] = lower(best[r], block_lowest[p * blocks + block]);
      }
#pragma unroll
    for (int r = 0; r < kWarpPoints; ++r) {
      const Key low = warp_lowest(best[r]);
      if (lane() == 0) shared.argmin[warp() + r * kSweepWarps] = low;
    }
    __syncthreads();
  }

  // Writes `share` for item b. norms, centre, potential, after: of all items.
  __device__ __forceinline__ void enter(int64_t b, const float* norms, const scalar_t* centre, float* potential, float* after) {
    __syncthreads();  // all threads have read `share` of the item before
    if (threadIdx.x == 0) {
      SweptItem<scalar_t>& share = shared.share;
      const Item item = items[b];
      const int tiles = static_cast<int>(ceil_div(item.tokens, Sweep::kTile));
      share.item = item;
      share.entry = items.entry(b);
      share.first_row = items.first_token(b, item);
      share.norms = norms ? norms + share.first_row : nullptr;
      share.centre = centre ? centre + b * rows.channels : nullptr;
      share.picks = static_cast<int>(item.picks < item.tokens ? item.picks : item.tokens);
      share.slots = rank < tiles ? ((tiles - 1 - rank) / blocks + 1) * Sweep::kTile : 0;
      share.potential = potential + share.first_row;
      share.after = after + share.first_row;
      share.stride = all_tokens(items);
    }
    __syncthreads();
  }

  // The first pick, by first_key. Also makes the first offers.
  // Rules with kFromMean offer the tokens furthest from the mean: potentials are equal so far, the first pick is near the mean, and the
  // next picks are far from the first. With anchors and without tensor cores all distances are 0, and these are the lowest indices.
  // Other rules offer the lowest potentials.
  __device__ __forceinline__ int start() {
    const SweptItem<scalar_t>& share = shared.share;
    LowestKeys<kWarpOffers> low;
    Key lowest = kNoKey;
    for (int slot = threadIdx.x; slot < share.slots; slot += kSweepThreads) {
      const int64_t i = token_of(slot);
      if (i >= share.item.tokens) continue;
      const float distance = share.potential[i], parameter = parameter_of(i);
      const float given = kOfDistance<Rule> || !items.start ? kNonFinitePotential : items.start[share.first_row + i];
      const float before = first_potential(rule, distance < kInfinity, given, parameter);
      share.potential[i] = before;
      lowest = lower(lowest, make_key(first_key(rule, distance, before, items.start, parameter), static_cast<uint32_t>(i)));
      if (before < kNonFinitePotential) low.insert(make_key(Rule::kFromMean ? -distance : before, static_cast<uint32_t>(i)));
    }
    offer(low);
    find_argmin(warp_lowest(lowest), 1);
    return static_cast<int>(first_pick(share.item, shared.argmin[0]));
  }

  // (1), (2): shared.draft, up to max_drafts tokens. first: draft[0] is the first pick of the item.
  __device__ __forceinline__ void make_draft(int pick, int max_drafts, bool first) {
    const int tid = threadIdx.x;
    const SweptItem<scalar_t>& share = shared.share;
    if (max_drafts > 1) {
      if (warp() == 0) {
        const auto parameter = [&](int64_t i) { return parameter_of(i); };
        const int offers = blocks * block_offers(blocks);
        const int slots = choose_candidates(shared.exchange.offers, offers, pick, max_drafts, parameter, shared.candidates);
        if (lane() == 0) shared.candidate_count = slots;
      }
      __syncthreads();
      const int count = shared.candidate_count;
      const auto store = [&](float sqdist) { return stored_value(rule, sqdist); };
      Sweep::pairs(rows, share.entry, share.item, aligned, share.norms, share.centre, shared.candidates.token, count, rank, blocks, store,
                   shared.exchange.pair);
      barrier.sync();
      for (int e = tid * 4; e < count * (count - 1) / 2; e += kSweepThreads * 4) cp_async_16(pair + e, shared.exchange.pair + e, true);
      cp_async_commit();
      cp_async_wait<0>();
      __syncthreads();
      if (warp() == 0) draft_picks(shared.candidates, first, rule, pair, max_drafts, shared.draft);
    } else if (tid == 0) {  // one pick is left, or lookahead is 1: nothing to draft
      shared.draft.token[0] = pick;
      shared.draft.count = 1;
    }
    __syncthreads();
  }

  // (3): share.after. Returns in lane p the lowest key of the warp after draft[p].
  __device__ __forceinline__ Key pass() {
    const int tid = threadIdx.x;
    const SweptItem<scalar_t>& share = shared.share;
    SweepPoints& draft = shared.draft;
    const int count = draft.count;
    if (tid < count) {  // Sweep::run has a barrier before these are read
      if (Rule::kByPick) shared.draft_parameter[tid] = parameter_of(draft.token[tid]);
      if (share.norms) draft.norm[tid] = share.norms[draft.token[tid]];
    }
    const auto load = [&](int64_t i) { return SweptToken{share.potential[i], Rule::kByToken ? parameter_of(i) : 0.f}; };
    const auto weigh = [&](const SweptToken& token, int p, float sqdist) {
      return rule.weight(sqdist, token.parameter, Rule::kByPick ? shared.draft_parameter[p] : 0.f);
    };
    Key lowest = kNoKey;
    // after[p] of token i, from the weights of its pairs with the drafts.
    const auto add_drafts = [&](int64_t i, const SweptToken& token, const float* weights) {
      const bool inside = i < share.item.tokens;
      const uint32_t first = __shfl_sync(kFullWarp, static_cast<uint32_t>(i), 0);
      float value = inside ? token.potential : kInfinity, *after_draft = share.after + i;
      const int64_t stride = share.stride;
#pragma unroll
      for (int p = 0; p < kPoints; ++p) {
        if (p >= count) continue;
        if (inside) {
          value = i == draft.token[p] ? kInfinity : Rule::add(value, weights[p]);
          *after_draft = value;
        }
        after_draft += stride;
        const uint32_t order = ordered_bits(value), low = __reduce_min_sync(kFullWarp, order);
        const int owner = __ffs(static_cast<int>(__ballot_sync(kFullWarp, order == low))) - 1;  // of the lowest token
        if (lane() == p) lowest = lower(lowest, static_cast<Key>(low) << 32 | (first + owner));
      }
    };
    Sweep::run(rows, share.entry, share.item, aligned, share.norms, share.centre, draft, rank, blocks, load, weigh, add_drafts);
    return lowest;
  }

  // (4): the number of drafts that are picks.
  __device__ __forceinline__ int verify(Key lowest) {
    const SweepPoints& draft = shared.draft;
    find_argmin(lowest, draft.count);
    const bool right = lane() + 1 < draft.count && static_cast<int>(key_index(shared.argmin[lane()])) == draft.token[lane() + 1];
    return __ffs(static_cast<int>(~__ballot_sync(kFullWarp, right)));
  }

  // (5)
  __device__ __forceinline__ void commit(int accepted) {
    const SweptItem<scalar_t>& share = shared.share;
    LowestKeys<kWarpOffers> low;
    for (int slot = threadIdx.x; slot < share.slots; slot += kSweepThreads) {
      const int64_t i = token_of(slot);
      if (i >= share.item.tokens) continue;
      const float value = share.after[(accepted - 1) * share.stride + i];
      share.potential[i] = value;
      if (value < kNonFinitePotential) low.insert(make_key(value, static_cast<uint32_t>(i)));
    }
    offer(low);
    barrier.sync();
  }
};

// Groups of resident blocks. Group g takes items g, g + groups, ... of the list.
//   listed: null for all items; else {count, item, item, ...} (PackedPlan::large)
//   most_groups, most_blocks: max groups; max blocks per group
//   lookahead: max drafts per sweep, the current pick included
//   potential: (all tokens); on entry the squared distances to the mean (TokenStats::mean_sqdist)
//   after: (lookahead, all tokens)
//   keys, floats: SweepExchange::keys(blocks) and SweepExchange::floats() of every group
//   arrived: (groups), zeros; the counters of GroupBarrier
template <class Sweep, class scalar_t, class Rule>
__global__ void __launch_bounds__(kSweepThreads, 2)
    select_swept_kernel(Rows<scalar_t> rows, Items items, const int* listed, bool aligned, int most_groups, int most_blocks, int lookahead,
                        Rule rule, const float* norms, const scalar_t* centre, float* potential, float* after, Key* keys, float* floats,
                        unsigned* arrived, int64_t* out) {
  STS_DYNAMIC_SHARED(unsigned char, memory);
  __shared__ SweptShared<scalar_t, Sweep::kPoints> shared;
  __shared__ int item_count, groups, group_blocks;
  const int tid = threadIdx.x;
  if (tid == 0) {
    item_count = listed ? listed[0] : static_cast<int>(items.count);
    groups = min(item_count, most_groups);
    group_blocks = groups ? min(static_cast<int>(gridDim.x) / groups, most_blocks) : 1;
    shared.exchange = SweepExchange::of(blockIdx.x / group_blocks, keys, floats, group_blocks);
  }
  __syncthreads();
  const int group = blockIdx.x / group_blocks, rank = blockIdx.x % group_blocks;
  if (group >= groups) return;
  SweptBlock<Sweep, scalar_t, Rule> block{rows,    items,        rule,
                                          aligned, shared,       reinterpret_cast<float*>(memory),
                                          rank,    group_blocks, GroupBarrier(arrived + group, group_blocks)};

  for (int index = group; index < item_count; index += groups) {
    block.enter(listed ? listed[1 + index] : index, norms, centre, potential, after);
    const SweptItem<scalar_t>& share = shared.share;
    if (rank == 0)
      for (int64_t i = share.picks + tid; i < share.item.picks; i += kSweepThreads) out[share.item.out + i] = -1;
    if (share.picks == 0) continue;
    int pick = block.start();  // the current pick
    for (int done = 0;;) {
      if (rank == 0 && tid == 0) out[share.item.out + done] = pick;
      if (++done == share.picks) break;
      block.make_draft(pick, min(share.picks - done, lookahead), done == 1);
      const Key lowest = block.pass();
      const int accepted = block.verify(lowest);
      if (rank == 0 && tid > 0 && tid < accepted) out[share.item.out + done + tid - 1] = shared.draft.token[tid];
      done += accepted - 1;
      pick = static_cast<int>(key_index(shared.argmin[accepted - 1]));
      block.commit(accepted);
    }
  }
}

}  // namespace sts
