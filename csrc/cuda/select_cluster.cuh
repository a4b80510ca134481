// Greedy selection of one large item by a thread block cluster, over the stored weights of all pairs. One exchange of messages makes up to
// kClusterPicks picks.
//
// What: the blocks of a cluster share the tokens of an item; potentials are in registers. Every warp holds the same table of candidates:
//   up to 7 tokens of low potential from each warp of the cluster. Their exact potentials are in registers, the weights of their pairs in
//   shared memory. So every warp can run the plain loop among the candidates without hearing from the others.
// Bound: no token outside the table has a potential below the bound. Every exchange starts with the lowest potential outside the table.
//   Where the weight depends on the distance alone (kOfDistance), every pick adds its row minimum (row_min) to the bound. For other rules
//   the bound stays, as potentials never fall. Rule::add is monotone in float32: a candidate below the bound is the pick of the plain loop,
//   bit for bit.
// Chosen when: items have more than kClusterFrom tokens, and there are four or eight SMs for each; compute capability 9.0 or newer, with
//   shared memory for a ClusterExchange. A shorter item of the launch, or one without SMs to spare (StoredItems::shares), takes one block
//   of its cluster and the loop of select_stored.cuh.
// Steps, for every exchange:
//   (1) message: every warp sends its lowest token outside the table to all blocks, then the row of weights of the candidate that it
//     inserted in the exchange before. It waits for the messages and rows of all warps;
//   (2) insert: that token becomes a candidate if a slot of its warp is empty or holds a higher potential, and if it is one of the lowest
//     three of the messages of eight warps. The row of a candidate goes to all blocks; more candidates would hardly raise the bound. An
//     inserted candidate is pending until the next exchange, and the bound holds for it, as for a token outside the table;
//   (3) pick: the lowest candidate, as long as it is below the bound. If none is, the lowest token outside the table is the only pick;
//   (4) gather: the warp of an inserted candidate loads its row of weights, and every warp finds the slots that the next messages may
//     take, while the rows of the picks are in flight;
//   (5) add: all threads add the rows of the picks to the potentials, in pick order, and find their lowest token outside the table.
// Synchronisation: messages and rows are st.async stores into the shared memory of every block (DSMEM). An mbarrier of the receiving block
//   counts their bytes; there is one for each parity of the exchange, and no cluster barrier in the loop.
//   Invariant: a warp sends its message of exchange e + 1 after its last read in exchange e. A warp that has all messages of e + 1 may
//   overwrite what was read in e: messages are double-buffered. The row of a candidate inserted in e is written between the messages of e
//   and those of e + 1. Its slot is pending then, and nobody reads the row of a pending slot. Only the warp of a slot writes its row, and
//   never for two consecutive exchanges: before it writes again, all blocks have said that they have the previous row.
#pragma once
#include "select_stored.cuh"

