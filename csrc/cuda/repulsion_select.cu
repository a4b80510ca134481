#include "select_glue.h"

namespace sts {
namespace {

Tensor repulsion_select_cuda(const Tensor& features, int64_t k, double eps, std::optional<Tensor> anchor,
                             std::optional<Tensor> num_tokens) {
  return select(Selection::padded("repulsion_select", features, k, anchor, num_tokens), Repulsion{checked_eps("repulsion_select", eps)});
}

Tensor repulsion_select_varlen_cuda(const Tensor& features, const Tensor& cu_seqlens, const Tensor& cu_budgets, int64_t total_k, double eps,
                                    std::optional<Tensor> anchor, std::optional<int64_t> max_seqlen) {
  return select(Selection::packed("repulsion_select_varlen", features, cu_seqlens, cu_budgets, total_k, anchor, max_seqlen),
                Repulsion{checked_eps("repulsion_select_varlen", eps)});
}

}  // namespace
}  // namespace sts

STABLE_TORCH_LIBRARY_IMPL(STS_NAMESPACE, CUDA, m) {
  m.impl("repulsion_select", TORCH_BOX(&sts::repulsion_select_cuda));
  m.impl("repulsion_select_varlen", TORCH_BOX(&sts::repulsion_select_varlen_cuda));
}
