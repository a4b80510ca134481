// Selection over the stored weights of all pairs: the plain loop.
//
// What: one block per item runs Algorithm 1 with the potentials in registers; items are padded or packed. A pick is a dependency chain:
//   row of weights from L2, add, argmin of the block. Its latency is the run time, so the loop holds nothing but this chain.
//   Of small items the first rows of the matrix are copied to shared memory, as many as fit: a pick among them does not wait for L2.
// Chosen when: the matrix fits (kMatrixTokens), and the item is small, or items are many, or the device has no clusters
//   (select_cluster.cuh); and drafts do not pay (select_drafted.cuh).
// Steps, for every pick:
//   (1) load the row of the pick: 16-byte loads, 32-bit offsets;
//   (2) add it to the potentials;
//   (3) argmin of the warp: one REDUX of the ordered bits, one ballot. Among equals the lowest lane has the lowest token;
//   (4) argmin of the block: every warp writes a report (bits, token) to shared memory, and every thread reads all reports.
// Synchronisation: one __syncthreads per pick, between the writes and the reads of the reports. Reports are double-buffered: a warp writes
//   the reports of pick p + 2 after the barrier of p + 1, and all threads have read the reports of p before that barrier. The copy of the
//   rows is waited for after the first picks, with one more barrier.
#pragma once
#include "token_stats.cuh"

namespace sts {

constexpr int kStoredTokens = 8;       // tokens per thread
constexpr int kStoredMostTokens = 16;  // tokens per thread of items with more than 16 * 32 * 8 = 4096 tokens
constexpr int kStoredMaxWarps = 16;    // max warps per block
constexpr int kStoredReadWarps = 8;    // max reports that a thread compares in registers; more reports take two REDUX
constexpr int kResidentWarps = 4;      // warps of a block that may hold rows in shared memory
constexpr int kPicksDuringCopy = 8;    // picks before the rows in shared memory are waited for: about as long as their copy takes

// The items whose weights are in memory: the entries of a padded batch from `first` on, or one wave of a packed batch.
struct StoredItems {
  Items items;
  const float* weights;
  int64_t first;
  const PackedWave* wave;  // packed: wave[0] is this wave, wave[1] the next; padded: null
  const PackedMatrix* matrices;
  int64_t cluster_from;  // in clusters: a longer item is shared by the blocks of its cluster
  int sms;               // of the device
  int resident;          // rows of each matrix that its block holds in shared memory

  // Index of the item that block or cluster `launched` of the grid selects from; -1: none.
  __device__ __forceinline__ int64_t number(int64_t launched) const {
    if (!wave) return first + launched;
    const int64_t b = wave[0].item + launched;
    return b < wave[1].item && matrices[b].offset >= 0 ? b : -1;
  }
  __device__ __forceinline__ const float* matrix(int64_t launched) const {
    return weights + (wave ? matrices[wave[0].item + launched].offset : launched * items.tokens * matrix_pitch(items.tokens));
  }
  __device__ __forceinline__ int64_t pitch(const Item& item) const { return matrix_pitch(wave ? item.tokens : items.tokens); }

