// Selection over the stored weights of all pairs of a large item, by a thread block cluster: blocks share the tokens, each reads its columns of
// a row, and one exchange of messages makes several picks.
//
// What: candidates are a few tokens of low potential of each warp. Every warp keeps the same account of all candidates, lane w of warp w's:
//   exact potentials in registers, stored values of their pairs in shared memory. All other tokens are at or above a bound. A candidate
//   below the bound is the plain loop's next pick, bit for bit, whichever rule adds (addition is monotone to the bit).
// Bound: the lowest potential among the tokens that are no candidates. Where the weight depends on the distance alone, every pick raises it
//   by the row minimum of the pick (row_min); for the other rules potentials never fall, and the bound stays.
// Chosen when: items are large (kClusterFrom) and few enough for four or eight SMs each; compute capability 9.0.
// Steps, for every exchange:
//   (1) every warp sends its lowest token that is no candidate to all blocks, and awaits all reports;
//   (2) that token becomes a candidate of its warp, for the highest of its four; its row is loaded, and sent for the exchange after next;
//   (3) picks among the candidates while the lowest is below the bound, else the one lowest token outside;
//   (4) all threads add the rows of the picks, in pick order, and find their lowest token.
// Synchronisation: DSMEM messages (st.async) that an mbarrier per exchange parity counts; no cluster barrier in the loop. A warp that has all
//   reports of an exchange knows that every reader is done with the exchange before, so reports are double-buffered.
#pragma once
#include "select_stored.cuh"

