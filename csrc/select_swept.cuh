// Streaming selection: no N x N matrix, for items of any size. Groups of resident blocks take an item each and stream its features; a sweep
// drafts several picks and verifies them.
//
// What: (1) draft: the plain loop among a few candidates of low potential, whose pair weights are computed beforehand;
//   (2) sweep: every block computes the weights of its tokens to the drafted picks, adds them in that order, and notes its lowest potential
//   after each; (3) verify: the lowest of all blocks. The first drafted pick is the pick at hand; each later one is right if it is the
//   lowest after the one before, and up to the first that is not the picks are the plain loop's, bit for bit; (4) commit: the weights of the
//   verified picks are added to the potentials. A wrong draft costs time and never a result.
// Chosen when: the matrix does not fit (kMatrixTokens), or few of many tokens are picked without tensor cores.
// Rules: any. Weights are stored with the parameters of token and pick in them. Where nothing tells tokens apart before the first pick
//   (no start), the first draft is poor: candidates are those furthest from the mean (repulsion) or the lowest indices.
// Synchronisation: three barriers of the group a sweep (GroupBarrier; the launch is cooperative): after the pair weights, after the lowest
//   potentials, after the commit.
#pragma once
#include "sqdist_sweep.cuh"
#include "token_stats.cuh"

namespace sts {

constexpr int kOffers = 2;                             // tokens that each warp offers as candidates
constexpr int kLaneCandidates = 4;                     // that each lane of the warp that guesses takes of them
constexpr int kCandidates = 1 + kLaneCandidates * 32;  // with the pick at hand

// What the blocks of one group share. Each array is written between two barriers, read after the second, and written again after
// a third; `lowest`, which may be needed at every barrier, in turns.
struct SweepExchange {
  Key* offers;         // (kOffers, warps of the group): their tokens of lowest potential
  float* pair_weight;  // (kCandidates, kCandidates)
  Key* lowest;         // (2, blocks of the group, kSweepPoints): their lowest after each pick of a sweep

