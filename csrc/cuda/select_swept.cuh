// Streaming selection: no N x N matrix, for items of any size. Groups of resident blocks take an item each and stream its features; a sweep
// drafts several picks and verifies them.
//
// What: a wrong draft costs time and never a result: the picks are the plain loop's, bit for bit.
// Chosen when: the matrix does not fit (kMatrixTokens), or few of many tokens are picked without tensor cores.
// Steps, for every sweep:
//   (1) candidates: every block chooses the same, of low potential, from all blocks' offers; the blocks share the distances of all pairs;
//   (2) draft: every block runs the same plain loop among the candidates, in its shared memory. The first drafted pick is the pick at hand;
//   (3) sweep: every block adds the weights of its tokens to the drafted picks, in that order, and keeps each token's potential after each
//     pick (after[p][token]);
//   (4) verify: the lowest potential of all blocks after each pick. A drafted pick is right if it is the lowest after the one before; the
//     first that is not ends the sweep, and the lowest there is the next pick at hand;
//   (5) commit: the potentials after the last verified pick are a block's potentials; it offers its lowest tokens.
//   A block's tokens, their potentials and after[][] are its own: in its shared memory, or in global memory where they are too many.
// Rules: any. Where nothing tells tokens apart before the first pick (no start), the first draft is poor: candidates are those furthest
//   from the mean (repulsion) or the lowest indices.
// Synchronisation: three barriers of the group a sweep (GroupBarrier; the launch is cooperative): after (1), in (4) before the lowest of
//   all blocks are read, and after (5).
#pragma once
#include "sqdist_sweep.cuh"
#include "token_stats.cuh"

namespace sts {

constexpr int kWarpOffers = 2;                          // tokens that a warp offers to its block
constexpr int kMostOffers = kWarpOffers * kSweepWarps;  // tokens that a block offers to its group
constexpr int kGroupOffers = 256;                       // tokens that a group's blocks offer together, if there are so few blocks
constexpr int kLaneCandidates = 4;                      // candidates per lane of the drafting warp
constexpr int kCandidates = 1 + kLaneCandidates * 32;   // with the pick at hand
constexpr int kPairs = kCandidates * (kCandidates - 1) / 2;
constexpr int kHeldTokens = 512;  // max tokens of a block whose potentials fit its shared memory beside the stages of two blocks per SM

// Tokens that each of a group's blocks offers.
STS_HOST_DEVICE int block_offers(int blocks) {
  const int share = (kGroupOffers + blocks - 1) / blocks;
  return share < kWarpOffers ? kWarpOffers : share < kMostOffers ? share : kMostOffers;
}

// Dynamic shared memory: the stages of a sweep, where the distances of the candidates' pairs lie before; then the potentials of `held`
// tokens before and after each pick.
template <class Sweep>
constexpr size_t kSweptStages = Sweep::kSharedBytes > kPairs * sizeof(float) ? Sweep::kSharedBytes : kPairs * sizeof(float);
template <class Sweep>
size_t swept_shared_bytes(int held) {
  return kSweptStages<Sweep> + size_t(held) * (1 + kSweepPoints) * sizeof(float);
}

// What the blocks of one group share. Each array is written between two barriers, read after the second, and written again after
// a third; `lowest`, which may be needed at every barrier, is double-buffered.
struct SweepExchange {
  Key* offers;  // (block_offers, blocks of the group): their tokens of lowest potential
  Key* lowest;  // (2, kSweepPoints, blocks of the group): their lowest after each pick of a sweep
  float* pair;  // (kPairs): distances of candidates, see pair_place

  STS_HOST_DEVICE static int64_t keys(int blocks) { return static_cast<int64_t>(blocks) * (kMostOffers + 2 * kSweepPoints); }
  STS_HOST_DEVICE static int64_t floats() { return kPairs; }
  static __device__ __forceinline__ SweepExchange of(int group, Key* keys_of_all, float* floats_of_all, int blocks) {
    Key* const mine = keys_of_all + group * keys(blocks);
    return {mine, mine + blocks * kMostOffers, floats_of_all + group * floats()};
  }
};
static_assert(kPairs % 4 == 0, "16-byte loads");

// Tokens that may be drafted, in shared memory. Candidate 0 is the pick at hand.
struct Candidates {
  int token[kCandidates];  // -1: none
  float potential[kCandidates], parameter[kCandidates];
};

// The lowest keys that a lane has seen, in order.
template <int kCount>
struct LowestKeys {
  Key key[kCount];
  __device__ __forceinline__ LowestKeys() {
#pragma unroll
    for (int i = 0; i < kCount; ++i) key[i] = kNoKey;
  }
  __device__ __forceinline__ void take(Key next) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const Key low = lower(key[i], next);
      next = key[i] < next ? next : key[i];
      key[i] = low;
    }
  }
  // The lowest of the warp, which is then dropped.
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

