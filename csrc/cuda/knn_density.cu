#include "knn_density.cuh"

#include "common/knn_glue.h"
#include "cuda_glue.h"

namespace sts {
namespace {

Tensor knn_density_cuda(const Tensor& features, int64_t k, std::optional<Tensor> num_tokens) {
  const KnnArguments args(features, k, num_tokens);
  const CudaScope scope(args.features);
  const int64_t batch = args.features.size(0), tokens = args.features.size(1);
  Tensor density = new_floats(args.features, {batch, tokens});
  if (batch == 0) return density;
  if (args.num_tokens && check_values_on_device()) args.check_values(scope.host_copy(*args.num_tokens).data());
  dispatch_cuda(args.features.scalar_type(), [&](auto* element) {
    using scalar_t = std::remove_pointer_t<decltype(element)>;
    const auto rows = rows_of<scalar_t>(args.features);
    const KnnPlan plan = plan_knn<scalar_t>(batch, tokens);
    const auto layout = [&](auto&& allocate) { return KnnScratch(plan, batch, tokens, rows.channels, sizeof(scalar_t), allocate); };
    ScratchMemory memory(args.features, layout);
    CudaScope::check(launch_knn(rows, batch, tokens, args.k, data_or_null(args.num_tokens), plan, layout(memory),
                                static_cast<float*>(density.mutable_data_ptr()), scope.stream()),
                     "knn_density");
  });
  return density;
}

}  // namespace
}  // namespace sts

STABLE_TORCH_LIBRARY_IMPL(STS_NAMESPACE, CUDA, m) { m.impl("knn_density", TORCH_BOX(&sts::knn_density_cuda)); }
