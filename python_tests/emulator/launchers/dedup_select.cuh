#pragma once
#include "cuda/dedup_select.cuh"
#include "kernel_table.h"

namespace sts {

// stored_entries: batch entries whose distances are stored at a time; 0: as planned.
template <class scalar_t>
cudaError_t launch_dedup_select(const scalar_t* features, int64_t batch, int64_t tokens, int64_t channels, int64_t batch_stride,
                                int64_t row_stride, const int64_t* listed, int64_t count, int64_t keep, int64_t step,
                                int64_t stored_entries, int64_t* out, cudaStream_t stream) {
  const Rows<scalar_t> rows{features, batch_stride, row_stride, static_cast<int>(channels)};
  DedupPlan plan = plan_dedup(batch, count);
  if (stored_entries) plan.entries = stored_entries;
  const auto layout = [&](auto&& allocate) { return DedupScratch(plan, batch, count, channels, allocate); };
  kernel_table::Scratch memory(stream, layout);
  const DedupScratch scratch = layout(memory);
  const cudaError_t error = launch_dedup(rows, batch, tokens, listed, count, keep, step, plan, scratch, out, stream);
  return error == cudaSuccess ? cudaStreamSynchronize(stream) : error;
}

STS_KERNEL(dedup_select_float32, launch_dedup_select<float>);
STS_KERNEL(dedup_select_float16, launch_dedup_select<__half>);
STS_KERNEL(dedup_select_bfloat16, launch_dedup_select<__nv_bfloat16>);

}  // namespace sts
