// repulsion_step_ on the CPU: one step of greedy repulsion on potentials that the caller holds, updated in place.
//
// What: adds the weights of a pick to the potentials, and finds the lowest. The potentials may be strided: an entry is copied and written
//   back.
// Chosen when: the features are on the CPU.
// Steps, for each batch entry: (1) add the weights of `picked` to the potentials, unless it is -1; (2) give non-finite tokens
//   kNonFinitePotential, and the pick infinity; (3) return the token of the lowest potential, or -1 if all are picked.
// Synchronisation: the leader takes one entry after another; the team shares its tokens in (1) and (2) (for_rows).
#include <vector>

#include "parallel.h"
#include "vector_math.h"

namespace sts {
namespace {

Tensor repulsion_step_cpu(Tensor potential, const Tensor& features, const Tensor& picked, double eps) {
  const StepArguments args(potential, features, picked, eps);
  const int64_t batch = args.features.size(0), tokens = args.features.size(1), channels = args.features.size(2);
  const int64_t* picks = static_cast<const int64_t*>(args.picked.const_data_ptr());
  StepArguments::check_values(picks, batch, tokens);
  Tensor out = new_indices(args.features, {batch});
  int64_t* next = static_cast<int64_t*>(out.mutable_data_ptr());
  float* potentials = static_cast<float*>(potential.mutable_data_ptr());
  const int64_t batch_stride = potential.stride(0), token_stride = potential.stride(1);
  // copy: the potentials of an entry, contiguous. The tensor itself may be strided.
  std::vector<float> copy(tokens), weight(tokens), point(cpu::point_size(channels));
  cpu::dispatch(args.features.scalar_type(), [&](auto* element) {
    using scalar_t = std::remove_pointer_t<decltype(element)>;
    const auto rows = rows_of<scalar_t>(args.features);
    std::vector<const scalar_t*> row(tokens);
    cpu::with_team(batch * tokens * 4 * channels, [&](cpu::WorkerTeam& team) {
      for (int64_t b = 0; b < batch; ++b) {
        float* item = potentials + b * batch_stride;
        for (int64_t i = 0; i < tokens; ++i) copy[i] = item[i * token_stride], row[i] = rows.row(b, i);
        if (picks[b] >= 0) cpu::to_point(row[picks[b]], point.data(), channels);
        team.for_rows(tokens, 4 * channels, [&](int64_t begin, int64_t end) {
          // (1) add the weights
          if (picks[b] >= 0) {
            const float* points[] = {point.data()};
            cpu::sqdist(points, 1, row.data() + begin, end - begin, row.data() + end, 0, channels, weight.data() + begin, tokens);
            cpu::to_weight(args.rule, weight.data() + begin, nullptr, end - begin, 1.f);
            for (int64_t i = begin; i < end; ++i) copy[i] = args.rule.add(copy[i], weight[i]);
          }
          // (2) non-finite tokens: a NaN potential, or a row that is not finite
          for (int64_t i = begin; i < end; ++i)
            if (copy[i] != copy[i] || (copy[i] < kNonFinitePotential && !cpu::all_finite(row[i], channels))) copy[i] = kNonFinitePotential;
        });
        if (picks[b] >= 0) copy[picks[b]] = kInfinity;
        // (3) the next pick
        const cpu::Lowest best = cpu::lowest(copy.data(), tokens);
        next[b] = best.value == kInfinity ? -1 : best.index;
        for (int64_t i = 0; i < tokens; ++i) item[i * token_stride] = copy[i];
      }
    });
  });
  return out;
}

}  // namespace
}  // namespace sts

STABLE_TORCH_LIBRARY_IMPL(STS_NAMESPACE, CPU, m) { m.impl("repulsion_step_", TORCH_BOX(&sts::repulsion_step_cpu)); }
