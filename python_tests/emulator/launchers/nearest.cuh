#pragma once
#include "cuda/nearest.cuh"
#include "kernel_table.h"

namespace sts {

// key: null: the queries. strip_entries: entries whose distances are stored at a time, where any are; 0: as planned.
template <class scalar_t>
cudaError_t launch_nearest_of(const scalar_t* query, const scalar_t* key, int64_t batch, int64_t rows, int64_t count, int64_t channels,
                              int64_t query_batch_stride, int64_t query_row_stride, int64_t key_batch_stride, int64_t key_row_stride,
                              bool cosine, const double* query_rank, const double* key_rank, bool exclude_self, const int64_t* num_keys,
                              int64_t strip_entries, int64_t* index, float* value, cudaStream_t stream) {
  const NearestRows<scalar_t> given{{query, query_batch_stride, query_row_stride, static_cast<int>(channels)},
                                    {key ? key : query, key_batch_stride, key_row_stride, static_cast<int>(channels)},
                                    batch,
                                    rows,
                                    count,
                                    !key};
  NearestPlan plan = plan_nearest(given, cosine);
  if (plan.strip_entries && strip_entries) plan.strip_entries = strip_entries;
  const auto layout = [&](auto&& allocate) { return NearestScratch(plan, given, allocate); };
  kernel_table::Scratch memory(stream, layout);
  const NearestScratch scratch = layout(memory);
  const NearestOptions options{cosine, query_rank, key_rank, exclude_self, num_keys};
  const cudaError_t error = launch_nearest(given, options, plan, scratch, index, value, stream);
  return error == cudaSuccess ? cudaStreamSynchronize(stream) : error;
}

STS_KERNEL(nearest_float32, launch_nearest_of<float>);
STS_KERNEL(nearest_float16, launch_nearest_of<__half>);
STS_KERNEL(nearest_bfloat16, launch_nearest_of<__nv_bfloat16>);

}  // namespace sts
