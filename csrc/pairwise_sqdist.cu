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
    const auto rows = rows_of<std::remove_pointer_t<decltype(element)>>(x);
    CudaScope::check(launch_pairwise_sqdist(rows.data, batch, tokens, rows.channels, rows.batch_stride, rows.row_stride, static_cast<float*>(out.mutable_data_ptr()),
                                            scope.stream()),
                     "pairwise_sqdist");
  });
  return out;
}

}  // namespace
}  // namespace sts

STABLE_TORCH_LIBRARY_IMPL(STS_NAMESPACE, CUDA, m) { m.impl("pairwise_sqdist", TORCH_BOX(&sts::pairwise_sqdist_cuda)); }
