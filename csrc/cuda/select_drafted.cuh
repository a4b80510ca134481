// Greedy selection over stored weights by speculation: the rows of up to 12 picks are loaded together.
//
// What: one block per item, padded or packed. The plain loop (select_stored.cuh) waits for a row of weights for every pick, from L2 or, in
//   large batches, from device memory. Here shared memory also holds an 8-bit code of every weight. The next picks are drafted by codes,
//   and their rows are loaded meanwhile. Then the drafts are verified with the rows, in float32, and those up to the first that the plain
//   loop would not make are accepted. So picks and potentials are those of the plain loop, bit for bit; codes decide only how many drafts
//   are right.
// Chosen when: the weight depends on the distance alone (kOfDistance), items are too long for select_stored.cuh to hold their rows in
//   shared memory, short enough for their codes to fit there, and have picks enough to be worth the encoding (drafts_pay).
// Steps, first:
//   (a) scale: a sample of the weights sets the range of the codes;
//   (b) encode: all warps read the matrix and write the codes; warps beyond kDraftWarps then exit.
// Steps, for up to kDrafts picks:
//   (1) candidates: every warp finds some 16 of its tokens of low potential, and writes their draft keys to shared memory;
//   (2) draft: every warp runs the plain loop among the candidates of all warps, two of them a lane, so it waits for no other warp. It
//     starts the loads of each draft's row. The first draft is the argmin found by the verification before: it is right;
//   (3) verify: every thread adds the rows to copies of its potentials. After each row the warp reports its argmin. The argmin of the
//     reports after draft p must be draft p + 1;
//   (4) accept: the rows of the accepted drafts are added to the potentials.
// Synchronisation: two __syncthreads for each batch of drafts, between the writes and the reads of the candidates and of the reports. All
//   warps have read the candidates before the second and the reports before the first of the next batch, so neither is double-buffered.
#pragma once
#include "select_stored.cuh"

namespace sts {

constexpr int kDraftWarps = 4;                            // warps that pick
constexpr int kDraftTokens = 5;                           // tokens per thread
constexpr int kDraftThreads = kDraftWarps * 32;           // thread i has the tokens i, i + kDraftThreads, ...
constexpr int kDraftMost = kDraftThreads * kDraftTokens;  // max tokens of an item
constexpr int kDraftFrom = 256;                           // up to so many tokens, select_stored.cuh holds most rows in shared memory
constexpr int kDraftPicks = 64;                           // fewer picks, or fewer than an eighth of the tokens, do not pay for the encoding
constexpr int kDrafts = 12;                               // max drafts verified together
constexpr int kWarpDrafts = 64 / kDraftWarps;             // max candidates of a warp; together two per lane
constexpr int kEncodeWarps = 12;                          // warps of the block
constexpr int kEncodeLoads = 3;                           // 16-byte loads of a lane and row: rows of up to 384 codes

// ---- codes ----

// Where the code of a pair is, for items of `tokens` tokens. Of the two codes (i, j) and (j, i) one is stored: tokens are on a circle of
// `circle` places, and row i has the half circle that begins at i, from the multiple of 4 at or below i on. The rows are `pitch` bytes
// apart.
struct CodeLayout {
  int circle, half, pitch;

  STS_HOST_DEVICE explicit CodeLayout(int64_t tokens)
      : circle(static_cast<int>(matrix_pitch(tokens))), half(circle / 2), pitch((half + 4 + 3) / 4 * 4) {}

  // Offset of code (i, i).
  STS_HOST_DEVICE int diagonal(int i) const { return i * pitch + i % 4; }
  // Offset of the code of tokens i and j, given diagonal(i) and diagonal(j).
  __device__ __forceinline__ int at(int i, int diagonal_i, int j, int diagonal_j) const {
    const unsigned ahead = j - i, around = ahead + circle;
    const int places = min(ahead, around);  // from i to j, 0 to circle - 1: a negative number is a large unsigned one
    return places <= half ? diagonal_i + places : diagonal_j + circle - places;
  }
};

// A code is a small float of 3 bits of exponent e and 5 bits of mantissa m. It stands for the number (32 + m) << e, from 32 to 8064.
constexpr int kMantissaBits = 5;
constexpr int kCodeOne = 1 << kMantissaBits;
__device__ __forceinline__ uint32_t decoded(uint32_t code) { return (code % kCodeOne | kCodeOne) << code / kCodeOne; }

// weight -> code. The code's number is kCodeOne * (weight * factor + offset), rounded and saturated.
struct CodeScale {
  float factor, offset;

