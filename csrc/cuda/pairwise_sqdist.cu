#include "pairwise_sqdist.cuh"

#include "cuda_glue.h"

namespace sts {
namespace {

Tensor pairwise_sqdist_cuda(const Tensor& features) {
  const Tensor x = checked_features("pairwise_sqdist", features, 3);
  const CudaScope scope(x);
  const int64_t batch = x.size(0), tokens = x.size(1);
  Tensor out = new_floats(x, {batch, tokens, tokens});
  if (batch == 0) return out;
  dispatch_cuda(x.scalar_type(), [&](auto* element) {
    using scalar_t = std::remove_pointer_t<decltype(element)>;
    const auto rows = rows_of<scalar_t>(x);
    const auto layout = [&](auto&& allocate) { return pairwise_sqdist_scratch<scalar_t>(batch, tokens, rows.channels, allocate); };
    ScratchMemory scratch(x, layout);
    CudaScope::check(
        launch_pairwise_sqdist(rows, batch, tokens, layout(scratch), static_cast<float*>(out.mutable_data_ptr()), scope.stream()),
        "pairwise_sqdist");
  });
  return out;
}

}  // namespace
}  // namespace sts

STABLE_TORCH_LIBRARY_IMPL(STS_NAMESPACE, CUDA, m) { m.impl("pairwise_sqdist", TORCH_BOX(&sts::pairwise_sqdist_cuda)); }