  STS_HOST_DEVICE static int64_t keys(int blocks) { return static_cast<int64_t>(blocks) * (kOffers * kSweepWarps + 2 * kSweepPoints); }
  STS_HOST_DEVICE static int64_t floats() { return kCandidates * kCandidates; }
  __device__ SweepExchange(Key* group_keys, float* group_floats, int blocks)
      : offers(group_keys), pair_weight(group_floats), lowest(group_keys + blocks * kOffers * kSweepWarps) {}
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

// f(key) for keys[0], keys[step], ..., shared by the lanes of a warp, with several loads under way.
template <class F>
__device__ __forceinline__ void for_keys(const Key* keys, int count, int step, const F& f) {
  constexpr int kUnroll = 8;
  for (int begin = threadIdx.x % 32; begin < count; begin += 32 * kUnroll) {
    Key key[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) key[u] = begin + 32 * u < count ? keys[(begin + 32 * u) * step] : kNoKey;
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) f(key[u]);
  }
}

// Tokens that may be guessed; by a warp, the same in every block. Candidate 0 is `pick`, the others are those offered at the
// lowest keys in each lane's share of the offers, sixteen for every pick that is wanted; kNoKey where there is none.
__device__ __forceinline__ void choose_candidates(const Key* offers, int count, int pick, int wanted, Key (&candidate)[kCandidates]) {
  const int lane = threadIdx.x % 32;
  LowestKeys<kLaneCandidates> mine;
  for_keys(offers, count, 1, [&](Key offer) { mine.take(static_cast<int>(key_index(offer)) == pick ? kNoKey : offer); });
#pragma unroll
  for (int h = 0; h < kLaneCandidates; ++h) candidate[1 + 32 * h + lane] = 2 * h < wanted ? mine.key[h] : kNoKey;
  if (lane == 0) candidate[0] = make_key(0.f, static_cast<uint32_t>(pick));
}

// The weights of the pairs of candidates that fall to this warp of the group: row i has those of a pick of candidate i. first_row: of the
// item, among all tokens.
template <class scalar_t, class Rule>
__device__ __forceinline__ void weigh_pairs(const Rows<scalar_t>& rows, const Items& items, int64_t entry, const Item& item,
                                            int64_t first_row, bool aligned, const Rule& rule, const Key (&candidate)[kCandidates],
                                            int group_warp, int group_warps, float* pair_weight) {
  constexpr int kColumns = 2, kStrips = (kCandidates + kColumns - 1) / kColumns;  // pairs whose loads are under way together
  const auto row_of = [&](int slot) { return rows.row(entry, item.first + key_index(candidate[slot])); };
  for (int strip = group_warp; strip < kCandidates * kStrips; strip += group_warps) {
    const int i = strip / kStrips, j0 = strip % kStrips * kColumns;
    if (candidate[i] == kNoKey || i + 1 >= j0 + kColumns) continue;
    const scalar_t* other[kColumns];
    bool wanted[kColumns];
#pragma unroll
    for (int n = 0; n < kColumns; ++n) {
      const int j = j0 + n;
      wanted[n] = i < j && j < kCandidates && candidate[j < kCandidates ? j : 0] != kNoKey;
      other[n] = row_of(wanted[n] ? j : i);
    }
    float sqdist[kColumns];
    warp_sqdist(row_of(i), other, rows.channels, aligned, sqdist);
#pragma unroll
    for (int n = 0; n < kColumns; ++n) {
      const int j = j0 + n;
      if (!wanted[n] || threadIdx.x % 32 != 0) continue;
      const auto parameter_of = [&](int slot) { return kOfDistance<Rule> ? 0.f : items.parameter_of(first_row + key_index(candidate[slot])); };
      const float of_i = parameter_of(i), of_j = parameter_of(j);
      pair_weight[i * kCandidates + j] = rule.weight(sqdist[n], of_j, of_i);
      pair_weight[j * kCandidates + i] = rule.weight(sqdist[n], of_i, of_j);
    }
  }
}

// By a warp, the same in every block: the plain loop among the candidates. Their keys hold their potentials; where the mean decides the
// `first` pick, from then on.
template <class Rule>
__device__ __forceinline__ void guess_picks(const Key (&candidate)[kCandidates], bool first, const float* pair_weight, int wanted,
                                            SweepPoints& guess) {
  const int lane = threadIdx.x % 32;
  Key key[kLaneCandidates];
  float potential[kLaneCandidates];
#pragma unroll
  for (int h = 0; h < kLaneCandidates; ++h) {
    key[h] = candidate[1 + 32 * h + lane];
    potential[h] = key[h] == kNoKey ? kInfinity : first && Rule::kFromMean ? Rule::start(0.f, 0.f) : key_value(key[h]);
  }
  int chosen = 0, count = 1;
  while (count < wanted) {
    Key best = kNoKey;
#pragma unroll
    for (int h = 0; h < kLaneCandidates; ++h) {
      const int slot = 1 + 32 * h + lane;
      if (potential[h] < kInfinity) potential[h] = Rule::add(potential[h], pair_weight[chosen * kCandidates + slot]);
      best = lower(best, make_key(potential[h], slot));
    }
    best = warp_lowest(best);
    if (!(key_value(best) < kLastResort)) break;
    chosen = static_cast<int>(key_index(best));
#pragma unroll
    for (int h = 0; h < kLaneCandidates; ++h) {
      if (chosen != 1 + 32 * h + lane) continue;
      potential[h] = kInfinity;
      guess.token[count] = static_cast<int>(key_index(key[h]));
    }
    ++count;
  }
  if (lane == 0) {
    guess.token[0] = static_cast<int>(key_index(candidate[0]));
    guess.count = count;
  }
}

// Groups of resident blocks; group g takes items g, g + groups, ... `potential` holds the distances to the mean on entry. listed: null, or
// how many items there are to take, and which; then there are no more groups than items. most_groups, most_blocks: of a group, at the most.
// weights: (lookahead, all tokens). keys: of as many blocks. floats, arrived: a SweepExchange's and a zero for every group.
template <class Sweep, class scalar_t, class Rule>
__global__ void __launch_bounds__(kSweepThreads, 2)
    select_swept_kernel(Rows<scalar_t> rows, Items items, const int* listed, bool aligned, int most_groups, int most_blocks, int lookahead,
                        Rule rule, const float* norms, const scalar_t* centre, float* potential, float* weights, Key* keys, float* floats,
                        unsigned* arrived, int64_t* out) {
  __shared__ Key candidate[kCandidates], lowest[kSweepWarps][kSweepPoints], next[kSweepPoints];
  __shared__ SweepPoints guess;
  __shared__ float guess_parameter[kSweepPoints];
  __shared__ int count, groups, group_blocks;  // of items and of blocks: no registers are left for them
  if (threadIdx.x == 0) {
    count = listed ? listed[0] : static_cast<int>(items.count);
    groups = min(count, most_groups);
    group_blocks = groups ? min(static_cast<int>(gridDim.x) / groups, most_blocks) : 1;
  }
  __syncthreads();
  const int group = blockIdx.x / group_blocks, rank = blockIdx.x % group_blocks;
  if (group >= groups) return;
  const int tid = threadIdx.x, lane = tid % 32, warp = tid / 32, group_warp = rank * kSweepWarps + warp;
  const int64_t first_token = static_cast<int64_t>(rank) * kSweepThreads + tid;
  const SweepExchange shared(keys + group * SweepExchange::keys(group_blocks), floats + group * SweepExchange::floats(), group_blocks);
  GroupBarrier barrier(arrived + group, group_blocks);
  int turn = 0;

  for (int at = group; at < count; at += groups) {
    const int64_t b = listed ? listed[1 + at] : at;
    const Item item = items[b];
    const int64_t entry = items.packed() ? 0 : b, picks = item.picks < item.tokens ? item.picks : item.tokens;
    int64_t* picked = out + item.out;
    if (rank == 0)
      for (int64_t i = picks + tid; i < item.picks; i += kSweepThreads) picked[i] = -1;
    if (picks == 0) continue;
    const int64_t first_row = items.first_token(b, item), stride = all_tokens(items);  // among all tokens
    float *mine = potential + first_row, *weight = weights + first_row;
    const auto offer = [&](LowestKeys<kOffers> low) {
#pragma unroll
      for (int h = 0; h < kOffers; ++h) {
        const Key key = low.pop();
        if (lane == 0) shared.offers[h * group_blocks * kSweepWarps + group_warp] = key;
      }
    };
    // The lowest of all blocks after every one of `count` picks; each warp has its own in `lowest`.
    const auto find_next = [&](int count) {
      Key* const all = shared.lowest + (turn++ & 1) * group_blocks * kSweepPoints;
      __syncthreads();
      if (tid < count) {
        Key best = kNoKey;
        for (int w = 0; w < kSweepWarps; ++w) best = lower(best, lowest[w][tid]);
        all[rank * kSweepPoints + tid] = best;
      }
      barrier.sync();
      for (int p = warp; p < count; p += kSweepWarps) {
        Key best = kNoKey;
        for_keys(all + p, group_blocks, kSweepPoints, [&](Key key) { best = lower(best, key); });
        best = warp_lowest(best);
        if (lane == 0) next[p] = best;
      }
      __syncthreads();
    };

    // The first pick. Those that follow have low potentials; where these are all equal, they will be far from the first, and so from the
    // mean.
    Key nearest = kNoKey;
    LowestKeys<kOffers> furthest;
    for (int64_t i = first_token; i < item.tokens; i += int64_t(group_blocks) * kSweepThreads) {
      const float distance = mine[i];
      const float parameter = kOfDistance<Rule> ? 0.f : items.parameter_of(first_row + i);
      const float start = kOfDistance<Rule> || !items.start ? kLastResort : items.start[first_row + i];
      const float before = first_potential(rule, distance < kInfinity, start, parameter);
      mine[i] = before;
      nearest = lower(nearest, make_key(first_key(rule, distance, before, items.start, parameter), static_cast<uint32_t>(i)));
      if (before < kLastResort) furthest.take(make_key(Rule::kFromMean ? -distance : before, static_cast<uint32_t>(i)));
    }
    offer(furthest);
    nearest = warp_lowest(nearest);
    if (lane == 0) lowest[warp][0] = nearest;
    find_next(1);
    int64_t pick = first_pick(item, next[0]);

    for (int64_t done = 0;;) {
      if (rank == 0 && tid == 0) picked[done] = pick;
      if (++done == picks) break;

      const int wanted = static_cast<int>(picks - done < lookahead ? picks - done : lookahead);
      if (wanted > 1) {
        if (warp == 0) choose_candidates(shared.offers, group_blocks * kSweepWarps * kOffers, static_cast<int>(pick), wanted, candidate);
        __syncthreads();
        weigh_pairs(rows, items, entry, item, first_row, aligned, rule, candidate, group_warp, group_blocks * kSweepWarps,
                    shared.pair_weight);
        barrier.sync();
        if (warp == 0) guess_picks<Rule>(candidate, done == 1, shared.pair_weight, wanted, guess);
      } else if (tid == 0) {
        guess.token[0] = static_cast<int>(pick);
        guess.count = 1;
      }
      __syncthreads();

      const int count = guess.count;
      if (Rule::kByPick && tid < count) guess_parameter[tid] = items.parameter_of(first_row + guess.token[tid]);  // a sweep has barriers
      Key best = kNoKey;  // of this warp's tokens, after pick `lane`
      const float* item_norms = norms ? norms + first_row : nullptr;
      const scalar_t* item_centre = centre ? centre + b * rows.channels : nullptr;
      Sweep::run(rows, entry, item, aligned, item_norms, item_centre, guess, rank, group_blocks, [&](int64_t i, const float* sqdist) {
        float value = i < item.tokens ? mine[i] : kInfinity;
        const float parameter = Rule::kByToken && i < item.tokens ? items.parameter_of(first_row + i) : 0.f;
#pragma unroll
        for (int p = 0; p < kSweepPoints; ++p) {
          if (p >= count) continue;
          Key key = kNoKey;
          if (i < item.tokens) {
            const float added = rule.weight(sqdist[p], parameter, Rule::kByPick ? guess_parameter[p] : 0.f);
            weight[p * stride + i] = added;
            value = i == guess.token[p] ? kInfinity : Rule::add(value, added);
            key = make_key(value, static_cast<uint32_t>(i));
          }
          key = warp_lowest(key);
          if (lane == p) best = lower(best, key);
        }
      });
      if (lane < kSweepPoints) lowest[warp][lane] = best;
      find_next(count);

      int made = 1;
      while (made < count && static_cast<int>(key_index(next[made - 1])) == guess.token[made]) ++made;
      for (int p = 1; p < made; ++p, ++done)
        if (rank == 0 && tid == 0) picked[done] = guess.token[p];
      pick = key_index(next[made - 1]);

      LowestKeys<kOffers> low;
      for (int64_t i = first_token; i < item.tokens; i += int64_t(group_blocks) * kSweepThreads) {
        float value = mine[i];
        for (int p = 0; p < made; ++p) value = i == guess.token[p] ? kInfinity : Rule::add(value, weight[p * stride + i]);
        mine[i] = value;
        if (value < kLastResort) low.take(make_key(value, static_cast<uint32_t>(i)));
      }
      offer(low);
      barrier.sync();
    }
  }
}

}  // namespace sts