  // Four codes, the first in the low byte.
  __device__ __forceinline__ uint32_t encode(const float4& weights) const {
    // The high byte is the code: bits 18..25 of the float, less those of 1.
    constexpr uint32_t kHalf = 1u << (22 - kMantissaBits), kShift = 24 - (23 - kMantissaBits);
    const auto code = [&](float weight) {
      const float scaled = fminf(fmaxf(fmaf(weight, factor, offset), 1.f), 252.f);  // a NaN becomes 1
      return (__float_as_uint(scaled) + kHalf - __float_as_uint(1.f)) << kShift;
    };
    const uint32_t low = __byte_perm(code(weights.x), code(weights.y), 0x0073),
                   high = __byte_perm(code(weights.z), code(weights.w), 0x0073);
    return __byte_perm(low, high, 0x5410);
  }
};

// ---- draft keys ----

// A draft key: the potential above the lowest one, in quarters of a code's number, saturated at kDraftFar; then the token. Adding a code to
// a key adds it to the potential: the token stays.
//   bits  31..10      9..0
//         potential  token
constexpr int kTokenBits = 10;
constexpr int kCodeShift = kTokenBits + 2;
constexpr float kDraftFar = 2097152.f;        // 2^21
constexpr uint32_t kNotADraft = 0xc0000000u;  // picked, or no token: above all other keys, and kDrafts codes do not overflow it
static_assert(kDraftMost <= 1 << kTokenBits && kDrafts * 8064ull << kCodeShift < 0x100000000ull - kNotADraft, "codes overflow a key");

// ---- kernel ----

// Whether the kernel serves the rule.
template <class Rule>
constexpr bool kDraftable = kOfDistance<Rule> && !Rule::kNegative && Rule::kFromMean;

struct DraftExchange {
  StoredReport report[kDrafts][kDraftWarps];  // argmin of each warp after each draft
  uint32_t candidate[kDraftWarps][kWarpDrafts];
  float lowest[kEncodeWarps], inverse[kEncodeWarps];  // of the sample of weights: the minimum, and the sum of inverses
  Key partial[2][32];                                 // block_lowest
};

// Shared memory: DraftExchange, picked[picks], then on the next 16 bytes the codes.
STS_HOST_DEVICE int64_t codes_offset(const Items& items) { return resident_offset(sizeof(DraftExchange), items); }
inline int64_t drafted_shared_bytes(const Items& items) {
  return codes_offset(items) + items.longest() * CodeLayout(items.longest()).pitch;
}

// (a) by all threads of the block. The codes begin somewhat below the lowest weight of the sample, as tokens of low potential have low
// weights. The typical weight is a harmonic mean: a few near-duplicates, of weights a million times as large, do not move it.
__device__ __forceinline__ CodeScale sample_scale(const float* matrix, uint32_t pitch, int tokens, DraftExchange* exchange) {
  constexpr float kSteps = 4.f, kBelow = 0.5f;  // by simulation (bench/NOTES.md)
  const int tid = threadIdx.x, lane = tid % 32, warp = tid / 32;
  const uint32_t row = tid * 37 % tokens, column = tokens < 8 ? 0 : tid * 11 % (tokens / 4) * 4;
  const float4 four = __ldg(reinterpret_cast<const float4*>(matrix + row * pitch + column));
  const float none = kNonFinitePotential;  // past the end of the row
  const float x = four.x, y = column + 1 < tokens ? four.y : none, z = column + 2 < tokens ? four.z : none,
              w = column + 3 < tokens ? four.w : none;
  const float low = fminf(fminf(x, y), fminf(z, w));
  const float second = fminf(fminf(fmaxf(x, y), fmaxf(z, w)), fmaxf(fminf(x, y), fminf(z, w)));
  const float lowest = __uint_as_float(__reduce_min_sync(kFullWarp, __float_as_uint(low))), sum = warp_sum(1.f / second);
  if (lane == 0) exchange->lowest[warp] = lowest, exchange->inverse[warp] = sum;
  __syncthreads();
  float all_lowest = kInfinity, all_sum = 0.f;
#pragma unroll
  for (int i = 0; i < kEncodeWarps; ++i) all_lowest = fminf(all_lowest, exchange->lowest[i]), all_sum += exchange->inverse[i];
  const float unit = kEncodeWarps * 32 / all_sum - all_lowest;
  const float factor = unit > 0.f && unit < kInfinity ? kSteps / unit : 0.f;  // 0: all weights are equal, and so are all codes
  return {factor, 1.f + (factor > 0.f ? kSteps * kBelow - all_lowest * factor : 0.f)};
}

// (b) by all threads of the block. Two rows at a time: their loads overlap.
__device__ __forceinline__ void encode_weights(const float* matrix, uint32_t pitch, int tokens, const CodeLayout& layout,
                                               const CodeScale& scale, unsigned char* codes) {
  constexpr int kRows = 2;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int quads = layout.pitch / 4;
  for (int first = warp; first < tokens; first += kRows * kEncodeWarps) {
    float4 weights[kRows][kEncodeLoads];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int i = first + r * kEncodeWarps < tokens ? first + r * kEncodeWarps : first;
#pragma unroll
      for (int c = 0; c < kEncodeLoads; ++c) {
        const int quad = lane + c * 32;
        int column = i / 4 * 4 + quad * 4;
        if (column >= layout.circle) column -= layout.circle;
        if (quad < quads) weights[r][c] = __ldg(reinterpret_cast<const float4*>(matrix + (i * pitch + column)));
      }
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int i = first + r * kEncodeWarps;
#pragma unroll
      for (int c = 0; c < kEncodeLoads; ++c) {
        const int quad = lane + c * 32;
        if (quad < quads && i < tokens) *reinterpret_cast<uint32_t*>(codes + i * layout.pitch + quad * 4) = scale.encode(weights[r][c]);
      }
    }
  }
}

