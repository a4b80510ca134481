#pragma once
#include "cuda/dpp_select.cuh"
#include "kernel_table.h"

namespace sts {

template <class scalar_t>
cudaError_t launch_dpp_select(const scalar_t* features, int64_t batch, int64_t tokens, int64_t channels, int64_t batch_stride,
                              int64_t row_stride, const float* quality, int64_t k, float floor, const int64_t* num_tokens, int64_t* order,
                              float* gain, cudaStream_t stream) {
  const Rows<scalar_t> rows{features, batch_stride, row_stride, static_cast<int>(channels)};
  const DppPlan plan = plan_dpp(batch, tokens);
  const auto layout = [&](auto&& allocate) { return DppScratch(plan, batch, tokens, channels, k, allocate); };
  kernel_table::Scratch memory(stream, layout);
  const DppScratch scratch = layout(memory);
  const cudaError_t error = launch_dpp(rows, batch, tokens, k, floor, quality, num_tokens, plan, scratch, order, gain, stream);
  return error == cudaSuccess ? cudaStreamSynchronize(stream) : error;
}

STS_KERNEL(dpp_select_float32, launch_dpp_select<float>);
STS_KERNEL(dpp_select_float16, launch_dpp_select<__half>);
STS_KERNEL(dpp_select_bfloat16, launch_dpp_select<__nv_bfloat16>);

}  // namespace sts
