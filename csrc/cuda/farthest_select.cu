#include "select_glue.h"

namespace sts {
namespace {

Tensor farthest_select_cuda(const Tensor& features, int64_t k, std::optional<Tensor> anchor, std::optional<Tensor> quality,
                            std::optional<Tensor> start, std::string metric, std::optional<Tensor> num_tokens) {
  return select(Selection::padded("farthest_select", features, k, anchor, num_tokens).with_farthest(quality, start, metric), Farthest());
}

Tensor farthest_select_varlen_cuda(const Tensor& features, const Tensor& cu_seqlens, const Tensor& cu_budgets, int64_t total_k,
                                   std::optional<Tensor> anchor, std::optional<Tensor> quality, std::optional<Tensor> start,
                                   std::string metric, std::optional<int64_t> max_seqlen) {
  return select(Selection::packed("farthest_select_varlen", features, cu_seqlens, cu_budgets, total_k, anchor, max_seqlen)
                    .with_farthest(quality, start, metric),
                Farthest());
}

}  // namespace
}  // namespace sts

STABLE_TORCH_LIBRARY_IMPL(STS_NAMESPACE, CUDA, m) {
  m.impl("farthest_select", TORCH_BOX(&sts::farthest_select_cuda));
  m.impl("farthest_select_varlen", TORCH_BOX(&sts::farthest_select_varlen_cuda));
}