// By a warp: writes its keys below a limit to `candidate`, at most kWarpDrafts, and kNotADraft to the other places. `limit`, above 0, is
// that of the batch of drafts before. It is moved until three quarters of the places are taken, or all keys have one.
__device__ __forceinline__ void write_candidates(const uint32_t (&key)[kDraftTokens], uint32_t& limit, uint32_t* candidate, int lane) {
  // Invariant: too few keys are below `low`; too many are below `high`, or it is kNotADraft, above all keys. Keys are distinct, so there
  // is a limit between the two.
  uint32_t low = 0, high = kNotADraft;
  unsigned below[kDraftTokens];
  for (;;) {
    int count = 0;
#pragma unroll
    for (int t = 0; t < kDraftTokens; ++t) {
      below[t] = __ballot_sync(kFullWarp, key[t] < limit);
      count += __popc(below[t]);
    }
    const bool many = count > kWarpDrafts;
    if (!many && (count >= kWarpDrafts * 3 / 4 || limit == kNotADraft)) break;
    (many ? high : low) = limit;
    limit = !many && high == kNotADraft ? limit < kNotADraft / 4 ? limit * 4 : kNotADraft : low + (high - low) / 2;
  }
  int place = 0;
#pragma unroll
  for (int t = 0; t < kDraftTokens; ++t) {
    if (key[t] < limit) candidate[place + __popc(below[t] & ((1u << lane) - 1))] = key[t];
    place += __popc(below[t]);
  }
  if (lane >= place && lane < kWarpDrafts) candidate[lane] = kNotADraft;
}

// potential: of a thread's tokens. lowest: of all tokens. units: of a potential in a draft key.
__device__ __forceinline__ uint32_t draft_key_of(float potential, float lowest, float units, uint32_t token) {
  const float above = fminf((potential - lowest) * units, kDraftFar);  // a NaN, from equal weights and an infinity, is far too
  const uint32_t rounded = __float_as_uint(above + 8388608.f) & 0x3fffffu;
  return potential < kInfinity ? rounded << kTokenBits | token : kNotADraft;
}

