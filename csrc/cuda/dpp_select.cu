#include "dpp_select.cuh"

#include <tuple>

#include "common/dpp_glue.h"
#include "cuda_glue.h"

namespace sts {
namespace {

std::tuple<Tensor, Tensor> dpp_select_cuda(const Tensor& features, const Tensor& quality, int64_t k, double floor,
                                           std::optional<Tensor> num_tokens) {
  const DppArguments args(features, quality, k, floor, num_tokens);
  const CudaScope scope(args.features);
  const int64_t batch = args.features.size(0), tokens = args.features.size(1), channels = args.features.size(2);
  Tensor order = new_indices(args.features, {batch, k}), gain = new_floats(args.features, {batch, k});
  if (batch == 0) return {order, gain};
  if (args.num_tokens && check_values_on_device()) args.check_values(scope.host_copy(*args.num_tokens).data());
  dispatch_cuda(args.features.scalar_type(), [&](auto* element) {
    const auto rows = rows_of<std::remove_pointer_t<decltype(element)>>(args.features);
    const DppPlan plan = plan_dpp(batch, tokens);
    const auto layout = [&](auto&& allocate) { return DppScratch(plan, batch, tokens, channels, k, allocate); };
    ScratchMemory memory(args.features, layout);
    const DppScratch scratch = layout(memory);
    CudaScope::check(launch_dpp(rows, batch, tokens, k, args.floor, static_cast<const float*>(args.quality.const_data_ptr()),
                                data_or_null(args.num_tokens), plan, scratch, static_cast<int64_t*>(order.mutable_data_ptr()),
                                static_cast<float*>(gain.mutable_data_ptr()), scope.stream()),
                     "dpp_select");
  });
  return {order, gain};
}

}  // namespace
}  // namespace sts

STABLE_TORCH_LIBRARY_IMPL(STS_NAMESPACE, CUDA, m) { m.impl("dpp_select", TORCH_BOX(&sts::dpp_select_cuda)); }
