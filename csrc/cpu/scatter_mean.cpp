// scatter_mean on the CPU: the weighted mean of the tokens assigned to each slot.
//
// What: the mean is 0 if the sum of the weights is not positive. Tokens that are not finite, or of non-finite weight, are left out.
// Chosen when: the features are on the CPU.
// Steps: (1) list the tokens of each slot by a counting sort; (2) for each slot, sum its tokens in ascending order in float64 and divide by
//   the sum of their weights.
// Synchronisation: a task is a range of slots, so sums need no atomics and do not depend on the number of threads.
#include <cmath>
#include <tuple>
#include <vector>

#include "common/scatter_glue.h"
#include "parallel.h"
#include "vector_math.h"

namespace sts {
namespace {

// The tokens of each slot of an item, as a CSR list: slot s holds token[start[s]] to token[start[s + 1] - 1], in ascending order.
struct SlotLists {
  std::vector<int64_t> start, token;

  SlotLists(const int64_t* slot, int64_t tokens, int64_t count) : start(count + 1), token(tokens) {
    for (int64_t i = 0; i < tokens; ++i)
      if (slot[i] >= 0) ++start[slot[i] + 1];
    for (int64_t s = 0; s < count; ++s) start[s + 1] += start[s];
    std::vector<int64_t> next(start.begin(), start.end() - 1);
    for (int64_t i = 0; i < tokens; ++i)
      if (slot[i] >= 0) token[next[slot[i]]++] = i;
  }
};

std::tuple<Tensor, Tensor> scatter_mean_cpu(const Tensor& features, const Tensor& assignment, int64_t count, std::optional<Tensor> weight) {
  const ScatterArguments args(features, assignment, count, weight);
  const Tensor& x = args.features;
  const int64_t batch = x.size(0), tokens = x.size(1), channels = x.size(2);
  args.check_values(args.slots());
  Tensor mean = new_tensor(x, {batch, count, channels}, static_cast<int32_t>(x.scalar_type()));
  Tensor mass = new_floats(x, {batch, count});
  cpu::dispatch(x.scalar_type(), [&](auto* element) {
    using scalar_t = std::remove_pointer_t<decltype(element)>;
    const auto rows = rows_of<scalar_t>(x);
    scalar_t* means = static_cast<scalar_t*>(mean.mutable_data_ptr());
    float* masses = static_cast<float*>(mass.mutable_data_ptr());
    // (1) tokens of each slot
    std::vector<SlotLists> lists;
    for (int64_t b = 0; b < batch; ++b) lists.emplace_back(args.slots() + b * tokens, tokens, count);
    cpu::with_team(batch * (4 * tokens + count) * channels, [&](cpu::WorkerTeam& team) {
      // (2) sums
      team.for_rows(batch * count, (4 * tokens / count + 1) * channels, [&](int64_t begin, int64_t end) {
        std::vector<double> sum(channels);
        for (int64_t r = begin; r < end; ++r) {
          const int64_t b = r / count, s = r % count;
          double mass_of_slot = 0;
          std::fill(sum.begin(), sum.end(), 0.0);
          for (int64_t m = lists[b].start[s]; m < lists[b].start[s + 1]; ++m) {
            const int64_t i = lists[b].token[m];
            const double w = args.weights() ? args.weights()[b * tokens + i] : 1.0;
            if (!std::isfinite(w) || !cpu::all_finite(rows.row(b, i), channels)) continue;
            cpu::add_weighted(rows.row(b, i), w, sum.data(), channels);
            mass_of_slot += w;
          }
          masses[r] = static_cast<float>(mass_of_slot);
          const double per_mass = mass_of_slot > 0 ? 1 / mass_of_slot : 0;
          for (int64_t c = 0; c < channels; ++c) means[r * channels + c] = static_cast<scalar_t>(static_cast<float>(sum[c] * per_mass));
        }
      });
    });
  });
  return {mean, mass};
}

}  // namespace
}  // namespace sts

STABLE_TORCH_LIBRARY_IMPL(STS_NAMESPACE, CPU, m) { m.impl("scatter_mean", TORCH_BOX(&sts::scatter_mean_cpu)); }
