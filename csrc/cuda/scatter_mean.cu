#include "scatter_mean.cuh"

#include <tuple>

#include "common/scatter_glue.h"
#include "cuda_glue.h"

namespace sts {
namespace {

std::tuple<Tensor, Tensor> scatter_mean_cuda(const Tensor& features, const Tensor& assignment, int64_t count,
                                             std::optional<Tensor> weight) {
  const ScatterArguments args(features, assignment, count, weight);
  const Tensor& x = args.features;
  const CudaScope scope(x);
  const int64_t batch = x.size(0), tokens = x.size(1), channels = x.size(2);
  Tensor mean = new_tensor(x, {batch, count, channels}, static_cast<int32_t>(x.scalar_type())), mass = new_floats(x, {batch, count});
  if (batch == 0) return {mean, mass};
  if (check_values_on_device()) args.check_values(scope.host_copy(args.assignment).data());
  Tensor slots = new_tensor(x, {batch, tokens}, aoti_torch_dtype_int32());
  dispatch_cuda(x.scalar_type(), [&](auto* element) {
    using scalar_t = std::remove_pointer_t<decltype(element)>;
    const auto rows = rows_of<scalar_t>(x);
    CudaScope::check(
        launch_scatter(rows, batch, tokens, args.slots(), count, args.weights(), static_cast<int*>(slots.mutable_data_ptr()),
                       static_cast<scalar_t*>(mean.mutable_data_ptr()), static_cast<float*>(mass.mutable_data_ptr()), scope.stream()),
        "scatter_mean");
  });
  return {mean, mass};
}

}  // namespace
}  // namespace sts

STABLE_TORCH_LIBRARY_IMPL(STS_NAMESPACE, CUDA, m) { m.impl("scatter_mean", TORCH_BOX(&sts::scatter_mean_cuda)); }
