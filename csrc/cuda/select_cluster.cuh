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

// A key of the table: order_of a potential, then Candidate::bits.
template <class Rule>
__device__ __forceinline__ Key candidate_key(float potential, Candidate candidate) {
  return static_cast<Key>(order_of<Rule>(potential)) << 32 | candidate.bits;
}
template <class Rule>
__device__ __forceinline__ float candidate_potential(Key key) {
  return from_order<Rule>(static_cast<uint32_t>(key >> 32));
}
__device__ __forceinline__ Candidate candidate_of(Key key) { return {key_index(key)}; }
template <class Rule>
__device__ __forceinline__ Key no_candidate() {
  return candidate_key<Rule>(kInfinity, {~0u});
}

#if __CUDA_ARCH__ >= 900
// The place of a thread in its cluster, and its tokens: first, first + step, first + 2 * step, ...
struct ClusterThread {
  int blocks, warps, warp, lane;  // warps: of the cluster; warp: in the cluster
  int first, step;

  __device__ __forceinline__ ClusterThread() {
    const auto cluster = cooperative_groups::this_cluster();
    blocks = static_cast<int>(cluster.num_blocks()), warps = blocks * (blockDim.x / 32);
    warp = cluster.block_rank() * (blockDim.x / 32) + threadIdx.x / 32, lane = threadIdx.x % 32;
    first = warp * 32 + lane, step = warps * 32;
  }
  // Number t of the thread's tokens. May be past the end of the item.
  __device__ __forceinline__ int token(int t) const { return first + t * step; }
};

// The item of a cluster. The diagonal of its matrix is infinite: the potential of a picked token becomes infinite.
struct ClusterItem {
  const Items& items;
  int tokens;
  int64_t first_row;  // index of token 0 among all tokens
  const float* matrix;
  uint32_t pitch;  // <= 2^13: offsets have 26 bits

  __device__ __forceinline__ float weight(int row, uint32_t column) const {
    return __ldg(matrix + (static_cast<uint32_t>(row) * pitch + column));
  }
  __device__ __forceinline__ float parameter(int token) const { return items.parameter_of(first_row + token); }
};

// The picks of an exchange: their weights to the tokens of this thread, and their parameters.
template <int kTokens>
struct PickRows {
  float weight[kClusterPicks][kTokens], parameter[kClusterPicks];
};

// Registers of the tokens of a thread. kTokens: tokens per thread; past the end of the item their potential is infinite.
template <class Rule, int kTokens>
struct ClusterTokens {
  uint32_t column[kTokens];  // past the end the last token: its weights leave an infinite potential as it is
  float potential[kTokens], parameter[kTokens];
  unsigned is_candidate = 0;          // bit t: token t is in the table, or was picked from it
  Key lowest = no_candidate<Rule>();  // the thread's lowest token outside the table, by first_key before exchange 0; (1) reduces it
  float lowest_parameter = 0.f;       // parameter of the token in `lowest`; not read in exchange 0, which inserts nothing

  __device__ __forceinline__ ClusterTokens(const ClusterItem& item, const float* mean_sqdist, const Rule& rule,
                                           const ClusterThread& thread) {
#pragma unroll
    for (int t = 0; t < kTokens; ++t) {
      const int j = thread.token(t);
      column[t] = static_cast<uint32_t>(j < item.tokens ? j : item.tokens - 1);
      potential[t] = kInfinity;
      parameter[t] = kOfDistance<Rule> ? 0.f : item.parameter(static_cast<int>(column[t]));
      if (j >= item.tokens) continue;
      const float distance = mean_sqdist[item.first_row + j];
      const float start = kOfDistance<Rule> ? kNonFinitePotential : item.items.start_of(item.first_row + j);
      potential[t] = first_potential(rule, distance < kInfinity, start, parameter[t]);
      const float first = first_key(rule, distance, potential[t], item.items.start, parameter[t]);
      lowest = lower(lowest, candidate_key<Rule>(first, Candidate::make(j, 0, 0)));
    }
  }

