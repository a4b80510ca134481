// The parts of a selection's plan that follow from its shape alone: whether weights of all pairs are stored, and how many rows the CPU
// drafts. The CUDA plan also depends on the device: see selection.cuh.
#pragma once
#include <cstdint>

namespace sts {

// CUDA: max tokens of an item whose N x N weights are stored: 256 MiB of float32.
constexpr int64_t kMatrixTokens = 8192;

// CPU: max bytes of N x N weights. Larger matrices leave the cache, and computing rows again is faster. The matrix also needs K >= 2N/3:
// K rows without the tokens already picked are then K N - K^2 / 2 >= 4/9 N^2 pairs, hardly fewer than the N^2 / 2 of the matrix.
constexpr int64_t kCpuMatrixBytes = int64_t(2) << 20;

// CPU: max rows of weights per pass. With more rows, features that are not in cache are read less often; with fewer rows, more of the
// drafts are right.
constexpr int kCpuLookahead = 16;
// CPU: features of at most this size are assumed to stay in cache. Their passes compute half as many rows.
constexpr int64_t kCpuCachedBytes = int64_t(16) << 20;

struct CpuSelectionPlan {
  bool stored;    // N x N weights in memory, no drafts
  int lookahead;  // max rows of weights per pass, if not stored
};

inline CpuSelectionPlan plan_cpu_selection(int64_t tokens, int64_t picks, int64_t feature_bytes) {
  const bool stored = 3 * picks >= 2 * tokens && tokens * tokens * int64_t(sizeof(float)) <= kCpuMatrixBytes;
  return {stored, feature_bytes > kCpuCachedBytes ? kCpuLookahead : kCpuLookahead / 2};
}

}  // namespace sts
