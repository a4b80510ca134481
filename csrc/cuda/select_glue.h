// Glue between the selection ops and their kernels: torch tensors, scratch memory, and unit rows for the cosine metric.
#pragma once
#include <vector>

#include "cuda_glue.h"
#include "selection.cuh"

namespace sts {

// Checks the values of the index tensors, copied to the host (STS_KERNELS_CHECK=1).
inline void check_device_values(const Selection& selection, const CudaScope& scope) {
  std::vector<std::vector<int64_t>> copies;
  copies.reserve(4);
  const auto on_host = [&](const std::optional<Tensor>& value) {
    return value ? copies.emplace_back(scope.host_copy(*value)).data() : nullptr;
  };
  Items items = selection.items;
  items.num_tokens = on_host(selection.num_tokens);
  items.cu_seqlens = on_host(selection.cu_seqlens);
  items.cu_budgets = on_host(selection.cu_budgets);
  items.anchor = on_host(selection.anchor);
  Selection::check_values(selection.op, items);
}

template <class scalar_t, class Rule>
void select_rows(const Selection& selection, const Rows<scalar_t>& rows, Rule rule, cudaStream_t stream, int64_t* picks) {
  const Items& items = selection.items;
  const int env_lookahead = asked_lookahead(kMostSweepPoints);
  const SelectionPlan plan = plan_selection<scalar_t, Rule>(rows, items, kMatrixTokens, env_lookahead ? env_lookahead : kMostSweepPoints);
  const auto layout = [&](auto&& allocate) { return SelectionScratch(plan, items, rows.channels, allocate); };
  ScratchMemory memory(selection.features, layout);
  const SelectionScratch scratch = layout(memory);
  CudaScope::check(launch_selection(rows, items, plan, scratch, rule, picks, stream), selection.op);
}

template <class Rule>
Tensor select(const Selection& selection, Rule rule) {
  const Items& items = selection.items;
  const CudaScope scope(selection.features);
  Tensor out = selection.new_output();
  int64_t* picks = static_cast<int64_t*>(out.mutable_data_ptr());
  if (items.count == 0) {  // no item takes the budget: every pick is -1
    CudaScope::check(cudaMemsetAsync(picks, 0xff, (items.packed() ? items.picks : 0) * sizeof(int64_t), scope.stream()), selection.op);
    return out;
  }
  if (check_values_on_device()) check_device_values(selection, scope);
  if (items.tokens == 0) return out;  // packed: every item is empty
  dispatch_cuda(selection.features.scalar_type(), [&](auto* element) {
    const auto rows = rows_of<std::remove_pointer_t<decltype(element)>>(selection.features);
    if constexpr (!Rule::kFromMean) {  // rules with a metric
      if (selection.cosine) {
        const int64_t entries = items.entries();
        const Tensor unit = new_floats(selection.features, {entries, items.tokens, unit_pitch(rows.channels)});
        float* copy = static_cast<float*>(unit.mutable_data_ptr());
        CudaScope::check(launch_unit_rows(rows, entries, items.tokens, items.tokens, nullptr, copy, nullptr, scope.stream()), selection.op);
        return select_rows(selection, unit_rows_of(copy, items.tokens, rows.channels), UnitRows<Rule>{rule}, scope.stream(), picks);
      }
    }
    if constexpr (!Rule::kByPick) select_rows(selection, rows, rule, scope.stream(), picks);  // Suppress has unit rows alone
  });
  return out;
}

}  // namespace sts
