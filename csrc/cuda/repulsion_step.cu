#include "repulsion_step.cuh"

#include "cuda_glue.h"

namespace sts {
namespace {

Tensor repulsion_step_cuda(Tensor potential, const Tensor& features, const Tensor& picked, double eps) {
  const StepArguments args(potential, features, picked, eps);
  const CudaScope scope(args.features);
  const int64_t batch = args.features.size(0), tokens = args.features.size(1);
  Tensor next = new_indices(args.features, {batch});
  if (batch == 0) return next;
  const int64_t* picks = static_cast<const int64_t*>(args.picked.const_data_ptr());
  if (check_values_on_device()) StepArguments::check_values(scope.host_copy(args.picked).data(), batch, tokens);
  dispatch_cuda(args.features.scalar_type(), [&](auto* element) {
    const auto rows = rows_of<std::remove_pointer_t<decltype(element)>>(args.features);
    CudaScope::check(launch_step(static_cast<float*>(potential.mutable_data_ptr()), potential.stride(0), potential.stride(1), rows, batch,
                                 tokens, picks, args.rule, static_cast<int64_t*>(next.mutable_data_ptr()), scope.stream()),
                     "repulsion_step_");
  });
  return next;
}

}  // namespace
}  // namespace sts

STABLE_TORCH_LIBRARY_IMPL(STS_NAMESPACE, CUDA, m) { m.impl("repulsion_step_", TORCH_BOX(&sts::repulsion_step_cuda)); }
