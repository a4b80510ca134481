#include "knn_density.cuh"

#include "common/knn_glue.h"
#include "cuda_glue.h"

namespace sts {
namespace {

Tensor knn_density_cuda(const Tensor& features, int64_t k, std::optional<Tensor> num_tokens) {
  const KnnDensity call(features, k, num_tokens);
  const CudaScope scope(call.features);
  const int64_t batch = call.features.size(0), tokens = call.features.size(1);
  Tensor density = new_floats(call.features, {batch, tokens});
  if (batch == 0) return density;
  const int64_t strip_floats = knn_strip(batch, tokens);
  Tensor strip = new_floats(call.features, {strip_floats}), info = new_floats(call.features, {batch, tokens, 2});
  dispatch_cuda(call.features.scalar_type(), [&](auto* element) {
    const auto rows = rows_of<std::remove_pointer_t<decltype(element)>>(call.features);
    CudaScope::check(
        launch_knn_density(rows.data, batch, tokens, rows.channels, rows.batch_stride, rows.row_stride, k, data_or_null(call.num_tokens),
                           strip_floats, static_cast<float*>(strip.mutable_data_ptr()), static_cast<float*>(info.mutable_data_ptr()),
                           static_cast<float*>(density.mutable_data_ptr()), scope.stream()),
        "knn_density");
  });
  return density;
}

}  // namespace
}  // namespace sts

STABLE_TORCH_LIBRARY_IMPL(STS_NAMESPACE, CUDA, m) { m.impl("knn_density", TORCH_BOX(&sts::knn_density_cuda)); }
