#pragma once
#include "kernel_table.h"
#include "run_selection.cuh"

namespace sts {

// Padded if cu_seqlens is null, else packed with tokens = T and k = total_k. Other arguments as in run_selection.
template <class scalar_t>
cudaError_t launch_repulsion_select(const scalar_t* features, int64_t batch, int64_t tokens, int64_t channels, int64_t batch_stride,
                                    int64_t row_stride, int64_t k, float eps, const int64_t* anchor, const int64_t* num_tokens,
                                    const int64_t* cu_seqlens, const int64_t* cu_budgets, int64_t max_seqlen, int64_t matrix_tokens,
                                    int item_blocks, int lookahead, bool wgmma, int64_t wave_floats, unsigned* debug_out, int64_t* out,
                                    cudaStream_t stream) {
  const Rows<scalar_t> rows{features, batch_stride, row_stride, static_cast<int>(channels)};
  const Items items{batch, tokens, k, num_tokens, cu_seqlens, cu_budgets, anchor, nullptr, nullptr, max_seqlen};
  return run_selection(rows, items, matrix_tokens, item_blocks, lookahead, wgmma, wave_floats, Repulsion{eps}, debug_out, out, stream);
}

// A field of the plan for features of 16-byte aligned rows.
template <class scalar_t>
int64_t selection_plan(int64_t batch, int64_t tokens, int64_t channels, int64_t picks, bool packed, int64_t max_seqlen, int field) {
  const int64_t offsets[1] = {};
  const Rows<scalar_t> rows{nullptr, tokens * channels, channels, static_cast<int>(channels)};
  const Items items{batch, tokens, picks, nullptr, packed ? offsets : nullptr, nullptr, nullptr, nullptr, nullptr, max_seqlen};
  const SelectionPlan plan = plan_selection<scalar_t, Repulsion>(rows, items);
  const int64_t fields[] = {
      plan.stored, plan.swept,        plan.mma,    plan.wgmma,     plan.tile,          plan.entries,      plan.item_blocks,
      plan.groups, plan.group_blocks, plan.blocks, plan.lookahead, plan.packed.floats, plan.packed.waves, plan.packed.most_large,
      plan.drafted};
  return fields[field];
}

// A field of the CPU's plan.
inline int64_t cpu_selection_plan(int64_t tokens, int64_t picks, int64_t feature_bytes, int field) {
  const CpuSelectionPlan plan = plan_cpu_selection(tokens, picks, feature_bytes);
  return field == 0 ? plan.stored : plan.lookahead;
}

STS_KERNEL(cpu_selection_plan, cpu_selection_plan);
STS_KERNEL(selection_plan_float32, selection_plan<float>);
STS_KERNEL(selection_plan_bfloat16, selection_plan<__nv_bfloat16>);
STS_KERNEL(repulsion_select_float32, launch_repulsion_select<float>);
STS_KERNEL(repulsion_select_float16, launch_repulsion_select<__half>);
STS_KERNEL(repulsion_select_bfloat16, launch_repulsion_select<__nv_bfloat16>);

}  // namespace sts
