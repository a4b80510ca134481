// farthest_select on the CPU: greedy selection (select.h) with rule Farthest, on the rows or on unit rows.
#include "select.h"

namespace sts {
namespace {

Tensor select(const Selection& selection) {
  return cpu::select_all(selection, [&](cpu::WorkerTeam& team, const auto& rows, int64_t begin, int64_t end, int64_t* picks) {
    if (selection.cosine) return cpu::select_unit_items(team, rows, selection.items, Farthest(), begin, end, picks);
    cpu::select_items(team, rows, selection.items, Farthest(), begin, end, picks);
  });
}

Tensor farthest_select_cpu(const Tensor& features, int64_t k, std::optional<Tensor> anchor, std::optional<Tensor> quality,
                           std::optional<Tensor> start, std::string metric, std::optional<Tensor> num_tokens) {
  return select(Selection::padded("farthest_select", features, k, anchor, num_tokens).with_farthest(quality, start, metric));
}

Tensor farthest_select_varlen_cpu(const Tensor& features, const Tensor& cu_seqlens, const Tensor& cu_budgets, int64_t total_k,
                                  std::optional<Tensor> anchor, std::optional<Tensor> quality, std::optional<Tensor> start,
                                  std::string metric, std::optional<int64_t> max_seqlen) {
  return select(Selection::packed("farthest_select_varlen", features, cu_seqlens, cu_budgets, total_k, anchor, max_seqlen)
                    .with_farthest(quality, start, metric));
}

}  // namespace
}  // namespace sts

STABLE_TORCH_LIBRARY_IMPL(STS_NAMESPACE, CPU, m) {
  m.impl("farthest_select", TORCH_BOX(&sts::farthest_select_cpu));
  m.impl("farthest_select_varlen", TORCH_BOX(&sts::farthest_select_varlen_cpu));
}
