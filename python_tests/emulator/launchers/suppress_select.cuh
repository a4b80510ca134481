#pragma once
#include "kernel_table.h"
#include "run_selection.cuh"

namespace sts {

// As launch_repulsion_select. rank is float32.
template <class scalar_t>
cudaError_t launch_suppress_select(const scalar_t* features, int64_t batch, int64_t tokens, int64_t channels, int64_t batch_stride,
                                   int64_t row_stride, int64_t k, const float* rank, const float* tau, const int64_t* num_tokens,
                                   const int64_t* cu_seqlens, const int64_t* cu_budgets, int64_t max_seqlen, int64_t matrix_tokens,
                                   int item_blocks, int lookahead, bool /*wgmma: unit rows are float32*/, int64_t wave_floats, int64_t* out,
                                   cudaStream_t stream) {
  const Rows<scalar_t> rows{features, batch_stride, row_stride, static_cast<int>(channels)};
  const Items items{batch, tokens, k, num_tokens, cu_seqlens, cu_budgets, nullptr, rank, tau, max_seqlen};
  return run_unit_selection(rows, items, matrix_tokens, item_blocks, lookahead, wave_floats, Suppress{}, out, stream);
}

STS_KERNEL(suppress_select_float32, launch_suppress_select<float>);
STS_KERNEL(suppress_select_float16, launch_suppress_select<__half>);
STS_KERNEL(suppress_select_bfloat16, launch_suppress_select<__nv_bfloat16>);

}  // namespace sts