namespace sts {

constexpr int kClusterWarps = 32;                        // max warps of a cluster: lane w of every warp holds the candidates of warp w
constexpr int kClusterTokens = 8;                        // max tokens per thread: 8 * 32 * 32 = kMatrixTokens
constexpr int kClusterBlocks = 8;                        // blocks of a cluster: this or half of it
constexpr int kClusterThreads = kClusterWarps / 4 * 32;  // max threads per block: the smallest cluster has 4 blocks
constexpr int kWarpCandidates = 7;                       // table slots ("ways") per warp
constexpr int kAllCandidates = kWarpCandidates * kClusterWarps;       // slot = way * 32 + warp
constexpr int kClusterPicks = 12;                                     // max picks per exchange
constexpr int kInsertGroups = 4;                                      // warps w, w + 4, w + 8, ... insert at most kGroupInserts
constexpr int kGroupInserts = 3;                                      // candidates per exchange together
constexpr int kClusterFromWarps = kClusterFrom / 32 / kStoredTokens;  // warps of a block that has an item of kClusterFrom tokens alone

// The message of a warp, to all blocks.
struct alignas(16) WarpMessage {
  Key lowest;       // the warp's lowest token outside the table: order_of its potential, then Candidate::bits
  float potential;  // potential of the candidate that the warp inserted in the exchange before; stale if it inserted none
  float parameter;  // parameter of the token in `lowest`
};

// Dynamic shared memory of a block, 203536 bytes. Every block has a copy, and all warps of the cluster write to all copies.
//   offset  field              bytes
//        0  arrivals[2]           16  mbarriers of the even and the odd exchanges
//       16  message[2][32]      1024  message[exchange % 2][warp]
//     1040  row_min[224]         896  row_min[slot]: minimum over all tokens, for the bound (kOfDistance)
//     1936  weight[224][225]  201600  weight[slot a][slot b], infinite for a = b
// row_min[a] and weight[a] are written once for a candidate, when it is inserted: its weights to all candidates of that exchange. So the
// weight of a pair is in the row of the candidate that was inserted later. 225 columns: elements (a, b) and (b, a) of one a and 32
// consecutive b, in any mixture, are on different banks.
struct ClusterExchange {
  Mbarrier arrivals[2];
  WarpMessage message[2][kClusterWarps];
  float row_min[kAllCandidates];
  float weight[kAllCandidates][kAllCandidates + 1];
};

// The low half of a candidate's key: breaks ties between equal potentials by token, the lowest first.
//   bits  31..29  28..16  15..13  12..0
//              0   token     way  exchange in which it was inserted; 0: not a candidate
// An exchange makes at least one pick, so there are at most 8192 exchanges. Nothing is inserted in exchange 0.
struct Candidate {
  uint32_t bits;
  __device__ __forceinline__ static Candidate make(int token, int way, int exchange) {
    return {static_cast<uint32_t>(token) << 16 | static_cast<uint32_t>(way) << 13 | static_cast<uint32_t>(exchange)};
  }
  __device__ __forceinline__ int token() const { return static_cast<int>(bits >> 16); }
  __device__ __forceinline__ int way() const { return static_cast<int>(bits >> 13 & 7); }
  __device__ __forceinline__ int inserted() const { return static_cast<int>(bits & 8191); }
  // warps: of the cluster, a power of two. Token t belongs to warp t / 32 % warps.
  __device__ __forceinline__ int slot(int warps) const { return way() * 32 + (token() / 32 & (warps - 1)); }
};
static_assert(kWarpCandidates <= 8 && kClusterTokens * kClusterWarps * 32 == 1 << 13, "3 bits for ways, 13 for tokens and for exchanges");

#if __CUDA_ARCH__ >= 900
// By a cluster: the picks of item b, which is number `launched` of the grid. kTokens: tokens per thread; number t is token
// (t * warps of the cluster + warp) * 32 + lane of the item.
// In a matrix the diagonal is infinite: the potential of a picked token becomes infinite.
// lookahead: max picks per exchange. row_min: (all tokens), the ordered bits of each row's minimum; not read by rules without kOfDistance.
template <class Rule, int kTokens>
__device__ __forceinline__ void select_cluster(const StoredItems& stored, int64_t launched, int64_t b, const Item& item, int lookahead,
                                               const uint32_t* row_min, const float* mean_sqdist, const Rule& rule, int64_t* out) {
  STS_DYNAMIC_SHARED(ClusterExchange, shared);
  const auto cluster = cooperative_groups::this_cluster();
  if (threadIdx.x < 2) mbarrier_init(&shared->arrivals[threadIdx.x]);
  const int blocks = static_cast<int>(cluster.num_blocks()), lane = threadIdx.x % 32;
  const int warps = blocks * (blockDim.x / 32), warp = cluster.block_rank() * (blockDim.x / 32) + threadIdx.x / 32;  // in the cluster
  const Items& items = stored.items;
  const int tokens = static_cast<int>(item.tokens), first = warp * 32 + lane, step = warps * 32;
  const int64_t first_row = items.first_token(b, item);              // index of token 0 among all tokens
  const uint32_t pitch = static_cast<uint32_t>(stored.pitch(item));  // <= 2^13: offsets have 26 bits
  const float* const matrix = settled(stored.matrix(launched));
  int64_t* picked = out + item.out;

  const int64_t picks = item.picks < tokens ? item.picks : tokens;
  for (int64_t i = picks + first; i < item.picks; i += step) picked[i] = -1;
  if (picks == 0) return;
  cluster.sync();  // before the first message: all blocks run, and their mbarriers are initialised

  // ---- Registers of the tokens of this thread ----
  const auto key_of = [](float potential, uint32_t bits) { return static_cast<Key>(order_of<Rule>(potential)) << 32 | bits; };
  const auto potential_of = [](Key key) { return from_order<Rule>(static_cast<uint32_t>(key >> 32)); };
  const Key no_token = key_of(kInfinity, ~0u);
  uint32_t column[kTokens];  // past the end the last token: its weights leave an infinite potential as it is
  float potential[kTokens], parameter[kTokens];
  Key lowest = no_token;  // the thread's lowest token outside the table, by first_key before exchange 0. (1) reduces it over the warp
#pragma unroll
  for (int t = 0; t < kTokens; ++t) {
    const int j = first + t * step;
    column[t] = static_cast<uint32_t>(j < tokens ? j : tokens - 1);
    potential[t] = kInfinity;
    parameter[t] = kOfDistance<Rule> ? 0.f : items.parameter_of(first_row + static_cast<int>(column[t]));
    if (j >= tokens) continue;
    const float distance = mean_sqdist[first_row + j];
    const float start = kOfDistance<Rule> ? kNonFinitePotential : items.start_of(first_row + j);
    potential[t] = first_potential(rule, distance < kInfinity, start, parameter[t]);
    lowest = lower(lowest, key_of(first_key(rule, distance, potential[t], items.start, parameter[t]), Candidate::make(j, 0, 0).bits));
  }
  float lowest_parameter = 0.f;   // parameter of the token in `lowest`; not read in exchange 0, which inserts nothing
  unsigned is_candidate = 0;      // bit t: token t of this thread is in the table, or was picked from it
  float pending_potential = 0.f;  // potential of this warp's pending candidate, for the next message

  // ---- Registers of the table: way h of warp `lane`, the same in every warp ----
  Candidate candidate[kWarpCandidates];
  float candidate_potential[kWarpCandidates], candidate_parameter[kWarpCandidates];  // infinite potential: the way is empty or pending
#pragma unroll
  for (int h = 0; h < kWarpCandidates; ++h)
    candidate[h] = Candidate::make(0, h, 0), candidate_potential[h] = kInfinity, candidate_parameter[h] = 0.f;
  int born[kWarpCandidates];  // exchange in which the way was inserted; -1: pending, its row must not be read
  int pending = -1;           // the way inserted in this exchange, valid until (2) of the next; -1: none
  // The way that a message of the next exchange may take, and its potential: the highest of those that are not pending. An empty way is
  // infinite.
  int victim = 0;
  float victim_potential = kInfinity;
  // The lowest key in the table.
  const auto lowest_candidate = [&] {
    float low = candidate_potential[0];
#pragma unroll
    for (int h = 1; h < kWarpCandidates; ++h) low = fminf(low, candidate_potential[h]);
    const uint32_t lowest_order = __reduce_min_sync(kFullWarp, order_of<Rule>(low));
    low = from_order<Rule>(lowest_order);
    uint32_t tie = ~0u;
#pragma unroll
    for (int h = 0; h < kWarpCandidates; ++h) tie = min(tie, candidate_potential[h] == low ? candidate[h].bits : ~0u);
    return static_cast<Key>(lowest_order) << 32 | __reduce_min_sync(kFullWarp, tie);
  };

  // ---- The candidate that this warp inserted in the exchange before ----
  constexpr unsigned row_bytes = (kAllCandidates + kOfDistance<Rule>)*sizeof(float);
  int inserted = -1, inserted_slot = 0;  // token, or -1; slot
  float inserted_row[kWarpCandidates];   // its weights to the candidates of warp `lane`
  uint32_t inserted_min = 0;             // ordered bits of its row minimum

  for (int exchange = 0, done = 0, inserts = 0;; ++exchange) {
    Mbarrier* const arrivals = &shared->arrivals[exchange & 1];
    // Bytes may arrive before they are expected: the phase stays open until this thread has arrived.
    if (threadIdx.x == 0) mbarrier_expect_tx(arrivals, warps * sizeof(WarpMessage) + inserts * row_bytes);

    // ---- (1) message: lane l sends to block l ----
    lowest = warp_lowest(lowest);
    if constexpr (!kOfDistance<Rule>)
      lowest_parameter = __shfl_sync(kFullWarp, lowest_parameter, Candidate{key_index(lowest)}.token() % 32);
    __syncwarp();  // all lanes have read from shared memory for the exchange before: the message says so to the cluster
    if (lane < blocks) store_async(&shared->message[exchange & 1][warp], {lowest, pending_potential, lowest_parameter}, arrivals, lane);
    if (inserted >= 0) {
#pragma unroll 1
      for (int block = 0; block < blocks; block += kClusterBlocks / 2)
#pragma unroll
        for (int h = 0; h < kWarpCandidates; ++h)
#pragma unroll
          for (int i = 0; i < kClusterBlocks / 2; ++i)
            store_async(&shared->weight[inserted_slot][h * 32 + lane], inserted_row[h], arrivals, block + i);
      if (kOfDistance<Rule> && lane < blocks) store_async(&shared->row_min[inserted_slot], from_ordered_bits(inserted_min), arrivals, lane);
    }
    mbarrier_wait(arrivals, exchange / 2);
    const WarpMessage message = lane < warps ? shared->message[exchange & 1][lane] : WarpMessage{no_token, kInfinity, 0.f};
    const Key lowest_outside = warp_lowest(message.lowest);  // lowest token outside the table

    // ---- (2) insert ----
    // The candidate inserted in the exchange before is complete: its row has arrived, its potential is in the message.
#pragma unroll
    for (int h = 0; h < kWarpCandidates; ++h)
      if (h == pending) candidate_potential[h] = message.potential;
    // Rank of the message among those of the warps of its group.
    const uint32_t proposed_order = static_cast<uint32_t>(message.lowest >> 32);
    int rank = 0;
#pragma unroll
    for (int peer = kInsertGroups; peer < kClusterWarps; peer += kInsertGroups)
      rank += __shfl_xor_sync(kFullWarp, proposed_order, peer) < proposed_order + ((lane ^ peer) < lane);
    // The lowest token of warp `lane` replaces the victim if its potential is lower. The bound holds for both: lowest_outside is at or
    // below the proposed token, which is below the evicted candidate.
    const int proposed = Candidate{key_index(message.lowest)}.token();
    pending = exchange > 0 && rank < kGroupInserts && potential_of(message.lowest) < victim_potential ? victim : -1;
    int evicted = -1;
#pragma unroll
    for (int h = 0; h < kWarpCandidates; ++h) {
      if (h != pending) continue;
      evicted = candidate_potential[h] < kInfinity ? candidate[h].token() : -1;
      candidate[h] = Candidate::make(proposed, h, exchange);
      candidate_parameter[h] = message.parameter;
      candidate_potential[h] = kInfinity;
    }
#pragma unroll
    for (int h = 0; h < kWarpCandidates; ++h) born[h] = h == pending ? -1 : candidate[h].inserted();

    // ---- (3) pick ----
    float row[kClusterPicks][kTokens], pick_parameter[kClusterPicks];  // row: weights of the picks to the tokens of this thread
    // Writes pick p of this exchange and starts the loads of its row, which (5) waits for.
    const auto emit_pick = [&](int p, int token, float token_parameter) {
      if (first == 0) picked[done + p] = token;
      pick_parameter[p] = token_parameter;
      const uint32_t begin = static_cast<uint32_t>(token) * pitch;
#pragma unroll
      for (int t = 0; t < kTokens; ++t) row[p][t] = __ldg(matrix + (begin + column[t]));
    };
    const int max_picks = static_cast<int>(picks - done < lookahead ? picks - done : lookahead);
    int count = 0;
    Key best = lowest_candidate();
    if (potential_of(best) < kInfinity && best < lowest_outside) {
      // The first pick is below `lowest_outside` as a key: at equal potential the lower token wins. A later pick must be below the bound,
      // as it is not known which token outside is at the bound.
      float bound = potential_of(lowest_outside);
#pragma unroll
      for (int p = 0; p < kClusterPicks; ++p) {
        if (p > 0 && (p >= max_picks || !(potential_of(best) < bound))) break;
        const Candidate chosen{key_index(best)};
        const int chosen_slot = chosen.slot(warps);
        if constexpr (kOfDistance<Rule>) bound = Rule::add(bound, shared->row_min[chosen_slot]);
        float weight[kWarpCandidates];
        const float* const of_chosen = &shared->weight[chosen_slot][lane];
        const float* const to_chosen = &shared->weight[lane][chosen_slot];
#pragma unroll
        for (int h = 0; h < kWarpCandidates; ++h)
          weight[h] = born[h] > chosen.inserted() ? to_chosen[h * 32 * (kAllCandidates + 1)] : of_chosen[h * 32];
        float chosen_parameter = 0.f;
        if constexpr (Rule::kByPick) {
          float of_lane[kWarpCandidates];  // halved until [0] is that of the way: a dynamic index would put it into local memory
#pragma unroll
          for (int h = 0; h < kWarpCandidates; ++h) of_lane[h] = candidate_parameter[h];
#pragma unroll
          for (int half = 4; half > 0; half /= 2)
#pragma unroll
            for (int h = 0; h + half < kWarpCandidates && h < half; ++h) of_lane[h] = chosen.way() & half ? of_lane[h + half] : of_lane[h];
          chosen_parameter = __shfl_sync(kFullWarp, of_lane[0], chosen_slot % 32);
        }
        emit_pick(p, chosen.token(), chosen_parameter);
        // An empty way adds a stale weight, and stays infinite, as does a pending way.
#pragma unroll
        for (int h = 0; h < kWarpCandidates; ++h)
          candidate_potential[h] = after_pick(rule, candidate_potential[h], weight[h], candidate_parameter[h], chosen_parameter);
        best = lowest_candidate();
        count = p + 1;
      }
    } else {
      // The only pick is the lowest token outside the table; in exchange 0 the first pick. Its weights to the candidates are in the matrix.
      const Candidate chosen{key_index(lowest_outside)};
      const int token =
          static_cast<int>(exchange == 0 ? first_pick(item, make_key(potential_of(lowest_outside), chosen.token())) : chosen.token());
      if (picks == 1) {  // reads no row: packed items of one pick have no weights
        if (first == 0) picked[0] = token;
        return;
      }
      const float token_parameter = Rule::kByPick ? items.parameter_of(first_row + token) : 0.f;
      emit_pick(0, token, token_parameter);
#pragma unroll
      for (int h = 0; h < kWarpCandidates; ++h)
        if (candidate_potential[h] < kInfinity)
          candidate_potential[h] =
              after_pick(rule, candidate_potential[h], __ldg(matrix + (static_cast<uint32_t>(token) * pitch + candidate[h].token())),
                         candidate_parameter[h], token_parameter);
      count = 1;
    }
    done += count;
    if (done == picks) return;  // all warps in the same exchange, after all its messages: nothing is sent to a block that has ended

    // ---- (4) gather ----
    // Of the candidate inserted for this warp, if any: mark the token, and start the loads of its row.
    inserts = __popc(__ballot_sync(kFullWarp, pending >= 0));
    inserted = __shfl_sync(kFullWarp, pending < 0 ? -1 : proposed, warp);
    inserted_slot = __shfl_sync(kFullWarp, pending, warp) * 32 + warp;
    evicted = __shfl_sync(kFullWarp, evicted, warp);
    if (inserted >= 0) {
#pragma unroll
      for (int t = 0; t < kTokens; ++t) {
        if (first + t * step == evicted) is_candidate &= ~(1u << t);
        if (first + t * step == inserted) is_candidate |= 1u << t;
      }
#pragma unroll
      for (int h = 0; h < kWarpCandidates; ++h)
        inserted_row[h] = __ldg(matrix + (static_cast<uint32_t>(inserted) * pitch + candidate[h].token()));
      if constexpr (kOfDistance<Rule>) inserted_min = __ldg(row_min + first_row + inserted);
    }
    victim_potential = -kInfinity;
#pragma unroll
    for (int h = 0; h < kWarpCandidates; ++h)
      if (h != pending && candidate_potential[h] > victim_potential) victim = h, victim_potential = candidate_potential[h];

    // ---- (5) add ----
    const int made = opaque(count);  // else the first addition, and its wait for all rows of the picks, is moved before (4)
    float low = kInfinity;
    int low_token = 0;
#pragma unroll
    for (int p = 0; p < kClusterPicks; ++p) {
      if (p >= made) break;
#pragma unroll
      for (int t = 0; t < kTokens; ++t) potential[t] = after_pick(rule, potential[t], row[p][t], parameter[t], pick_parameter[p]);
    }
#pragma unroll
    for (int t = 0; t < kTokens; ++t) {
      const int j = first + t * step;
      if (j == inserted) pending_potential = potential[t];
      if (!(is_candidate >> t & 1) && potential[t] < low) low = potential[t], low_token = j, lowest_parameter = parameter[t];
    }
    lowest = low < kInfinity ? key_of(low, Candidate::make(low_token, 0, 0).bits) : no_token;
    if (inserted >= 0) pending_potential = __shfl_sync(kFullWarp, pending_potential, inserted % 32);
  }
}
#endif

// One cluster per item.
template <class Rule, int kTokens>
__global__ void __launch_bounds__(kClusterThreads, 1)
    select_cluster_kernel(StoredItems stored, int lookahead, const uint32_t* row_min, const float* mean_sqdist, Rule rule, int64_t* out) {
#if __CUDA_ARCH__ >= 900
  await_predecessor();
  const auto cluster = cooperative_groups::this_cluster();
  const int blocks = static_cast<int>(cluster.num_blocks());
  const int64_t launched = blockIdx.x / blocks, b = stored.number(launched);
  if (b < 0) return;
  const Item item = stored.items[b];
  if (stored.shares(item, blocks))
    return select_cluster<Rule, kTokens>(stored, launched, b, item, lookahead, row_min, mean_sqdist, rule, out);
  if (cluster.block_rank() > 0) return;
  static_assert(kClusterWarps >= 8 * kClusterFromWarps, "see StoredItems::shares");
  if (item.tokens <= kClusterFrom)
    select_stored<Rule, kStoredTokens, kClusterFromWarps>(stored, launched, b, item, mean_sqdist, rule, out);
  else
    select_stored<Rule, kStoredTokens, 2 * kClusterFromWarps>(stored, launched, b, item, mean_sqdist, rule, out);
#else
  __trap();
#endif
}

// Calls f(kernel) with the kernel for items of up to `tokens`.
template <class Rule, class F>
auto with_cluster_kernel(int64_t tokens, const F& f) {
  if (tokens <= 32 * kClusterWarps * 2) return f(select_cluster_kernel<Rule, 2>);
  if (tokens <= 32 * kClusterWarps * 4) return f(select_cluster_kernel<Rule, 4>);
  return f(select_cluster_kernel<Rule, kClusterTokens>);
}

// The launch for `count` items, each shared by a cluster of `blocks`, a power of two. Warps per block: the fewest that give each of
// `tokens` a thread, up to kClusterWarps per cluster.
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
