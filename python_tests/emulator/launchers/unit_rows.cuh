#pragma once
#include "cuda/unit_rows.cuh"
#include "kernel_table.h"

namespace sts {

template <class scalar_t>
cudaError_t launch_unit_rows_of(const scalar_t* features, int64_t batch, int64_t tokens, int64_t channels, int64_t batch_stride,
                                int64_t row_stride, float* unit, cudaStream_t stream) {
  const Rows<scalar_t> rows{features, batch_stride, row_stride, static_cast<int>(channels)};
  return launch_unit_rows(rows, batch, tokens, tokens, nullptr, unit, nullptr, stream);
}

STS_KERNEL(unit_rows_float32, launch_unit_rows_of<float>);
STS_KERNEL(unit_rows_float16, launch_unit_rows_of<__half>);
STS_KERNEL(unit_rows_bfloat16, launch_unit_rows_of<__nv_bfloat16>);

}  // namespace sts
