// The launcher of pairwise_sqdist: tensor cores for 16-bit rows on Hopper (sqdist_wgmma.cuh), else differences (sqdist_tiles.cuh).
#pragma once
#include "sqdist_wgmma.cuh"

namespace sts {

template <class scalar_t>
cudaError_t launch_pairwise_sqdist(const Rows<scalar_t>& rows, int64_t batch, int64_t tokens, const TokenStats& stats, float* out,
                                   cudaStream_t stream) {
  const Items items = padded_items(batch, tokens);
  if (!stats.centred) return launch_sqdist_tiles(rows, tokens, 0, batch, StoreSqdist{}, out, stream);
  const cudaError_t error = launch_token_stats(rows, items, stats, stream);
  return error == cudaSuccess ? launch_sqdist_matrices<StoreSqdist>(rows, items, 0, batch, stats, out, stream) : error;
}

// The scratch of launch_pairwise_sqdist, each part from allocate(bytes). Differences need none.
template <class scalar_t, class Allocate>
TokenStats pairwise_sqdist_scratch(int64_t batch, int64_t tokens, int64_t channels, Allocate&& allocate) {
  TokenStats stats{};
  if (wgmma_serves<scalar_t, StoreSqdist>()) take_wgmma_stats(stats, padded_items(batch, tokens), channels, sizeof(scalar_t), allocate);
  return stats;
}

}  // namespace sts
