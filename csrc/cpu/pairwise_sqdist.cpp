// pairwise_sqdist on the CPU: all_pairs (pairs.h) for each batch entry.
#include "pairs.h"

namespace sts {
namespace {

Tensor pairwise_sqdist_cpu(const Tensor& features) {
  const Tensor x = checked_features("pairwise_sqdist", features, 3);
  const int64_t batch = x.size(0), tokens = x.size(1);
  Tensor out = new_floats(x, {batch, tokens, tokens});
  float* matrices = static_cast<float*>(out.mutable_data_ptr());
  cpu::dispatch(x.scalar_type(), [&](auto* element) {
    const auto rows = rows_of<std::remove_pointer_t<decltype(element)>>(x);
    cpu::with_team(batch * tokens * tokens * rows.channels, [&](cpu::WorkerTeam& team) {
      std::vector<decltype(rows.data)> row(tokens);
      for (int64_t b = 0; b < batch; ++b) {
        for (int64_t i = 0; i < tokens; ++i) row[i] = rows.row(b, i);
        cpu::all_pairs(team, row.data(), tokens, rows.channels, matrices + b * tokens * tokens);
      }
    });
  });
  return out;
}

}  // namespace
}  // namespace sts

STABLE_TORCH_LIBRARY_IMPL(STS_NAMESPACE, CPU, m) { m.impl("pairwise_sqdist", TORCH_BOX(&sts::pairwise_sqdist_cpu)); }
