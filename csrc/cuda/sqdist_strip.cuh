// Squared distances of all tokens of an item to each other, in a strip of memory that a kernel then reads row by row.
//
// What: strip (entries, tokens, tokens), by launch_sqdist_matrices<StripSqdist>. The relative error of a distance is below 1e-5. A token
//   that is not finite gives NaN off the diagonal.
// Chosen when: knn_density, and nearest where queries are the keys; 16-bit rows on Hopper, items whose matrix fits kMaxStripFloats.
// Steps: (1) launch_token_stats, once for all entries; then, for strip_entries entries at a time, (2) launch_sqdist_matrices, and (3) the
//   caller's kernel, which reads the strip.
// Synchronisation: launches. The next distances overwrite the strip after the caller's kernel has read it.
#pragma once
#include "sqdist_wgmma.cuh"

namespace sts {

constexpr int64_t kMaxStripFloats = int64_t(1) << 26;  // 256 MiB

// Epilogue: a pair below a quarter of |a|^2 + |b|^2 is computed again by differences.
struct StripSqdist : StoreSqdist {
  static constexpr float kCancellation = 1.f / 4;
};

// Batch entries whose matrices fit in a strip; 0: not one does.
inline int64_t strip_entries(int64_t batch, int64_t tokens) {
  const int64_t fit = kMaxStripFloats / tokens / tokens;
  return fit < batch ? fit : batch;
}

// Whether launch_sqdist_matrices<StripSqdist> serves rows of this type on the current device.
template <class scalar_t>
bool strip_serves() {
  return wgmma_serves<scalar_t, StripSqdist>();
}

}  // namespace sts