// f(key) for all `keys`, shared by the lanes of a warp, with several loads under way.
template <class F>
__device__ __forceinline__ void for_keys(const Key* keys, int count, const F& f) {
  constexpr int kUnroll = 8;
  for (int begin = threadIdx.x % 32; begin < count; begin += 32 * kUnroll) {
    Key key[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) key[u] = begin + 32 * u < count ? keys[begin + 32 * u] : kNoKey;
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) f(key[u]);
  }
}

// A block's share of an item, in shared memory: registers would not hold it beside a sweep. A slot is a token's number in Sweep::run.
template <class scalar_t>
struct SweptItem {
  Item item;
  int64_t first_row;  // its first token, among all tokens
  const float* norms;
  const scalar_t* centre;
  float *now, *later;  // potentials, and after[][]: by slot in shared memory, else by token of the item
  int64_t stride;      // of after[][]
  int slots, picks;
  bool in_shared;

  __device__ __forceinline__ int64_t place(int slot, int64_t i) const { return in_shared ? slot : i; }
};

// (1) By a warp, the same in every block: the tokens of the lowest keys in each lane's share of the offers, sixteen for every pick that is
// wanted. parameter_of(token). The result: how many candidates there may be.
template <class F>
__device__ __forceinline__ int choose_candidates(const Key* offers, int count, int pick, int wanted, const F& parameter_of,
                                                 Candidates& candidates) {
  const int lane = threadIdx.x % 32;
  LowestKeys<kLaneCandidates> mine;
  for_keys(offers, count, [&](Key offer) { mine.take(static_cast<int>(key_index(offer)) == pick ? kNoKey : offer); });
  if (lane == 0) {
    candidates.token[0] = pick;
    candidates.parameter[0] = parameter_of(pick);
  }
  int rows = 0;
#pragma unroll
  for (int h = 0; h < kLaneCandidates; ++h) {
    const int slot = 1 + 32 * h + lane;
    const bool is_one = 2 * h < wanted && mine.key[h] != kNoKey;
    candidates.token[slot] = is_one ? static_cast<int>(key_index(mine.key[h])) : -1;
    candidates.potential[slot] = is_one ? key_value(mine.key[h]) : kInfinity;
    candidates.parameter[slot] = is_one ? parameter_of(static_cast<int>(key_index(mine.key[h]))) : 0.f;
    rows += __any_sync(kFullWarp, is_one);
  }
  return 1 + 32 * rows;
}

// (2) By a warp, the same in every block: the plain loop among the candidates. pair: their distances. Where the mean decides the `first`
// pick, potentials count from then on.
template <class Rule>
__device__ __forceinline__ void draft_picks(const Candidates& candidates, bool first, const Rule& rule, const float* pair, int wanted,
                                            SweepPoints& draft) {
  const int lane = threadIdx.x % 32;
  float potential[kLaneCandidates];
#pragma unroll
  for (int h = 0; h < kLaneCandidates; ++h) {
    const int slot = 1 + 32 * h + lane;
    potential[h] = candidates.token[slot] < 0 ? kInfinity : first && Rule::kFromMean ? Rule::start(0.f, 0.f) : candidates.potential[slot];
  }
  int chosen = 0, count = 1;
  while (count < wanted) {
    Key best = kNoKey;
    const float of_pick = candidates.parameter[chosen];
#pragma unroll
    for (int h = 0; h < kLaneCandidates; ++h) {
      const int slot = 1 + 32 * h + lane;
      if (potential[h] < kInfinity)
        potential[h] = Rule::add(potential[h], rule.weight(pair[pair_place(chosen, slot)], candidates.parameter[slot], of_pick));
      best = lower(best, make_key(potential[h], slot));
    }
    best = warp_lowest(best);
    if (!(key_value(best) < kNonFinitePotential)) break;
    chosen = static_cast<int>(key_index(best));
#pragma unroll
    for (int h = 0; h < kLaneCandidates; ++h)
      if (chosen == 1 + 32 * h + lane) potential[h] = kInfinity;
    if (lane == 0) draft.token[count] = candidates.token[chosen];
    ++count;
  }
  if (lane == 0) {
    draft.token[0] = candidates.token[0];
    draft.count = count;
  }
}