  // Whether the `blocks` of a cluster share the item; else one of them selects alone. If the wave would need more blocks than SMs, only
  // items above 2 * cluster_from are shared: for shorter items a cluster gains less than a second round of clusters costs.
  // Invariant: a block has the warps for an item that is not shared (cluster_launch). In clusters of 8 these are items up to cluster_from.
  __device__ __forceinline__ bool shares(const Item& item, int blocks) const {
    if (item.tokens <= cluster_from || !wave || blocks > 4) return item.tokens > cluster_from;
    const int64_t shared = wave[1].shareable - wave[0].shareable, all = wave[1].item - wave[0].item;
    return all + shared * (blocks - 1) <= sms || item.tokens > 2 * cluster_from;
  }
};

// Argmin of a warp: its lowest potential (order_of) and the token of that potential.
struct alignas(8) StoredReport {
  uint32_t order, token;
};

// The lowest of `warps` reports; among equals the lowest token. kWarps: their number, if known at compile time; 0: up to 32.
template <int kWarps>
__device__ __forceinline__ StoredReport lowest_report(const StoredReport* reports, int warps, int lane) {
  uint32_t lowest, token = ~0u;
  if constexpr (kWarps > 0) {
    StoredReport r[kWarps];
#pragma unroll
    for (int i = 0; i < kWarps; i += 2) {
      const uint4 two = *reinterpret_cast<const uint4*>(reports + i);
      r[i] = StoredReport{two.x, two.y};
      r[i + 1] = StoredReport{two.z, two.w};
    }
    lowest = r[0].order;
#pragma unroll
    for (int i = 1; i < kWarps; ++i) lowest = min(lowest, r[i].order);
#pragma unroll
    for (int i = 0; i < kWarps; ++i) token = min(token, r[i].order == lowest ? r[i].token : ~0u);
  } else {
    const StoredReport report = lane < warps ? reports[lane] : StoredReport{~0u, ~0u};
    lowest = __reduce_min_sync(kFullWarp, report.order);
    token = __reduce_min_sync(kFullWarp, report.order == lowest ? report.token : ~0u);
  }
  return {lowest, token};
}

// Bytes of shared memory before the resident rows, or the codes of drafts: the reports and the picks of an item, up to the next 16 bytes.
STS_HOST_DEVICE int64_t resident_offset(int64_t report_bytes, const Items& items) {
  const int64_t picks = items.picks < items.longest() ? items.picks : items.longest();
  return ceil_div(report_bytes + picks * int64_t(sizeof(int)), 16) * 16;
}

// By a block: writes -1 to the output slots past the tokens of an item. Returns the number of its picks.
__device__ __forceinline__ int64_t pad_picks(const Item& item, int tid, int64_t* picks_out) {
  const int64_t picks = item.picks < item.tokens ? item.picks : item.tokens;
  for (int64_t i = picks + tid; i < item.picks; i += blockDim.x) picks_out[i] = -1;
  return picks;
}

// By a block: the picks of item b, which is number `launched` of the grid. Thread i has tokens i * kTokens to (i + 1) * kTokens - 1.
// Tokens past the end of the item have an infinite potential, above all others. No weight lowers it, so their weights may be garbage.
// kWarps: warps that take part; 0: as many as the item needs. kResident: stored_items.resident may be above 0.
// Shared memory: report[2][kSlots], then picked[picks], then on the next 16 bytes rows[resident][pitch].
template <class Rule, int kTokens, int kWarps, bool kResident = false>
__device__ __forceinline__ void select_stored(const StoredItems& stored_items, int64_t launched, int64_t b, const Item& item,
                                              const float* mean_sqdist, const Rule& rule, int64_t* out) {
  static_assert(kTokens % 4 == 0 && kWarps % 2 == 0, "16-byte loads");
  STS_DYNAMIC_SHARED(unsigned char, shared);
  constexpr int kSlots = kWarps ? kWarps : kStoredMaxWarps;
  StoredReport(*const report)[kSlots] = settled_shared(reinterpret_cast<StoredReport(*)[kSlots]>(shared));
  int* const picked = reinterpret_cast<int*>(report + 2);  // [picks]
  const Items& items = stored_items.items;
  const int tid = settled(static_cast<int>(threadIdx.x)), lane = tid % 32, warp = tid / 32;
  const int tokens = static_cast<int>(item.tokens);
  int64_t* const picks_out = out + item.out;
  const int64_t all_picks = pad_picks(item, tid, picks_out);
  if (all_picks == 0) return;
  const int picks = settled(static_cast<int>(all_picks));
  const int warps = kWarps ? kWarps : settled(static_cast<int>(ceil_div(tokens, 32 * kTokens)));
  if (warp >= warps) return;  // warps for larger items of the launch. __syncthreads does not wait for threads that have exited

  // settled(): kept in registers, not computed again for every pick.
  const float* const matrix = settled(stored_items.matrix(launched));  // 16-byte aligned
  const int64_t first_row = items.first_token(b, item);                // index of the item's token 0 among all tokens
  const uint32_t pitch = static_cast<uint32_t>(settled(static_cast<int>(stored_items.pitch(item))));  // <= 2^13: offsets have 26 bits
  const int first = tid * kTokens;
  [[maybe_unused]] float* const rows =
      reinterpret_cast<float*>(reinterpret_cast<unsigned char*>(report) + resident_offset(2 * sizeof(report[0]), items));
  [[maybe_unused]] const uint32_t resident = static_cast<uint32_t>(stored_items.resident);
  if constexpr (kResident) {
    for (uint32_t i = tid * 4; i < resident * pitch; i += kWarps * 32 * 4) cp_async_16(rows + i, matrix + i, true);
    cp_async_commit();
  }
  uint32_t column[kTokens / 4];  // column of each 16-byte load; past the end the last load of the row
  float potential[kTokens], parameter[kTokens], start[kTokens], distance[kTokens];
  uint32_t order[kTokens];
  int token[kTokens];  // past the end the last one
#pragma unroll
  for (int t = 0; t < kTokens; ++t) token[t] = first + t < tokens ? first + t : tokens - 1;
  load_numbers(mean_sqdist, first_row, token, 0.f, distance);  // all loads are issued before one is used
  if constexpr (!kOfDistance<Rule>) {
    load_numbers(items.start, first_row, token, kNonFinitePotential, start);
    load_numbers(items.parameter, first_row, token, 1.f, parameter);
  } else {
#pragma unroll
    for (int t = 0; t < kTokens; ++t) start[t] = parameter[t] = 0.f;
  }
#pragma unroll
  for (int t = 0; t < kTokens; ++t) {
    const int j = first + t;
    const bool inside = j < tokens;
    const float before = first_potential(rule, distance[t] < kInfinity, start[t], parameter[t]);
    order[t] = order_of<Rule>(inside ? first_key(rule, distance[t], before, items.start, parameter[t]) : kInfinity);
    potential[t] = inside ? before : kInfinity;
    if (t % 4 == 0) column[t / 4] = static_cast<uint32_t>(j < tokens ? j : (tokens - 1) & ~3);
  }
  // (3) and (4): the lowest token of the block, given to every thread. step: parity selects the buffer of reports.
  const auto lowest_token = [&](int step) {
    uint32_t low = order[0];
#pragma unroll
    for (int t = 1; t < kTokens; ++t) low = min(low, order[t]);
    const uint32_t warp_low = __reduce_min_sync(kFullWarp, low);
    int lowest_t = 0;  // the first token of this thread with `low`
#pragma unroll
    for (int t = kTokens - 1; t >= 0; --t) lowest_t = order[t] == low ? t : lowest_t;
    const unsigned equal = __ballot_sync(kFullWarp, low == warp_low);
    // True in the lowest lane of `equal` alone.
    if ((equal & ((2u << lane) - 1)) == 1u << lane) report[step & 1][warp] = {warp_low, static_cast<uint32_t>(first + lowest_t)};
    __syncthreads();
    return lowest_report<kWarps>(report[step & 1], warps, lane);
  };

  const StoredReport initial = lowest_token(0);  // by first_key
  uint32_t pick = item.anchor >= 0 ? static_cast<uint32_t>(item.anchor) : initial.order < order_of<Rule>(kInfinity) ? initial.token : 0;
  int step = 1;
  const auto make_picks = [&](int end, auto some_resident) {
    constexpr bool kSome = decltype(some_resident)::value;
    for (; step < end; ++step) {
      float stored[kTokens], pick_parameter = 1.f;
      const uint32_t row = pick * pitch;
      const float* source = matrix;
      if constexpr (kSome) source = pick < resident ? rows : matrix;
#pragma unroll
      for (int t = 0; t < kTokens; t += 4) {  // (1) load the row
        const auto* const four_at = reinterpret_cast<const float4*>(source + (row + column[t / 4]));
        const float4 four = kSome ? *four_at : __ldg(four_at);
        stored[t] = four.x, stored[t + 1] = four.y, stored[t + 2] = four.z, stored[t + 3] = four.w;
      }
      if constexpr (Rule::kByPick) pick_parameter = items.parameter_of(first_row + pick);
      if (tid == 0) picked[step - 1] = static_cast<int>(pick);
#pragma unroll
      for (int t = 0; t < kTokens; ++t) {  // (2) add it
        potential[t] = after_pick(rule, potential[t], stored[t], parameter[t], pick_parameter);
        order[t] = order_of<Rule>(potential[t]);
      }
      pick = lowest_token(step).token;  // (3), (4)
    }
  };
  if constexpr (kResident) {
    if (resident > 0) {
      make_picks(picks < kPicksDuringCopy ? picks : kPicksDuringCopy, std::false_type());
      cp_async_wait<0>();
      __syncthreads();  // all threads have waited for their copies
      make_picks(picks, std::true_type());
    }
  }
  make_picks(picks, std::false_type());
  if (tid == 0) picked[picks - 1] = static_cast<int>(pick);
  __syncthreads();
  for (int i = tid; i < picks; i += warps * 32) picks_out[i] = picked[i];
}

// Padded batch: one block per item, with the warps that items of its size need.
template <class Rule, int kTokens, int kWarps>
__global__ void __launch_bounds__((kWarps ? kWarps : kStoredMaxWarps) * 32, 1)
    select_stored_kernel(StoredItems stored, const float* mean_sqdist, Rule rule, int64_t* out) {
  await_predecessor();
  const int64_t b = stored.number(blockIdx.x);
  select_stored<Rule, kTokens, kWarps, kWarps == kResidentWarps>(stored, blockIdx.x, b, stored.items[b], mean_sqdist, rule, out);
}

// Packed batch: one block per item. kWarps: warps per block, for the longest item; shorter items use fewer.
template <class Rule, int kWarps>
__global__ void __launch_bounds__(kWarps * 32, 1)
    select_packed_kernel(StoredItems stored, const float* mean_sqdist, Rule rule, int64_t* out) {
  await_predecessor();
  const int64_t b = stored.number(blockIdx.x);
  if (b < 0) return;
  const Item item = stored.items[b];
  if (kWarps == 4 || item.tokens <= 4 * 32 * kStoredTokens)
    return select_stored<Rule, kStoredTokens, 4>(stored, blockIdx.x, b, item, mean_sqdist, rule, out);
  if constexpr (kWarps > 4) {
    if (item.tokens <= kStoredReadWarps * 32 * kStoredTokens)
      return select_stored<Rule, kStoredTokens, kStoredReadWarps>(stored, blockIdx.x, b, item, mean_sqdist, rule, out);
    if (item.tokens <= kWarps * 32 * kStoredTokens)
      return select_stored<Rule, kStoredTokens, 0>(stored, blockIdx.x, b, item, mean_sqdist, rule, out);
    select_stored<Rule, kStoredMostTokens, 0>(stored, blockIdx.x, b, item, mean_sqdist, rule, out);
  }
}

// Calls f(kernel, warps per block, bytes of the reports) with the kernel for items of up to `tokens`. Fewer warps make step (4) shorter,
// and idle lanes cost nothing: so a thread has 8 tokens even where there are warps to spare.
template <class Rule, class F>
auto with_stored_kernel(int64_t tokens, const F& f) {
  const auto reports = [](int warps) { return 2 * warps * sizeof(StoredReport); };
  if (tokens <= 4 * 32 * kStoredTokens) return f(select_stored_kernel<Rule, kStoredTokens, 4>, 4, reports(4));
  if (tokens <= kStoredReadWarps * 32 * kStoredTokens)
    return f(select_stored_kernel<Rule, kStoredTokens, kStoredReadWarps>, kStoredReadWarps, reports(kStoredReadWarps));
  if (tokens <= kStoredMaxWarps * 32 * kStoredTokens)
    return f(select_stored_kernel<Rule, kStoredTokens, 0>, static_cast<int>(ceil_div(tokens, 32 * kStoredTokens)),
             reports(kStoredMaxWarps));
  return f(select_stored_kernel<Rule, kStoredMostTokens, 0>, static_cast<int>(ceil_div(tokens, 32 * kStoredMostTokens)),
           reports(kStoredMaxWarps));
}

// The same for a packed batch.
template <class Rule, class F>
auto with_packed_kernel(int64_t tokens, const F& f) {
  const auto reports = [](int warps) { return 2 * warps * sizeof(StoredReport); };
  if (tokens <= 4 * 32 * kStoredTokens) return f(select_packed_kernel<Rule, 4>, 4, reports(4));
  return f(select_packed_kernel<Rule, kStoredMaxWarps>, kStoredMaxWarps, reports(kStoredMaxWarps));
}

// Rows of each matrix to hold in shared memory, where `blocks` entries of a padded batch run at once: as many as fit, if every entry has an
// SM. 0 if they are too few to be worth their copy.
inline int resident_rows(const Items& items, int64_t blocks) {
  const int64_t tokens = items.tokens;
  if (tokens > kResidentWarps * 32 * kStoredTokens || blocks > device_sm_count()) return 0;
  const int64_t row_bytes = matrix_pitch(tokens) * sizeof(float);
  const int64_t fit = (max_shared_bytes() - resident_offset(2 * kResidentWarps * sizeof(StoredReport), items)) / row_bytes;
  return static_cast<int>(fit * 8 < tokens ? 0 : fit < tokens ? fit : tokens);
}

}  // namespace sts
