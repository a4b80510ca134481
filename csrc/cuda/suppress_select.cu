#include "select_glue.h"

namespace sts {
namespace {

Tensor suppress_select_cuda(const Tensor& features, const Tensor& rank, const Tensor& tau, int64_t k, std::optional<Tensor> num_tokens) {
  return select(Selection::padded("suppress_select", features, k, std::nullopt, num_tokens).with_suppress(rank, tau), Suppress());
}

Tensor suppress_select_varlen_cuda(const Tensor& features, const Tensor& rank, const Tensor& tau, const Tensor& cu_seqlens,
                                   const Tensor& cu_budgets, int64_t total_k, std::optional<int64_t> max_seqlen) {
  return select(Selection::packed("suppress_select_varlen", features, cu_seqlens, cu_budgets, total_k, std::nullopt, max_seqlen)
                    .with_suppress(rank, tau),
                Suppress());
}

}  // namespace
}  // namespace sts

STABLE_TORCH_LIBRARY_IMPL(STS_NAMESPACE, CUDA, m) {
  m.impl("suppress_select", TORCH_BOX(&sts::suppress_select_cuda));
  m.impl("suppress_select_varlen", TORCH_BOX(&sts::suppress_select_varlen_cuda));
}
