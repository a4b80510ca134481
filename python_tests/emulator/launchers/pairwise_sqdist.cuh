#pragma once
#include "cuda/pairwise_sqdist.cuh"
#include "kernel_table.h"

namespace sts {

// Features (batch, tokens, channels) with the given strides -> out (batch, tokens, tokens).
template <class scalar_t>
cudaError_t launch_pairwise_sqdist_of(const scalar_t* features, int64_t batch, int64_t tokens, int64_t channels, int64_t batch_stride,
                                      int64_t row_stride, float* out, cudaStream_t stream) {
  const Rows<scalar_t> rows{features, batch_stride, row_stride, static_cast<int>(channels)};
  const auto layout = [&](auto&& allocate) { return pairwise_sqdist_scratch<scalar_t>(batch, tokens, channels, allocate); };
  kernel_table::Scratch memory(stream, layout);
  const TokenStats stats = layout(memory);
  const cudaError_t error = launch_pairwise_sqdist(rows, batch, tokens, stats, out, stream);
  return error == cudaSuccess ? cudaStreamSynchronize(stream) : error;
}

STS_KERNEL(pairwise_sqdist_float32, launch_pairwise_sqdist_of<float>);
STS_KERNEL(pairwise_sqdist_float16, launch_pairwise_sqdist_of<__half>);
STS_KERNEL(pairwise_sqdist_bfloat16, launch_pairwise_sqdist_of<__nv_bfloat16>);

}  // namespace sts
