#include "repulsion_select.cuh"

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
  Selection::check_values(items);
}

Tensor select(const Selection& selection) {
  const Items& items = selection.items;
  const CudaScope scope(selection.features);
  Tensor out = selection.new_output();
  if (items.count == 0) return out;
  if (check_values_on_device()) {
    CudaScope::check(cudaStreamSynchronize(scope.stream()), "STS_KERNELS_CHECK");
    check_device_values(selection);
  }
  dispatch_cuda(selection.features.scalar_type(), [&](auto* element) {
    using scalar_t = std::remove_pointer_t<decltype(element)>;
    const auto rows = rows_of<scalar_t>(selection.features);
    const SelectionPlan plan = plan_selection<scalar_t, Repulsion>(items);
    const int64_t chunks = items.anchor ? 0 : all_chunks(items);
    const Tensor per_token = new_floats(selection.features, all_tokens(items));
    const Tensor sums = new_floats(selection.features, chunks * (rows.channels + 1));
    const Tensor mean = new_floats(selection.features, items.anchor ? 0 : items.count * rows.channels);
    const Tensor weights = new_floats(selection.features, plan.matrix_floats(items.tokens));
    const Tensor keys = torch::stable::new_empty(selection.features, {plan.keys()}, ScalarType::Long);
    const Tensor arrived = torch::stable::new_empty(selection.features, {plan.groups}, ScalarType::Int);
    SelectionScratch scratch{{floats(per_token), nullptr, nullptr, nullptr},
                             floats(weights),
                             static_cast<Key*>(keys.mutable_data_ptr()),
                             static_cast<unsigned*>(arrived.mutable_data_ptr())};
    if (chunks) scratch.mean = {floats(per_token), floats(sums), floats(sums) + chunks * rows.channels, floats(mean)};
    CudaScope::check(launch_selection(rows, items, plan, scratch, selection.rule, static_cast<int64_t*>(out.mutable_data_ptr()), scope.stream()),
                     "repulsion_select");
  });
  return out;
}

Tensor repulsion_select_cuda(const Tensor& features, int64_t k, double eps, std::optional<Tensor> anchor, std::optional<Tensor> num_tokens) {
  return select(Selection::padded(features, k, eps, anchor, num_tokens));
}

Tensor repulsion_select_varlen_cuda(const Tensor& features, const Tensor& cu_seqlens, const Tensor& cu_budgets, int64_t total_k, double eps,
                                    std::optional<Tensor> anchor) {
  return select(Selection::packed(features, cu_seqlens, cu_budgets, total_k, eps, anchor));
}

}  // namespace
}  // namespace sts

STABLE_TORCH_LIBRARY_IMPL(sts_kernels, CUDA, m) {
  m.impl("repulsion_select", TORCH_BOX(&sts::repulsion_select_cuda));
  m.impl("repulsion_select_varlen", TORCH_BOX(&sts::repulsion_select_varlen_cuda));
}
