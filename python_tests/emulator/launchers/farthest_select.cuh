#pragma once
#include "kernel_table.h"
#include "run_selection.cuh"

namespace sts {

// As launch_repulsion_select. start, quality: may be null.
template <class scalar_t>
cudaError_t launch_farthest_select(const scalar_t* features, int64_t batch, int64_t tokens, int64_t channels, int64_t batch_stride,
                                   int64_t row_stride, int64_t k, const int64_t* anchor, const float* quality, const float* start,
                                   bool cosine, const int64_t* num_tokens, const int64_t* cu_seqlens, const int64_t* cu_budgets,
                                   int64_t max_seqlen, int64_t matrix_tokens, int item_blocks, int lookahead, bool wgmma,
                                   int64_t wave_floats, int64_t* out, cudaStream_t stream) {
  const Rows<scalar_t> rows{features, batch_stride, row_stride, static_cast<int>(channels)};
  const Items items{batch, tokens, k, num_tokens, cu_seqlens, cu_budgets, anchor, start, quality, max_seqlen};
  if (cosine) return run_unit_selection(rows, items, matrix_tokens, item_blocks, lookahead, wave_floats, Farthest{}, out, stream);
  return run_selection(rows, items, matrix_tokens, item_blocks, lookahead, wgmma, wave_floats, Farthest{}, nullptr, out, stream);
}

STS_KERNEL(farthest_select_float32, launch_farthest_select<float>);
STS_KERNEL(farthest_select_float16, launch_farthest_select<__half>);
STS_KERNEL(farthest_select_bfloat16, launch_farthest_select<__nv_bfloat16>);

}  // namespace sts
