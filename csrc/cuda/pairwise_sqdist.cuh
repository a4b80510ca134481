// The launcher of pairwise_sqdist: tensor cores for 16-bit rows on Hopper (sqdist_wgmma.cuh), else differences (sqdist_tiles.cuh).
#pragma once
#include "sqdist_wgmma.cuh"

namespace sts {

template <class scalar_t>
cudaError_t launch_pairwise_sqdist(const Rows<scalar_t>& rows, int64_t batch, int64_t tokens, const TokenStats& stats, float* out,
                                   cudaStream_t stream) {
  const Items items{batch, tokens, 0, nullptr, nullptr, nullptr, nullptr};
  if constexpr (sizeof(scalar_t) == 2) {
    if (stats.centred) {
      const cudaError_t error = launch_token_stats(rows, items, stats, stream);
      if (error != cudaSuccess) return error;
      return launch_sqdist_wgmma(rows, items, 0, batch, wgmma_tile(tokens, batch), stats, StoreSqdist{}, tokens, out, stream);
    }
  }
  return launch_sqdist_tiles(rows, items, 0, batch, StoreSqdist{}, tokens, out, stream);
}

// The scratch of launch_pairwise_sqdist, each part from allocate(bytes). Differences need none.
template <class scalar_t, class Allocate>
TokenStats pairwise_sqdist_scratch(int64_t batch, int64_t tokens, int64_t channels, Allocate&& allocate) {
  const Items items{batch, tokens, 0, nullptr, nullptr, nullptr, nullptr};
  TokenStats stats{};
  if (wgmma_serves<scalar_t, StoreSqdist>()) take_token_stats(stats, items, channels, sizeof(scalar_t), false, true, true, allocate);
  return stats;
}

}  // namespace sts
