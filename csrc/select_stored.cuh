// Selection over the stored weights of all pairs: the plain loop, one block an item, with the potentials in registers and one
// barrier a pick. A pick is a chain, from its row of weights to the lowest potential of the block. What is longest in it is left to a
// warp without tokens: with every pick that one has a row which is likely to be needed soon brought into the multiprocessor's cache.
#pragma once
#include "token_stats.cuh"

namespace sts {

constexpr int kStoredTokens = 16;           // that a thread holds at the most
constexpr int kStoredMaxThreads = 17 * 32;  // for kMatrixTokens, and the warp that looks ahead

// Tokens that a thread holds: more of them are a longer chain, more warps take longer to agree on the lowest.
inline int64_t stored_tokens_per_thread(int64_t tokens) {
  int64_t held = 1;
  while (held < kStoredTokens && ceil_div(tokens, 32 * held) > 12) held *= 2;
  return held;
}

// The weights of item number `launched` of those that are held. A packed batch has one matrix, whose diagonal blocks are the items'.
__device__ __forceinline__ const float* stored_weights(const Items& items, const Item& item, int64_t launched, const float* weights) {
  return weights + (items.packed() ? item.first * (items.tokens + 1) : launched * items.tokens * items.tokens);
}

// One block per item of [first_item, first_item + gridDim.x), with a warp more than its tokens need to look ahead. Warp w holds
// tokens [32 * kTokens * w, 32 * kTokens * (w + 1)).
template <class Rule, int kTokens>
__global__ void __launch_bounds__(kStoredMaxThreads)
    select_stored_kernel(Items items, int64_t first_item, bool look_ahead, const float* weights, const float* mean_sqdist, Rule rule,
                         int64_t* out) {
  __shared__ Key partial[2][32];
  const int64_t b = first_item + blockIdx.x;
  const Item item = items[b];
  const int tokens = static_cast<int>(item.tokens), tid = threadIdx.x, lane = tid % 32, warp = tid / 32, warps = blockDim.x / 32;
  const int64_t stride = items.tokens;
  const float* matrix = stored_weights(items, item, blockIdx.x, weights);
  const float* from_mean = mean_sqdist + (items.packed() ? item.first : b * stride);
  int64_t* picked = out + item.out;

  const int64_t picks = item.picks < tokens ? item.picks : tokens;
  for (int64_t step = picks + tid; step < item.picks; step += blockDim.x) picked[step] = -1;
  if (picks == 0) return;

  const int first = warp * 32 * kTokens + lane;  // this thread's tokens: first, first + 32, ...
  float potential[kTokens];
  Key nearest = kNoKey;
#pragma unroll
  for (int t = 0; t < kTokens; ++t) {
    const int j = first + 32 * t;
    potential[t] = kInfinity;
    if (j >= tokens) continue;
    const float distance = from_mean[j];
    potential[t] = distance < kInfinity ? Rule::start() : kLastResort;
    nearest = lower(nearest, make_key(distance, j));
  }
  int pick = static_cast<int>(first_pick(item, block_lowest(nearest, partial, 0)));
  int fetched = -1;  // lane w: the token of warp w whose row was fetched last
  for (int step = 0;; ++step) {
    if (tid == 0) picked[step] = pick;
    if (step + 1 == picks) return;

    const float* row = matrix + pick * stride + first;
    float weight[kTokens];
#pragma unroll
    for (int t = 0; t < kTokens; ++t) weight[t] = first + 32 * t < tokens ? __ldg(row + 32 * t) : 0.f;
    if (look_ahead && warp == warps - 1 && step > 0) {
      const Key offer = lane < warps ? partial[step & 1][lane] : kNoKey;
      const int token = static_cast<int>(key_index(offer));
      const Key next = warp_lowest(token == pick || token == fetched ? kNoKey : offer);
      if (key_value(next) < kInfinity) {
        if (offer == next) fetched = token;
        const float* next_row = matrix + static_cast<int>(key_index(next)) * stride;
        for (int j = lane * 8; j < tokens + 8; j += 32 * 8) prefetch_l1(next_row + (j < tokens ? j : tokens - 1));  // 32 bytes each
      }
    }

    float low = kInfinity;
    int low_token = first;
#pragma unroll
    for (int t = 0; t < kTokens; ++t) {
      const int j = first + 32 * t;
      potential[t] = Rule::add(potential[t], weight[t]);  // the picked one's is infinite
      if (potential[t] < low) low = potential[t], low_token = j;
    }
    pick = static_cast<int>(key_index(block_lowest(make_key(low, low_token), partial, step + 1)));
  }
}

// f(kernel) for the kernel whose threads hold so many tokens.
template <class Rule, class F>
auto with_stored_kernel(int64_t tokens_per_thread, const F& f) {
  switch (tokens_per_thread) {
    case 1: return f(select_stored_kernel<Rule, 1>);
    case 2: return f(select_stored_kernel<Rule, 2>);
    case 4: return f(select_stored_kernel<Rule, 4>);
    case 8: return f(select_stored_kernel<Rule, 8>);
    default: return f(select_stored_kernel<Rule, kStoredTokens>);
  }
}

}  // namespace sts
