#pragma once
#include "cuda/knn_density.cuh"
#include "kernel_table.h"

namespace sts {

// strip_rows: rows whose distances are stored at a time; 0: as planned. wgmma: used if the device has it and the strip holds whole entries.
template <class scalar_t>
cudaError_t launch_knn_density(const scalar_t* features, int64_t batch, int64_t tokens, int64_t channels, int64_t batch_stride,
                               int64_t row_stride, int64_t k, const int64_t* num_tokens, int64_t strip_rows, bool wgmma, float* density,
                               cudaStream_t stream) {
  const Rows<scalar_t> rows{features, batch_stride, row_stride, static_cast<int>(channels)};
  KnnPlan plan = plan_knn<scalar_t>(batch, tokens);
  if (strip_rows) plan.strip_rows = strip_rows;
  plan.wgmma = plan.wgmma && wgmma && plan.strip_rows >= tokens;
  const auto layout = [&](auto&& allocate) { return KnnScratch(plan, batch, tokens, channels, sizeof(scalar_t), allocate); };
  kernel_table::Scratch memory(stream, layout);
  const KnnScratch scratch = layout(memory);
  const cudaError_t error = launch_knn(rows, batch, tokens, k, num_tokens, plan, scratch, density, stream);
  return error == cudaSuccess ? cudaStreamSynchronize(stream) : error;
}

STS_KERNEL(knn_density_float32, launch_knn_density<float>);
STS_KERNEL(knn_density_float16, launch_knn_density<__half>);
STS_KERNEL(knn_density_bfloat16, launch_knn_density<__nv_bfloat16>);

}  // namespace sts
