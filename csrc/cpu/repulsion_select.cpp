// repulsion_select on the CPU: greedy selection (select.h) with rule Repulsion.
#include "select.h"

namespace sts {
namespace {

Tensor select(const Selection& selection, double eps) {
  const Repulsion rule{checked_eps(selection.op, eps)};
  return cpu::select_all(selection, [&](cpu::WorkerTeam& team, const auto& rows, int64_t begin, int64_t end, int64_t* picks) {
    cpu::select_items(team, rows, selection.items, rule, begin, end, picks);
  });
}

Tensor repulsion_select_cpu(const Tensor& features, int64_t k, double eps, std::optional<Tensor> anchor, std::optional<Tensor> num_tokens) {
  return select(Selection::padded("repulsion_select", features, k, anchor, num_tokens), eps);
}

Tensor repulsion_select_varlen_cpu(const Tensor& features, const Tensor& cu_seqlens, const Tensor& cu_budgets, int64_t total_k, double eps,
                                   std::optional<Tensor> anchor, std::optional<int64_t> max_seqlen) {
  return select(Selection::packed("repulsion_select_varlen", features, cu_seqlens, cu_budgets, total_k, anchor, max_seqlen), eps);
}

}  // namespace
}  // namespace sts

STABLE_TORCH_LIBRARY_IMPL(STS_NAMESPACE, CPU, m) {
  m.impl("repulsion_select", TORCH_BOX(&sts::repulsion_select_cpu));
  m.impl("repulsion_select_varlen", TORCH_BOX(&sts::repulsion_select_varlen_cpu));
}