  // By a warp: `lowest` becomes the warp's lowest token outside the table.
  __device__ __forceinline__ void reduce_lowest() {
    lowest = warp_lowest(lowest);
    if constexpr (!kOfDistance<Rule>) lowest_parameter = __shfl_sync(kFullWarp, lowest_parameter, candidate_of(lowest).token() % 32);
  }

  // Starts the loads of the weights of a pick to these tokens. add() waits for them.
  __device__ __forceinline__ void load(const ClusterItem& item, int pick, float (&row)[kTokens]) const {
#pragma unroll
    for (int t = 0; t < kTokens; ++t) row[t] = item.weight(pick, column[t]);
  }

  // inserted, evicted: tokens that enter and leave the table. evicted = -1: none.
  __device__ __forceinline__ void mark(int inserted, int evicted, const ClusterThread& thread) {
#pragma unroll
    for (int t = 0; t < kTokens; ++t) {
      if (thread.token(t) == evicted) is_candidate &= ~(1u << t);
      if (thread.token(t) == inserted) is_candidate |= 1u << t;
    }
  }

  // Adds the weights of the first `count` picks, in pick order.
  __device__ __forceinline__ void add(const Rule& rule, const PickRows<kTokens>& picks, int count) {
#pragma unroll
    for (int p = 0; p < kClusterPicks; ++p) {
      if (p >= count) break;
#pragma unroll
      for (int t = 0; t < kTokens; ++t) potential[t] = after_pick(rule, potential[t], picks.weight[p][t], parameter[t], picks.parameter[p]);
    }
  }

  __device__ __forceinline__ void find_lowest(const ClusterThread& thread) {
    float low = kInfinity;
    int low_token = 0;
#pragma unroll
    for (int t = 0; t < kTokens; ++t) {
      const int j = thread.token(t);
      if (!(is_candidate >> t & 1) && potential[t] < low) low = potential[t], low_token = j, lowest_parameter = parameter[t];
    }
    lowest = low < kInfinity ? candidate_key<Rule>(low, Candidate::make(low_token, 0, 0)) : no_candidate<Rule>();
  }

  // By a warp: the potential of one of its tokens.
  __device__ __forceinline__ float potential_of(int token, const ClusterThread& thread) const {
    float found = 0.f;
#pragma unroll
    for (int t = 0; t < kTokens; ++t)
      if (thread.token(t) == token) found = potential[t];
    return __shfl_sync(kFullWarp, found, token % 32);
  }
};

// Rank of the message of warp `lane` among those of the warps of its group (kInsertGroups). proposed: `lowest` of the message.
__device__ __forceinline__ int insert_rank(Key proposed, int lane) {
  const uint32_t order = static_cast<uint32_t>(proposed >> 32);
  int rank = 0;
#pragma unroll
  for (int peer = kInsertGroups; peer < kClusterWarps; peer += kInsertGroups)
    rank += __shfl_xor_sync(kFullWarp, order, peer) < order + ((lane ^ peer) < lane);
  return rank;
}

// Registers of the table: the ways of warp `lane`. The same in every warp.
template <class Rule>
struct CandidateTable {
  Candidate candidate[kWarpCandidates];
  float potential[kWarpCandidates], parameter[kWarpCandidates];  // infinite potential: the way is empty or pending
  int born[kWarpCandidates];        // exchange in which the way was inserted; -1: pending, its row must not be read
  int pending = -1;                 // the way inserted in this exchange, valid until complete() in the next; -1: none
  int inserted = -1, evicted = -1;  // tokens that entered and left the table in this exchange; -1: none
  // The way that a message of the next exchange may take, and its potential: the highest of those that are not pending. An empty way is
  // infinite.
  int victim = 0;
  float victim_potential = kInfinity;

  __device__ __forceinline__ CandidateTable() {
#pragma unroll
    for (int h = 0; h < kWarpCandidates; ++h) candidate[h] = Candidate::make(0, h, 0), potential[h] = kInfinity, parameter[h] = 0.f;
  }

  // The candidate inserted in the exchange before is complete: its row has arrived, its potential is in the message.
  // A select: a conditional store to `potential` would become a branch.
  __device__ __forceinline__ void complete(const WarpMessage& message) {
#pragma unroll
    for (int h = 0; h < kWarpCandidates; ++h) potential[h] = h == pending ? message.potential : potential[h];
  }

