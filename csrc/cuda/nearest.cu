#include "nearest.cuh"

#include "common/nearest_glue.h"
#include "cuda_glue.h"

namespace sts {
namespace {

std::tuple<Tensor, Tensor> nearest_cuda(const Tensor& query, const Tensor& key, std::string metric, std::optional<Tensor> query_rank,
                                        std::optional<Tensor> key_rank, bool exclude_self, std::optional<Tensor> num_keys) {
  const Nearest call(query, key, metric, query_rank, key_rank, exclude_self, num_keys);
  const CudaScope scope(call.query);
  const int64_t batch = call.query.size(0), rows = call.query.size(1), count = call.key.size(1);
  Tensor index = new_indices(call.query, {batch, rows}), value = new_floats(call.query, {batch, rows});
  if (batch == 0) return {index, value};
  if (call.num_keys && check_values_on_device()) call.check_values(scope.host_copy(*call.num_keys).data());
  const NearestOptions options{call.cosine, call.query_ranks(), call.key_ranks(), call.exclude_self, data_or_null(call.num_keys)};
  dispatch_cuda(call.query.scalar_type(), [&](auto* element) {
    using scalar_t = std::remove_pointer_t<decltype(element)>;
    const NearestRows<scalar_t> given{rows_of<scalar_t>(call.query), rows_of<scalar_t>(call.key), batch, rows, count, call.same};
    const NearestPlan plan = plan_nearest(given, call.cosine);
    const auto layout = [&](auto&& allocate) { return NearestScratch(plan, given, allocate); };
    ScratchMemory memory(call.query, layout);
    CudaScope::check(launch_nearest(given, options, plan, layout(memory), static_cast<int64_t*>(index.mutable_data_ptr()),
                                    static_cast<float*>(value.mutable_data_ptr()), scope.stream()),
                     "nearest");
  });
  return {index, value};
}

}  // namespace
}  // namespace sts

STABLE_TORCH_LIBRARY_IMPL(STS_NAMESPACE, CUDA, m) { m.impl("nearest", TORCH_BOX(&sts::nearest_cuda)); }
