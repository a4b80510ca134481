#include "nearest.cuh"

#include <tuple>

#include "common/nearest_glue.h"
#include "cuda_glue.h"

namespace sts {
namespace {

std::tuple<Tensor, Tensor> nearest_cuda(const Tensor& query, const Tensor& key, std::string metric, std::optional<Tensor> query_rank,
                                        std::optional<Tensor> key_rank, bool exclude_self, std::optional<Tensor> num_keys) {
  const NearestArguments args(query, key, metric, query_rank, key_rank, exclude_self, num_keys);
  const CudaScope scope(args.query);
  const int64_t batch = args.query.size(0), rows = args.query.size(1), count = args.key.size(1);
  Tensor index = new_indices(args.query, {batch, rows}), value = new_floats(args.query, {batch, rows});
  if (batch == 0) return {index, value};
  if (args.num_keys && check_values_on_device()) args.check_values(scope.host_copy(*args.num_keys).data());
  const NearestOptions options{args.cosine, args.query_ranks(), args.key_ranks(), args.exclude_self, data_or_null(args.num_keys)};
  dispatch_cuda(args.query.scalar_type(), [&](auto* element) {
    using scalar_t = std::remove_pointer_t<decltype(element)>;
    const NearestRows<scalar_t> given{rows_of<scalar_t>(args.query), rows_of<scalar_t>(args.key), batch, rows, count, args.same};
    const NearestPlan plan = plan_nearest(given, args.cosine);
    const auto layout = [&](auto&& allocate) { return NearestScratch(plan, given, allocate); };
    ScratchMemory memory(args.query, layout);
    CudaScope::check(launch_nearest(given, options, plan, layout(memory), static_cast<int64_t*>(index.mutable_data_ptr()),
                                    static_cast<float*>(value.mutable_data_ptr()), scope.stream()),
                     "nearest");
  });
  return {index, value};
}

}  // namespace
}  // namespace sts

STABLE_TORCH_LIBRARY_IMPL(STS_NAMESPACE, CUDA, m) { m.impl("nearest", TORCH_BOX(&sts::nearest_cuda)); }