  // The lowest token of warp `lane` replaces the victim if its potential is lower. The bound holds for both: the lowest token outside the
  // table is at or below the proposed token, which is below the evicted candidate.
  __device__ __forceinline__ void insert(const WarpMessage& message, int exchange, int lane) {
    const int rank = insert_rank(message.lowest, lane);
    const int way = exchange > 0 && rank < kGroupInserts && candidate_potential<Rule>(message.lowest) < victim_potential ? victim : -1;
    inserted = way < 0 ? -1 : candidate_of(message.lowest).token();
    evicted = -1;
#pragma unroll
    for (int h = 0; h < kWarpCandidates; ++h) {
      if (h != way) continue;
      evicted = potential[h] < kInfinity ? candidate[h].token() : -1;
      candidate[h] = Candidate::make(inserted, h, exchange);
      parameter[h] = message.parameter;
      potential[h] = kInfinity;
    }
#pragma unroll
    for (int h = 0; h < kWarpCandidates; ++h) born[h] = h == way ? -1 : candidate[h].inserted();
    pending = way;
  }

  // Number of candidates inserted in this exchange, of all warps.
  __device__ __forceinline__ int inserts() const { return __popc(__ballot_sync(kFullWarp, pending >= 0)); }

  // The lowest key in the table.
  __device__ __forceinline__ Key lowest() const {
    float low = potential[0];
#pragma unroll
    for (int h = 1; h < kWarpCandidates; ++h) low = fminf(low, potential[h]);
    const uint32_t lowest_order = __reduce_min_sync(kFullWarp, order_of<Rule>(low));
    low = from_order<Rule>(lowest_order);
    uint32_t tie = ~0u;
#pragma unroll
    for (int h = 0; h < kWarpCandidates; ++h) tie = min(tie, potential[h] == low ? candidate[h].bits : ~0u);
    return static_cast<Key>(lowest_order) << 32 | __reduce_min_sync(kFullWarp, tie);
  }

  // The parameter of a candidate of any warp.
  __device__ __forceinline__ float parameter_of(Candidate chosen, int slot) const {
    float of_lane[kWarpCandidates];  // halved until [0] is that of the way: a dynamic index would put it into local memory
#pragma unroll
    for (int h = 0; h < kWarpCandidates; ++h) of_lane[h] = parameter[h];
#pragma unroll
    for (int half = 4; half > 0; half /= 2)
#pragma unroll
      for (int h = 0; h + half < kWarpCandidates && h < half; ++h) of_lane[h] = chosen.way() & half ? of_lane[h + half] : of_lane[h];
    return __shfl_sync(kFullWarp, of_lane[0], slot % 32);
  }

  // Reads the weights of a candidate to those of this lane. The weight of an empty way and of a pending way is stale.
  __device__ __forceinline__ void read_weights(const ClusterExchange& shared, Candidate chosen, int slot, int lane,
                                               float (&weight)[kWarpCandidates]) const {
    const float* const of_chosen = &shared.weight[slot][lane];
    const float* const to_chosen = &shared.weight[lane][slot];
#pragma unroll
    for (int h = 0; h < kWarpCandidates; ++h)
      weight[h] = born[h] > chosen.inserted() ? to_chosen[h * 32 * (kAllCandidates + 1)] : of_chosen[h * 32];
  }

  // Adds the weights of a pick from the table. An empty way stays infinite, as does a pending way.
  __device__ __forceinline__ void add(const Rule& rule, const float (&weight)[kWarpCandidates], float pick_parameter) {
#pragma unroll
    for (int h = 0; h < kWarpCandidates; ++h) potential[h] = after_pick(rule, potential[h], weight[h], parameter[h], pick_parameter);
  }

  // Adds the weights of a pick from outside the table. They are in the matrix.
  __device__ __forceinline__ void add_outside(const Rule& rule, const ClusterItem& item, int pick, float pick_parameter) {
#pragma unroll
    for (int h = 0; h < kWarpCandidates; ++h)
      if (potential[h] < kInfinity)
        potential[h] = after_pick(rule, potential[h], item.weight(pick, candidate[h].token()), parameter[h], pick_parameter);
  }

