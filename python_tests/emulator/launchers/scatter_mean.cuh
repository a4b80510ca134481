#pragma once
#include "cuda/scatter_mean.cuh"
#include "kernel_table.h"

namespace sts {

template <class scalar_t>
cudaError_t launch_scatter_mean(const scalar_t* features, int64_t batch, int64_t tokens, int64_t channels, int64_t batch_stride,
                                int64_t row_stride, const int64_t* assignment, int64_t count, const float* weight, int* slots,
                                scalar_t* mean, float* mass, cudaStream_t stream) {
  const Rows<scalar_t> rows{features, batch_stride, row_stride, static_cast<int>(channels)};
  return launch_scatter(rows, batch, tokens, assignment, count, weight, slots, mean, mass, stream);
}

STS_KERNEL(scatter_mean_float32, launch_scatter_mean<float>);
STS_KERNEL(scatter_mean_float16, launch_scatter_mean<__half>);
STS_KERNEL(scatter_mean_bfloat16, launch_scatter_mean<__nv_bfloat16>);

}  // namespace sts
