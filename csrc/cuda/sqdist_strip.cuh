// Squared distances of all tokens of an item to each other, in a strip of memory that a kernel then reads row by row.
//
// What: strip (entries, tokens, tokens), by wgmma (sqdist_wgmma.cuh). A distance is off by less than 1e-5 of itself. NaN, off the diagonal,
//   for a token that is not finite.
// Chosen when: knn_density, and nearest where queries are the keys; 16-bit rows on Hopper, items whose matrix fits kMaxStripFloats.
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

// Whether launch_sqdist_strip serves rows of this type on the current device.
template <class scalar_t>
bool strip_serves() {
  return wgmma_serves<scalar_t, StripSqdist>();
}

// stats: of `items`, with the centred copy. entries: at most strip_entries.
template <class scalar_t>
cudaError_t launch_sqdist_strip(const Rows<scalar_t>& rows, const Items& items, int64_t first_entry, int64_t entries,
                                const TokenStats& stats, float* strip, cudaStream_t stream) {
  if constexpr (kWgmmaServes<scalar_t, StripSqdist>)
    return launch_sqdist_wgmma(rows, items, first_entry, entries, wgmma_tile(items.tokens, entries), stats, StripSqdist{}, items.tokens,
                               strip, stream);
  else
    return cudaErrorInvalidValue;
}

}  // namespace sts