  __device__ __forceinline__ void find_victim() {
    victim_potential = -kInfinity;
#pragma unroll
    for (int h = 0; h < kWarpCandidates; ++h)
      if (h != pending && potential[h] > victim_potential) victim = h, victim_potential = potential[h];
  }
};

// The candidate that a warp inserted, for the next message.
struct InsertedCandidate {
  int token = -1, evicted = -1;  // the token, and the one that it replaced; -1: none
  int slot = 0;
  float weight[kWarpCandidates];  // row: its weights to the candidates of warp `lane`
  uint32_t row_min = 0;           // ordered bits of its row minimum
  float potential = 0.f;

  // The candidate that the table inserted for `warp` in this exchange, if any. Starts the loads of its row.
  template <class Rule>
  __device__ __forceinline__ void load(const CandidateTable<Rule>& table, const ClusterItem& item, const uint32_t* all_row_min, int warp) {
    token = __shfl_sync(kFullWarp, table.inserted, warp);
    slot = __shfl_sync(kFullWarp, table.pending, warp) * 32 + warp;
    evicted = __shfl_sync(kFullWarp, table.evicted, warp);
    if (token < 0) return;
#pragma unroll
    for (int h = 0; h < kWarpCandidates; ++h) weight[h] = item.weight(token, table.candidate[h].token());
    if constexpr (kOfDistance<Rule>) row_min = __ldg(all_row_min + item.first_row + token);
  }

  // Sends the row to all blocks: every lane its weights, lane l the row minimum to block l.
  template <class Rule>
  __device__ __forceinline__ void send(ClusterExchange* shared, Mbarrier* arrivals, const ClusterThread& thread) const {
#pragma unroll 1
    for (int block = 0; block < thread.blocks; block += kClusterBlocks / 2)
#pragma unroll
      for (int h = 0; h < kWarpCandidates; ++h)
#pragma unroll
        for (int i = 0; i < kClusterBlocks / 2; ++i)
          store_async(&shared->weight[slot][h * 32 + thread.lane], weight[h], arrivals, block + i);
    if (kOfDistance<Rule> && thread.lane < thread.blocks)
      store_async(&shared->row_min[slot], from_ordered_bits(row_min), arrivals, thread.lane);
  }
};

