#include "repulsion_select.cuh"

#include <vector>

#include "cuda_glue.h"

namespace sts {
namespace {

// The index vectors on the host, for the check that STS_KERNELS_CHECK=1 asks for.
void check_device_values(const Selection& selection) {
  std::vector<std::vector<int64_t>> copies;
  const auto on_host = [&](const std::optional<Tensor>& value) -> const int64_t* {
    if (!value) return nullptr;
    copies.emplace_back(value->size(0));
    CudaScope::check(cudaMemcpy(copies.back().data(), data_or_null(value), copies.back().size() * sizeof(int64_t), cudaMemcpyDeviceToHost),
                     "STS_KERNELS_CHECK");
    return copies.back().data();
  };
  copies.reserve(4);
  Items items = selection.items;
  items.num_tokens = on_host(selection.num_tokens);
  items.cu_seqlens = on_host(selection.cu_seqlens);
  items.cu_budgets = on_host(selection.cu_budgets);
  items.anchor = on_host(selection.anchor);
  Selection::check_values(selection.op, items);
}

template <class Rule>
Tensor select(const Selection& selection, Rule rule) {
  const Items& items = selection.items;
  const CudaScope scope(selection.features);
  Tensor out = selection.new_output();
  int64_t* picks = static_cast<int64_t*>(out.mutable_data_ptr());
  if (items.count == 0) {  // budgets that no item takes
    CudaScope::check(cudaMemsetAsync(picks, 0xff, (items.packed() ? items.picks : 0) * sizeof(int64_t), scope.stream()), selection.op);
    return out;
  }
  if (check_values_on_device()) {
    CudaScope::check(cudaStreamSynchronize(scope.stream()), "STS_KERNELS_CHECK");
    check_device_values(selection);
  }
  dispatch_cuda(selection.features.scalar_type(), [&](auto* element) {
    using scalar_t = std::remove_pointer_t<decltype(element)>;
    const auto rows = rows_of<scalar_t>(selection.features);
    const int asked = asked_lookahead(kSweepPoints);
    const SelectionPlan plan = plan_selection<scalar_t, Rule>(rows, items, kMatrixTokens, asked ? asked : kSweepPoints);
    // One allocation, its parts on 256-byte boundaries: measured first, then dealt out.
    int64_t bytes = 0;
    char* memory = nullptr;
    const auto allocate = [&](int64_t size) -> void* {
      char* part = memory ? memory + bytes : nullptr;
      bytes += ceil_div(size, 256) * 256;
      return part;
    };
    SelectionScratch(plan, items, rows.channels, allocate);
    const Tensor scratch_memory = new_tensor(selection.features, {bytes}, aoti_torch_dtype_uint8());
    memory = static_cast<char*>(scratch_memory.mutable_data_ptr());
    bytes = 0;
    const SelectionScratch scratch(plan, items, rows.channels, allocate);
    CudaScope::check(launch_selection(rows, items, plan, scratch, rule, picks, scope.stream()), selection.op);
  });
  return out;
}

Tensor repulsion_select_cuda(const Tensor& features, int64_t k, double eps, std::optional<Tensor> anchor, std::optional<Tensor> num_tokens) {
  return select(Selection::padded("repulsion_select", features, k, anchor, num_tokens), Repulsion{checked_eps("repulsion_select", eps)});
}

Tensor repulsion_select_varlen_cuda(const Tensor& features, const Tensor& cu_seqlens, const Tensor& cu_budgets, int64_t total_k, double eps,
                                    std::optional<Tensor> anchor) {
  return select(Selection::packed("repulsion_select_varlen", features, cu_seqlens, cu_budgets, total_k, anchor),
                Repulsion{checked_eps("repulsion_select_varlen", eps)});
}

}  // namespace
}  // namespace sts

STABLE_TORCH_LIBRARY_IMPL(sts_kernels, CUDA, m) {
  m.impl("repulsion_select", TORCH_BOX(&sts::repulsion_select_cuda));
  m.impl("repulsion_select_varlen", TORCH_BOX(&sts::repulsion_select_varlen_cuda));
}