// (3) By a warp: lane p returns the argmin of the warp's tokens after draft p. row: weights of the drafts to the tokens of this thread.
// Rows past the drafts are old ones. Nobody reads their reports: without a branch the steps overlap.
template <class Rule>
__device__ __forceinline__ StoredReport try_drafts(const Rule& rule, const float (&potential)[kDraftTokens],
                                                   const float (&row)[kDrafts][kDraftTokens], int tid) {
  float trial[kDraftTokens];
  uint32_t low[kDrafts], low_token[kDrafts];
#pragma unroll
  for (int t = 0; t < kDraftTokens; ++t) trial[t] = potential[t];
#pragma unroll
  for (int p = 0; p < kDrafts; ++p) {
    low[p] = ~0u;
#pragma unroll
    for (int t = kDraftTokens - 1; t >= 0; --t) {
      trial[t] = after_pick(rule, trial[t], row[p][t], 0.f, 0.f);
      const uint32_t order = order_of<Rule>(trial[t]);
      if (order <= low[p]) low[p] = order, low_token[p] = tid + t * kDraftThreads;
    }
  }
  StoredReport report{};
#pragma unroll
  for (int p = 0; p < kDrafts; ++p) {
    const uint32_t warp_low = __reduce_min_sync(kFullWarp, low[p]);
    const uint32_t warp_token = __reduce_min_sync(kFullWarp, low[p] == warp_low ? low_token[p] : ~0u);
    if (tid % 32 == p) report = {warp_low, warp_token};
  }
  return report;
}