// Groups of resident blocks; group g takes items g, g + groups, ... `potential` holds the distances to the mean on entry. listed: null, or
// how many items there are to take, and which; then there are no more groups than items. most_groups, most_blocks: of a group, at the most.
// held: tokens of a block that its shared memory is for. after: (lookahead, all tokens), or null where no block has more. keys: of as many
// blocks. floats, arrived: a SweepExchange's and a zero for every group.
template <class Sweep, class scalar_t, class Rule>
__global__ void __launch_bounds__(kSweepThreads, 2)
    select_swept_kernel(Rows<scalar_t> rows, Items items, const int* listed, bool aligned, int most_groups, int most_blocks, int lookahead,
                        int held, Rule rule, const float* norms, const scalar_t* centre, float* potential, float* after, Key* keys,
                        float* floats, unsigned* arrived, int64_t* out) {
  STS_DYNAMIC_SHARED(unsigned char, shared);
  __shared__ SweptItem<scalar_t> own;
  __shared__ Candidates candidates;
  __shared__ Key offered[kMostOffers], next[kSweepPoints];
  __shared__ SweepPoints draft;
  __shared__ float draft_parameter[kSweepPoints];
  // No registers are left for these.
  __shared__ int candidate_count, item_count, groups, group_blocks;
  __shared__ SweepExchange exchange;
  float* const pair = reinterpret_cast<float*>(shared);
  float* const held_floats = reinterpret_cast<float*>(shared + kSweptStages<Sweep>);
  if (threadIdx.x == 0) {
    item_count = listed ? listed[0] : static_cast<int>(items.count);
    groups = min(item_count, most_groups);
    group_blocks = groups ? min(static_cast<int>(gridDim.x) / groups, most_blocks) : 1;
    exchange = SweepExchange::of(blockIdx.x / group_blocks, keys, floats, group_blocks);
  }
  __syncthreads();
  const int group = blockIdx.x / group_blocks, rank = blockIdx.x % group_blocks;
  if (group >= groups) return;
  const int tid = threadIdx.x, lane = tid % 32, warp = tid / 32, offers = block_offers(group_blocks);
  GroupBarrier barrier(arrived + group, group_blocks);
  int turn = 0;

  for (int at = group; at < item_count; at += groups) {
    const int64_t b = listed ? listed[1 + at] : at;
    __syncthreads();  // all are done with the item before
    if (tid == 0) {
      const Item item = items[b];
      const int tiles = static_cast<int>(ceil_div(item.tokens, Sweep::kTile));
      own.item = item;
      own.first_row = items.first_token(b, item);
      own.norms = norms ? norms + own.first_row : nullptr;
      own.centre = centre ? centre + b * rows.channels : nullptr;
      own.picks = static_cast<int>(item.picks < item.tokens ? item.picks : item.tokens);
      own.slots = rank < tiles ? ((tiles - 1 - rank) / group_blocks + 1) * Sweep::kTile : 0;
      const bool in_shared = own.slots <= held;
      own.in_shared = in_shared;
      own.now = in_shared ? held_floats : potential + own.first_row;
      own.later = in_shared ? held_floats + held : after + own.first_row;
      own.stride = in_shared ? held : all_tokens(items);
    }
    __syncthreads();
    const int64_t entry = items.packed() ? 0 : b;
    if (rank == 0)
      for (int64_t i = own.picks + tid; i < own.item.picks; i += kSweepThreads) out[own.item.out + i] = -1;
    if (own.picks == 0) continue;
    const auto token_of = [&](int slot) {
      return (static_cast<int64_t>(slot / Sweep::kTile) * group_blocks + rank) * Sweep::kTile + slot % Sweep::kTile;
    };

    const auto offer = [&](LowestKeys<kWarpOffers> low) {
#pragma unroll
      for (int h = 0; h < kWarpOffers; ++h) {
        const Key key = low.pop();
        if (lane == 0) offered[h * kSweepWarps + warp] = key;
      }
      __syncthreads();
      if (warp != 0) return;
      Key mine = lane < kMostOffers ? offered[lane] : kNoKey;
      for (int h = 0; h < offers; ++h) {
        const Key key = warp_lowest(mine);
        if (mine == key) mine = kNoKey;
        if (lane == 0) exchange.offers[h * group_blocks + rank] = key;
      }
    };
    // The lowest of all blocks after every one of `count` picks.
    const auto find_next = [&](int count) {
      Key* const all = exchange.lowest + (turn++ & 1) * group_blocks * kSweepPoints;
      __syncthreads();
      for (int p = warp; p < count; p += kSweepWarps) {
        Key best = kNoKey;
#pragma unroll 4
        for (int slot = lane; slot < own.slots; slot += 32) {
          const int64_t i = token_of(slot);
          if (i < own.item.tokens) best = lower(best, make_key(own.later[p * own.stride + own.place(slot, i)], static_cast<uint32_t>(i)));
        }
        best = warp_lowest(best);
        if (lane == 0) all[p * group_blocks + rank] = best;
      }
      barrier.sync();
      for (int p = warp; p < count; p += kSweepWarps) {
        Key best = kNoKey;
        for_keys(all + p * group_blocks, group_blocks, [&](Key key) { best = lower(best, key); });
        best = warp_lowest(best);
        if (lane == 0) next[p] = best;
      }
      __syncthreads();
    };
    const auto parameter_of = [&](int64_t i) { return kOfDistance<Rule> ? 0.f : items.parameter_of(own.first_row + i); };

    // The first pick. Those that follow have low potentials; where these are all equal, they will be far from the first, and so from the
    // mean.
    LowestKeys<kWarpOffers> furthest;
    for (int slot = tid; slot < own.slots; slot += kSweepThreads) {
      const int64_t i = token_of(slot);
      if (i >= own.item.tokens) continue;
      const float distance = potential[own.first_row + i], parameter = parameter_of(i);
      const float start = kOfDistance<Rule> || !items.start ? kNonFinitePotential : items.start[own.first_row + i];
      const float before = first_potential(rule, distance < kInfinity, start, parameter);
      own.now[own.place(slot, i)] = before;
      own.later[own.place(slot, i)] = first_key(rule, distance, before, items.start, parameter);
      if (before < kNonFinitePotential) furthest.take(make_key(Rule::kFromMean ? -distance : before, static_cast<uint32_t>(i)));
    }
    offer(furthest);
    find_next(1);
    int pick = static_cast<int>(first_pick(own.item, next[0]));

    for (int done = 0;;) {
      if (rank == 0 && tid == 0) out[own.item.out + done] = pick;
      if (++done == own.picks) break;

      const int wanted = own.picks - done < lookahead ? own.picks - done : lookahead;
      if (wanted > 1) {
        // (1) candidates
        if (warp == 0) {
          const int most = choose_candidates(exchange.offers, group_blocks * offers, pick, wanted, parameter_of, candidates);
          if (lane == 0) candidate_count = most;
        }
        __syncthreads();
        const int count = candidate_count;
        Sweep::pairs(rows, entry, own.item, aligned, own.norms, own.centre, candidates.token, count, rank, group_blocks, exchange.pair);
        barrier.sync();
        // (2) draft
        for (int e = tid * 4; e < count * (count - 1) / 2; e += kSweepThreads * 4)
          *reinterpret_cast<float4*>(pair + e) = *reinterpret_cast<const float4*>(exchange.pair + e);
        __syncthreads();
        if (warp == 0) draft_picks(candidates, done == 1, rule, pair, wanted, draft);
      } else if (tid == 0) {
        draft.token[0] = pick;
        draft.count = 1;
      }
      __syncthreads();

      // (3) sweep
      const int count = draft.count;
      if (tid < count) {  // read in the sweep, which has barriers
        if (Rule::kByPick) draft_parameter[tid] = parameter_of(draft.token[tid]);
        if (own.norms) draft.norm[tid] = own.norms[draft.token[tid]];
      }
      const auto add = [&](int64_t i, int slot, const float* sqdist) {
        if (i >= own.item.tokens) return;
        const float parameter = Rule::kByToken ? parameter_of(i) : 0.f;
        float value = own.now[own.place(slot, i)], *to = own.later + own.place(slot, i);
        const int64_t stride = own.stride;
#pragma unroll
        for (int p = 0; p < kSweepPoints; ++p) {
          if (p >= count) continue;
          const float added = rule.weight(sqdist[p], parameter, Rule::kByPick ? draft_parameter[p] : 0.f);
          value = i == draft.token[p] ? kInfinity : Rule::add(value, added);
          *to = value;
          to += stride;
        }
      };
      Sweep::run(rows, entry, own.item, aligned, own.norms, own.centre, draft, rank, group_blocks, add);

      // (4) verify
      find_next(count);
      int made = 1;
      while (made < count && static_cast<int>(key_index(next[made - 1])) == draft.token[made]) ++made;
      for (int p = 1; p < made; ++p, ++done)
        if (rank == 0 && tid == 0) out[own.item.out + done] = draft.token[p];
      pick = static_cast<int>(key_index(next[made - 1]));

      // (5) commit
      LowestKeys<kWarpOffers> low;
      for (int slot = tid; slot < own.slots; slot += kSweepThreads) {
        const int64_t i = token_of(slot);
        if (i >= own.item.tokens) continue;
        const float value = own.later[(made - 1) * own.stride + own.place(slot, i)];
        own.now[own.place(slot, i)] = value;
        if (value < kNonFinitePotential) low.take(make_key(value, static_cast<uint32_t>(i)));
      }
      offer(low);
      barrier.sync();
    }
  }
}

}  // namespace sts