namespace sts {

constexpr int kClusterWarps = 32;                        // of an item at the most: a lane keeps account of each
constexpr int kClusterTokens = 8;                        // that a thread holds at the most
constexpr int kClusterThreads = kClusterWarps / 4 * 32;  // of a block at the most: clusters are of four or eight
constexpr int kWarpCandidates = 4;
constexpr int kAllCandidates = kWarpCandidates * kClusterWarps;  // place h * 32 + w: candidate h of warp w
constexpr int kClusterPicks = 8;                                 // in a sweep at the most

// What a warp says to all blocks before a sweep.
struct alignas(16) WarpMessage {
  Key lowest;       // of its tokens that are no candidates
  float potential;  // of the token that has become a candidate last
  float parameter;  // of the token of `lowest`
};

// In every block of the cluster, written by all of them. Nobody waits for those who read it: a warp that has everyone's reports on a sweep
// knows that they are done with the one before.
struct ClusterExchange {
  Mbarrier arrivals[2];  // in turns: some warps may be a sweep ahead
  WarpMessage report[2][kClusterWarps];
  // A candidate's row is written when it comes, and has the weights to those that are there then; so of two candidates' rows that of
  // the later has the pair's. At its own place: the smallest weight to any token. With a float more a column's elements are on
  // different banks.
  float weight[kAllCandidates][kAllCandidates + 1];
};

// What orders candidates of equal potential: their token. Below it are which candidate of its warp it is, and in which sweep it came: 0
// before its row is there.
struct Candidate {
  uint32_t bits;
  __device__ __forceinline__ static Candidate make(int token, int which, int came) {
    return {static_cast<uint32_t>(token) << 15 | static_cast<uint32_t>(which) << 13 | static_cast<uint32_t>(came)};
  }
  __device__ __forceinline__ int token() const { return static_cast<int>(bits >> 15); }
  __device__ __forceinline__ int came() const { return static_cast<int>(bits & 8191); }
  // warps: of the item, a power of two.
  __device__ __forceinline__ int place(int warps) const { return static_cast<int>(bits >> 13 & 3) * 32 + (token() / 32 & (warps - 1)); }
};
static_assert(kWarpCandidates == 4 && kClusterTokens * kClusterWarps * 32 == 1 << 13, "2, and 13 bits for tokens as for sweeps");

// A cluster per item. Token t of a thread is the item's token (t * warps of the cluster + its warp) * 32 + its lane.
// On the diagonal weights are infinite, and so is the potential of a token that has been picked. row_min: (all tokens), the ordered bits of
// the smallest weight in each token's row.
template <class Rule, int kTokens>
__global__ void __launch_bounds__(kClusterThreads, 1)
    select_cluster_kernel(StoredItems stored, int lookahead, const uint32_t* row_min, const float* mean_sqdist, Rule rule, int64_t* out) {
#if __CUDA_ARCH__ >= 900
  await_predecessor();
  STS_DYNAMIC_SHARED(ClusterExchange, board);
  const auto cluster = cooperative_groups::this_cluster();
  if (threadIdx.x < 2) mbarrier_init(&board->arrivals[threadIdx.x]);
  const int blocks = static_cast<int>(cluster.num_blocks()), lane = threadIdx.x % 32;
  const int warps = blocks * (blockDim.x / 32), warp = cluster.block_rank() * (blockDim.x / 32) + threadIdx.x / 32;
  const Items& items = stored.items;
  const int64_t b = stored.number(blockIdx.x / blocks);
  if (b < 0) return;
  const Item item = items[b];
  const int tokens = static_cast<int>(item.tokens), first = warp * 32 + lane, step = warps * 32;
  const int64_t pitch = stored.pitch(item), first_row = items.first_token(b, item);  // among all tokens
  const float* matrix = stored.matrix(blockIdx.x / blocks);
  int64_t* picked = out + item.out;

  const int64_t picks = item.picks < tokens ? item.picks : tokens;
  for (int64_t i = picks + first; i < item.picks; i += step) picked[i] = -1;
  if (picks == 0) return;
  cluster.sync();  // nothing may be sent to a block that has not started

  const Key nothing = make_key(kInfinity, ~0u);
  uint32_t column[kTokens];  // this thread's tokens; past the end the last one, whose weights an infinite potential does not feel
  float potential[kTokens], parameter[kTokens];
  Key lowest = nothing;
#pragma unroll
  for (int t = 0; t < kTokens; ++t) {
    const int j = first + t * step;
    column[t] = static_cast<uint32_t>(j < tokens ? j : tokens - 1);
    potential[t] = kInfinity;
    parameter[t] = kOfDistance<Rule> ? 0.f : items.parameter_of(first_row + static_cast<int>(column[t]));
    if (j >= tokens) continue;
    const float distance = mean_sqdist[first_row + j];
    const float start = kOfDistance<Rule> || !items.start ? kNonFinitePotential : items.start[first_row + j];
    potential[t] = first_potential(rule, distance < kInfinity, start, parameter[t]);
    lowest = lower(lowest, make_key(first_key(rule, distance, potential[t], items.start, parameter[t]), Candidate::make(j, 0, 0).bits));
  }
  float low_parameter = 0.f;  // of this thread's lowest; not needed before the first candidates
  unsigned is_candidate = 0;  // bit t: token t of this thread
  float newest_potential = 0.f;

  // The account of the candidates of warp `lane`. Without a token, or with one whose row is still to come, the potential is infinite.
  Candidate candidate[kWarpCandidates];
  float value[kWarpCandidates], candidate_parameter[kWarpCandidates];
#pragma unroll
  for (int h = 0; h < kWarpCandidates; ++h) candidate[h] = Candidate::make(0, h, 0), value[h] = kInfinity, candidate_parameter[h] = 0.f;
  int newest = -1;  // the one that came last, for one sweep
  const auto lowest_candidate = [&] {
    float low = value[0];
#pragma unroll
    for (int h = 1; h < kWarpCandidates; ++h) low = fminf(low, value[h]);
    const uint32_t lowest_bits = __reduce_min_sync(kFullWarp, ordered_bits(low));
    low = from_ordered_bits(lowest_bits);
    uint32_t which = ~0u;
#pragma unroll
    for (int h = 0; h < kWarpCandidates; ++h) which = min(which, value[h] == low ? candidate[h].bits : ~0u);
    return static_cast<Key>(lowest_bits) << 32 | __reduce_min_sync(kFullWarp, which);
  };

  for (int sweep = 0, done = 0, rows_sent = 0;; ++sweep) {
    Mbarrier* const arrivals = &board->arrivals[sweep & 1];
    if (threadIdx.x == 0) mbarrier_expect_tx(arrivals, warps * sizeof(WarpMessage) + rows_sent * kAllCandidates * sizeof(float));
    // (1)
    lowest = warp_lowest(lowest);
    if constexpr (!kOfDistance<Rule>) low_parameter = __shfl_sync(kFullWarp, low_parameter, Candidate{key_index(lowest)}.token() % 32);
    __syncwarp();  // all lanes are done with the sweep before
    if (lane < blocks) store_async(&board->report[sweep & 1][warp], {lowest, newest_potential, low_parameter}, arrivals, lane);
    mbarrier_wait(arrivals, sweep / 2);
    const WarpMessage report = lane < warps ? board->report[sweep & 1][lane] : WarpMessage{nothing, kInfinity, 0.f};
    const Key outside = warp_lowest(report.lowest);  // the lowest of all tokens but the candidates

    // (2) The lowest of a warp takes the place of its highest candidate, if that is higher, or an empty one.
    int highest = 0;
    float highest_value = -kInfinity;
#pragma unroll
    for (int h = 0; h < kWarpCandidates; ++h) {
      if (h == newest) value[h] = report.potential, candidate[h].bits |= static_cast<uint32_t>(sweep - 1);
      if (value[h] > highest_value) highest = h, highest_value = value[h];
    }
    const int offered = Candidate{key_index(report.lowest)}.token();
    newest = sweep > 0 && key_value(report.lowest) < highest_value ? highest : -1;
    int leaver = -1;
#pragma unroll
    for (int h = 0; h < kWarpCandidates; ++h) {
      if (h != newest) continue;
      leaver = value[h] < kInfinity ? candidate[h].token() : -1;
      candidate[h] = Candidate::make(offered, h, 0);
      candidate_parameter[h] = report.parameter;
      value[h] = kInfinity;
    }
    rows_sent = __popc(__ballot_sync(kFullWarp, newest >= 0));

    // Of the newcomer of this warp, if there is one: which of its tokens are candidates now, and the row.
    const int newcomer = __shfl_sync(kFullWarp, newest < 0 ? -1 : offered, warp);
    const int newcomer_place = __shfl_sync(kFullWarp, newest, warp) * 32 + warp;
    leaver = __shfl_sync(kFullWarp, leaver, warp);
    float newcomer_row[kWarpCandidates];
    if (newcomer >= 0) {
#pragma unroll
      for (int t = 0; t < kTokens; ++t) {
        if (first + t * step == leaver) is_candidate &= ~(1u << t);
        if (first + t * step == newcomer) is_candidate |= 1u << t;
      }
#pragma unroll
      for (int h = 0; h < kWarpCandidates; ++h) {
        // As it was loaded: what is done with it would wait for it, and it is not needed before it is sent.
        const bool itself = kOfDistance<Rule> && h * 32 + lane == newcomer_place;
        newcomer_row[h] = __ldg(itself ? reinterpret_cast<const float*>(row_min) + (first_row + newcomer)
                                       : matrix + newcomer * pitch + candidate[h].token());
      }
    }

    // (3) The picks of this sweep, and this thread's share of their rows.
    float row[kClusterPicks][kTokens], pick_parameter[kClusterPicks];
    const auto take = [&](int p, int token, float its_parameter) {
      if (first == 0) picked[done + p] = token;
      pick_parameter[p] = its_parameter;
      const uint32_t begin = static_cast<uint32_t>(token) * static_cast<uint32_t>(pitch);  // below 2^26
#pragma unroll
      for (int t = 0; t < kTokens; ++t) row[p][t] = __ldg(matrix + (begin + column[t]));
    };
    const int wanted = static_cast<int>(picks - done < lookahead ? picks - done : lookahead);
    int count = 0;
    Key best = lowest_candidate();
    if (key_value(best) < kInfinity && best < outside) {
      float bound = key_value(outside);
#pragma unroll
      for (int p = 0; p < kClusterPicks; ++p) {
        if (p > 0 && (p >= wanted || !(key_value(best) < bound))) break;
        const Candidate chosen{key_index(best)};
        const int place = chosen.place(warps);
        if constexpr (kOfDistance<Rule>) bound = Rule::add(bound, board->weight[place][place]);
        float its_parameter = 0.f;
        if constexpr (Rule::kByPick) {
          const float low = place & 32 ? candidate_parameter[1] : candidate_parameter[0];  // no index: the array stays in registers
          const float high = place & 32 ? candidate_parameter[3] : candidate_parameter[2];
          its_parameter = __shfl_sync(kFullWarp, place & 64 ? high : low, place % 32);
        }
        take(p, chosen.token(), its_parameter);
#pragma unroll
        for (int h = 0; h < kWarpCandidates; ++h) {
          // Where there is no potential nothing changes, and what is read has been there before.
          const int its = h * 32 + lane;
          const float weight = candidate[h].came() > chosen.came() ? board->weight[its][place] : board->weight[place][its];
          value[h] = its == place ? kInfinity : after_pick(rule, value[h], weight, candidate_parameter[h], its_parameter);
        }
        best = lowest_candidate();
        count = p + 1;
      }
    } else {
      const Candidate other{key_index(outside)};
      const int token = static_cast<int>(sweep == 0 ? first_pick(item, make_key(key_value(outside), other.token())) : other.token());
      if (picks == 1) {  // packed items of one pick have no weights
        if (first == 0) picked[0] = token;
        return;
      }
      const float its_parameter = Rule::kByPick ? items.parameter_of(first_row + token) : 0.f;
      take(0, token, its_parameter);
#pragma unroll
      for (int h = 0; h < kWarpCandidates; ++h)
        if (value[h] < kInfinity)
          value[h] =
              after_pick(rule, value[h], __ldg(matrix + token * pitch + candidate[h].token()), candidate_parameter[h], its_parameter);
      count = 1;
    }
    done += count;
    if (done == picks) return;

    // (4)
    float low = kInfinity;
    int low_token = 0;
#pragma unroll
    for (int p = 0; p < kClusterPicks; ++p) {
      if (p >= count) break;
#pragma unroll
      for (int t = 0; t < kTokens; ++t) potential[t] = after_pick(rule, potential[t], row[p][t], parameter[t], pick_parameter[p]);
    }
#pragma unroll
    for (int t = 0; t < kTokens; ++t) {
      const int j = first + t * step;
      if (j == newcomer) newest_potential = potential[t];
      if (!(is_candidate >> t & 1) && potential[t] < low) low = potential[t], low_token = j, low_parameter = parameter[t];
    }
    lowest = low < kInfinity ? make_key(low, Candidate::make(low_token, 0, 0).bits) : nothing;
    if (newcomer < 0) continue;
    newest_potential = __shfl_sync(kFullWarp, newest_potential, newcomer % 32);
#pragma unroll
    for (int h = 0; h < kWarpCandidates; ++h)
      if (kOfDistance<Rule> && h * 32 + lane == newcomer_place) newcomer_row[h] = from_ordered_bits(__float_as_uint(newcomer_row[h]));
    Mbarrier* const next_arrivals = &board->arrivals[(sweep + 1) & 1];
    for (int block = 0; block < blocks; ++block)
#pragma unroll
      for (int h = 0; h < kWarpCandidates; ++h)
        store_async(&board->weight[newcomer_place][h * 32 + lane], newcomer_row[h], next_arrivals, block);
  }
#else
  __trap();
#endif
}

// f(kernel) for the kernel that shares items of at most so many tokens.
template <class Rule, class F>
auto with_cluster_kernel(int64_t tokens, const F& f) {
  if (tokens <= 32 * kClusterWarps * 2) return f(select_cluster_kernel<Rule, 2>);
  if (tokens <= 32 * kClusterWarps * 4) return f(select_cluster_kernel<Rule, 4>);
  return f(select_cluster_kernel<Rule, kClusterTokens>);
}

// `count` items, each shared by a cluster of `blocks`, a power of two.
inline Launch cluster_launch(int64_t tokens, int64_t count, int blocks, cudaStream_t stream) {
  int warps = 1;
  while (warps < kClusterWarps / blocks && 32 * warps * blocks < tokens) warps *= 2;
  return {dim3(static_cast<unsigned>(count * blocks)),
          dim3(static_cast<unsigned>(32 * warps)),
          sizeof(ClusterExchange),
          static_cast<unsigned>(blocks),
          false,
          stream,
          true};
}

}  // namespace sts