// One block per item.
template <class Rule>
__global__ void __launch_bounds__(kEncodeWarps * 32, 1)
    select_drafted_kernel(StoredItems stored, int lookahead, const float* mean_sqdist, Rule rule, int64_t* out) {
  static_assert(kDraftable<Rule>, "codes are of weights, and order_of is the bits of a potential");
  await_predecessor();
  STS_DYNAMIC_SHARED(unsigned char, shared);
  DraftExchange* const exchange = reinterpret_cast<DraftExchange*>(shared);
  int* const picked = reinterpret_cast<int*>(exchange + 1);  // [picks]
  const Items& items = stored.items;
  unsigned char* const codes = shared + codes_offset(items);
  const int tid = settled(static_cast<int>(threadIdx.x)), lane = tid % 32, warp = tid / 32;

  const int64_t b = stored.number(blockIdx.x);
  if (b < 0) return;
  const Item item = items[b];
  const int tokens = static_cast<int>(item.tokens);
  int64_t* const picks_out = out + item.out;
  const int64_t all_picks = pad_picks(item, tid, picks_out);
  if (all_picks == 0) return;
  const int picks = settled(static_cast<int>(all_picks));
  const float* const matrix = settled(stored.matrix(blockIdx.x));  // 16-byte aligned
  const uint32_t pitch = static_cast<uint32_t>(settled(static_cast<int>(stored.pitch(item))));
  const CodeLayout layout(tokens);

  // ---- Registers of the tokens of this thread ----
  uint32_t column[kDraftTokens];  // past the end the last token; its weights leave an infinite potential as it is
  float potential[kDraftTokens];
  Key nearest = kNoKey;
#pragma unroll
  for (int t = 0; t < kDraftTokens; ++t) {
    const int j = tid + t * kDraftThreads;
    const bool inside = warp < kDraftWarps && j < tokens;
    column[t] = static_cast<uint32_t>(inside ? j : tokens - 1);
    const float distance = mean_sqdist[items.first_token(b, item) + column[t]];
    potential[t] = inside ? first_potential(rule, distance < kInfinity, 0.f, 0.f) : kInfinity;
    if (inside) nearest = lower(nearest, make_key(distance, j));
  }
  int pick = static_cast<int>(first_pick(item, block_lowest(nearest, exchange->partial, 0)));

  if (picks == 1) {  // reads no row: packed items of one pick have no weights
    if (tid == 0) picks_out[0] = pick;
    return;
  }

  const CodeScale scale = sample_scale(matrix, pitch, tokens, exchange);  // (a)
  encode_weights(matrix, pitch, tokens, layout, scale, codes);            // (b)
  __syncthreads();
  if (warp >= kDraftWarps) return;  // __syncthreads does not wait for threads that have exited

  const float* const first_column = settled(matrix + tid);
  const float units = scale.factor * (kCodeOne * 4);  // of a potential in a draft key
  float lowest = 0.f;                                 // of all potentials
  uint32_t limit = 1u << kCodeShift;
  float row[kDrafts][kDraftTokens];  // weights of the drafts to the tokens of this thread
#pragma unroll
  for (int p = 0; p < kDrafts; ++p)
#pragma unroll
    for (int t = 0; t < kDraftTokens; ++t) row[p][t] = 0.f;
  for (int done = 0, most = 1;;) {
    const int rest = picks - done, drafts = most < rest ? most : rest;
    // ---- (1) candidates ----
    uint32_t key[kDraftTokens];
#pragma unroll
    for (int t = 0; t < kDraftTokens; ++t) key[t] = draft_key_of(potential[t], lowest, units, column[t]);
    write_candidates(key, limit, exchange->candidate[warp], lane);
    __syncthreads();
    const uint2 two = reinterpret_cast<const uint2*>(exchange->candidate)[lane];
    uint32_t draft_key[2] = {two.x, two.y};
    int token[2], token_diagonal[2];
#pragma unroll
    for (int c = 0; c < 2; ++c) token[c] = draft_key[c] & ((1 << kTokenBits) - 1), token_diagonal[c] = layout.diagonal(token[c]);

    // ---- (2) draft ----
    int draft = 0;  // lane p has draft p
#pragma unroll
    for (int p = 0; p < kDrafts; ++p) {
      if (p >= drafts) break;
      draft = lane == p ? pick : draft;
      const float* const from = settled(first_column + static_cast<uint32_t>(pick) * pitch);
#pragma unroll
      for (int t = 0; t < kDraftTokens; ++t)
        if (tid + t * kDraftThreads < tokens) row[p][t] = __ldg(from + t * kDraftThreads);
      const int pick_diagonal = layout.diagonal(pick);
      int code[2];
#pragma unroll
      for (int c = 0; c < 2; ++c)
        code[c] = opaque(codes[layout.at(pick, pick_diagonal, token[c], token_diagonal[c])]);  // else it is loaded in a branch
#pragma unroll
      for (int c = 0; c < 2; ++c) draft_key[c] = token[c] == pick ? kNotADraft | token[c] : draft_key[c] + (decoded(code[c]) << kCodeShift);
      pick = __reduce_min_sync(kFullWarp, min(draft_key[0], draft_key[1])) & ((1 << kTokenBits) - 1);
    }

    // ---- (3) verify ----
    StoredReport report = try_drafts(rule, potential, row, tid);
    if (lane < drafts) exchange->report[lane][warp] = report;
    __syncthreads();
    if (lane < drafts) report = lowest_report<kDraftWarps>(exchange->report[lane], kDraftWarps, lane);
    const int next_draft = __shfl_down_sync(kFullWarp, draft, 1);
    const bool right = lane + 1 < drafts && static_cast<int>(report.token) == next_draft;
    const int accepted = __ffs(~__ballot_sync(kFullWarp, right));

    // ---- (4) accept ----
    if (warp == 0 && lane < accepted) picked[done + lane] = draft;
    done += accepted;
    if (done == picks) break;
    pick = static_cast<int>(__shfl_sync(kFullWarp, report.token, accepted - 1));
    lowest = from_order<Rule>(__shfl_sync(kFullWarp, report.order, accepted - 1));
#pragma unroll
    for (int p = 0; p < kDrafts; ++p) {
      if (p >= accepted) break;
#pragma unroll
      for (int t = 0; t < kDraftTokens; ++t) potential[t] = after_pick(rule, potential[t], row[p][t], 0.f, 0.f);
    }
    // As many as were right and a few more; two after a batch in which none was.
    most = accepted == 1 && drafts > 1 ? 2 : accepted + 4;
    most = most < lookahead ? most : lookahead;
    most = most < kDrafts ? most : kDrafts;
  }
  __syncthreads();
  for (int i = tid; i < picks; i += kDraftThreads) picks_out[i] = picked[i];
}

// Whether drafts are worth the encoding, for items whose weights are stored, and the device has the shared memory for the codes. Packed: by
// the longest item that there may be, and the mean number of picks.
inline bool drafts_pay(const Items& items) {
  const int64_t tokens = items.longest(), picks = items.packed() ? ceil_div(items.picks, items.count) : items.picks;
  return tokens > kDraftFrom && tokens <= kDraftMost && picks >= kDraftPicks && picks * 8 >= tokens &&
         drafted_shared_bytes(items) <= max_shared_bytes();
}

}  // namespace sts