// By a cluster: the picks of item b, which is number `launched` of the grid. kTokens: tokens per thread; number t is token
// (t * warps of the cluster + warp) * 32 + lane of the item.
// lookahead: max picks per exchange. row_min: (all tokens), the ordered bits of each row's minimum; not read by rules without kOfDistance.
template <class Rule, int kTokens>
__device__ __forceinline__ void select_cluster(const StoredItems& stored, int64_t launched, int64_t b, const Item& entry, int lookahead,
                                               const uint32_t* row_min, const float* mean_sqdist, const Rule& rule, int64_t* out) {
  STS_DYNAMIC_SHARED(ClusterExchange, shared);
  if (threadIdx.x < 2) mbarrier_init(&shared->arrivals[threadIdx.x]);
  const ClusterThread thread;
  const ClusterItem item{stored.items, static_cast<int>(entry.tokens), stored.items.first_token(b, entry), settled(stored.matrix(launched)),
                         static_cast<uint32_t>(stored.pitch(entry))};
  int64_t* picked = out + entry.out;
  const int64_t picks = entry.picks < item.tokens ? entry.picks : item.tokens;
  for (int64_t i = picks + thread.first; i < entry.picks; i += thread.step) picked[i] = -1;
  if (picks == 0) return;
  meet_cluster();  // before the first message: all blocks run, and their mbarriers are initialised

  ClusterTokens<Rule, kTokens> own(item, mean_sqdist, rule, thread);
  CandidateTable<Rule> table;
  InsertedCandidate inserted;  // by this warp, in the exchange before
  constexpr unsigned row_bytes = (kAllCandidates + kOfDistance<Rule>)*sizeof(float);
  for (int exchange = 0, done = 0, inserts = 0;; ++exchange) {
    // ---- (1) message: lane l sends to block l ----
    Mbarrier* const arrivals = &shared->arrivals[exchange & 1];
    // Bytes may arrive before they are expected: the phase stays open until this thread has arrived.
    if (threadIdx.x == 0) mbarrier_expect_tx(arrivals, thread.warps * sizeof(WarpMessage) + inserts * row_bytes);
    own.reduce_lowest();
    __syncwarp();  // all lanes have read from shared memory for the exchange before: the message says so to the cluster
    const WarpMessage sent{own.lowest, inserted.potential, own.lowest_parameter};
    if (thread.lane < thread.blocks) store_async(&shared->message[exchange & 1][thread.warp], sent, arrivals, thread.lane);
    if (inserted.token >= 0) inserted.send<Rule>(shared, arrivals, thread);
    mbarrier_wait(arrivals, exchange / 2);
    const WarpMessage message =
        thread.lane < thread.warps ? shared->message[exchange & 1][thread.lane] : WarpMessage{no_candidate<Rule>(), kInfinity, 0.f};
    const Key lowest_outside = warp_lowest(message.lowest);  // lowest token outside the table

    // ---- (2) insert ----
    table.complete(message);
    table.insert(message, exchange, thread.lane);

    // ---- (3) pick ----
    PickRows<kTokens> rows;
    // Writes pick p of this exchange and starts the loads of its row.
    const auto emit_pick = [&](int p, int token, float parameter) {
      if (thread.first == 0) picked[done + p] = token;
      rows.parameter[p] = parameter;
      own.load(item, token, rows.weight[p]);
    };
    const int max_picks = static_cast<int>(picks - done < lookahead ? picks - done : lookahead);
    int count = 0;
    Key best = table.lowest();
    if (candidate_potential<Rule>(best) < kInfinity && best < lowest_outside) {
      // The first pick is below `lowest_outside` as a key: at equal potential the lower token wins. A later pick must be below the bound,
      // as it is not known which token outside is at the bound.
      float bound = candidate_potential<Rule>(lowest_outside);
#pragma unroll
      for (int p = 0; p < kClusterPicks; ++p) {
        if (p > 0 && (p >= max_picks || !(candidate_potential<Rule>(best) < bound))) break;
        const Candidate chosen = candidate_of(best);
        const int slot = chosen.slot(thread.warps);
        if constexpr (kOfDistance<Rule>) bound = Rule::add(bound, shared->row_min[slot]);
        float weight[kWarpCandidates];
        table.read_weights(*shared, chosen, slot, thread.lane, weight);
        const float parameter = Rule::kByPick ? table.parameter_of(chosen, slot) : 0.f;
        emit_pick(p, chosen.token(), parameter);
        table.add(rule, weight, parameter);
        best = table.lowest();
        count = p + 1;
      }
    } else {
      // The only pick is the lowest token outside the table; in exchange 0 the first pick.
      const int lowest = candidate_of(lowest_outside).token();
      const int token =
          static_cast<int>(exchange == 0 ? first_pick(entry, make_key(candidate_potential<Rule>(lowest_outside), lowest)) : lowest);
      if (picks == 1) {  // reads no row: packed items of one pick have no weights
        if (thread.first == 0) picked[0] = token;
        return;
      }
      const float parameter = Rule::kByPick ? item.parameter(token) : 0.f;
      emit_pick(0, token, parameter);
      table.add_outside(rule, item, token, parameter);
      count = 1;
    }
    done += count;
    if (done == picks) return;  // all warps in the same exchange, after all its messages: nothing is sent to a block that has ended

    // ---- (4) gather ----
    inserts = table.inserts();
    inserted.load(table, item, row_min, thread.warp);
    if (inserted.token >= 0) own.mark(inserted.token, inserted.evicted, thread);
    table.find_victim();

    // ---- (5) add ----
    own.add(rule, rows, opaque(count));  // else the first addition, and its wait for all rows of the picks, is moved before (4)
    own.find_lowest(thread);
    if (inserted.token >= 0) inserted.potential = own.potential_of(inserted.token, thread);
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
