// What a selection keeps in memory and how far it looks ahead, from its shape alone. The rest of the plan on CUDA needs the device:
// selection.cuh.
#pragma once
#include <cstdint>

namespace sts {

// CUDA: the weights of all pairs are stored up to so many tokens at the most.
constexpr int64_t kMatrixTokens = 8192;

// CPU: the same, if at least two thirds of the tokens are picked, whose rows are then hardly less than half a matrix. Larger matrices
// leave the cache, and computing rows again is faster.
constexpr int64_t kCpuMatrixBytes = int64_t(2) << 20;

// CPU: rows of weights computed in a pass at the most. More of them read features that are not in cache less often; fewer are better
// guesses.
constexpr int kCpuLookahead = 16;
constexpr int64_t kCpuCachedBytes = int64_t(16) << 20;

struct CpuSelectionPlan {
  bool stored;    // weights of all pairs in memory
  int lookahead;  // else: rows computed in a pass
};

inline CpuSelectionPlan plan_cpu_selection(int64_t tokens, int64_t picks, int64_t feature_bytes) {
  const bool stored = 3 * picks >= 2 * tokens && tokens * tokens * int64_t(sizeof(float)) <= kCpuMatrixBytes;
  return {stored, feature_bytes > kCpuCachedBytes ? kCpuLookahead : kCpuLookahead / 2};
}

}  // namespace sts
