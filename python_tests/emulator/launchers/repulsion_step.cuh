#pragma once
#include "cuda/repulsion_step.cuh"
#include "kernel_table.h"

namespace sts {

template <class scalar_t>
cudaError_t launch_repulsion_step(float* potential, int64_t potential_batch_stride, int64_t potential_token_stride,
                                  const scalar_t* features, int64_t batch, int64_t tokens, int64_t channels, int64_t batch_stride,
                                  int64_t row_stride, const int64_t* picked, float eps, int64_t* next, cudaStream_t stream) {
  const Rows<scalar_t> rows{features, batch_stride, row_stride, static_cast<int>(channels)};
  return launch_step(potential, potential_batch_stride, potential_token_stride, rows, batch, tokens, picked, Repulsion{eps}, next, stream);
}

STS_KERNEL(repulsion_step_float32, launch_repulsion_step<float>);
STS_KERNEL(repulsion_step_float16, launch_repulsion_step<__half>);
STS_KERNEL(repulsion_step_bfloat16, launch_repulsion_step<__nv_bfloat16>);

}  // namespace sts
