#include "dedup_select.cuh"

#include "common/dedup_glue.h"
#include "cuda_glue.h"

namespace sts {
namespace {

Tensor dedup_select_cuda(const Tensor& features, const Tensor& order, int64_t keep, int64_t step) {
  const DedupArguments args(features, order, keep, step);
  const CudaScope scope(args.features);
  const int64_t batch = args.features.size(0), tokens = args.features.size(1), channels = args.features.size(2);
  const int64_t count = args.order.size(1);
  Tensor out = new_indices(args.features, {batch, keep});
  if (batch == 0) return out;
  const auto* const listed = static_cast<const int64_t*>(args.order.const_data_ptr());
  if (check_values_on_device()) args.check_values(scope.host_copy(args.order).data());
  dispatch_cuda(args.features.scalar_type(), [&](auto* element) {
    const auto rows = rows_of<std::remove_pointer_t<decltype(element)>>(args.features);
    const DedupPlan plan = plan_dedup(batch, count);
    const auto layout = [&](auto&& allocate) { return DedupScratch(plan, batch, count, channels, allocate); };
    ScratchMemory memory(args.features, layout);
    const DedupScratch scratch = layout(memory);
    CudaScope::check(launch_dedup(rows, batch, tokens, listed, count, keep, step, plan, scratch,
                                  static_cast<int64_t*>(out.mutable_data_ptr()), scope.stream()),
                     "dedup_select");
  });
  return out;
}

}  // namespace
}  // namespace sts

STABLE_TORCH_LIBRARY_IMPL(STS_NAMESPACE, CUDA, m) { m.impl("dedup_select", TORCH_BOX(&sts::dedup_select_cuda)); }
