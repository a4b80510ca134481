#include <algorithm>
#include <cmath>
#include <limits>

#include "common/knn_glue.h"
#include "rows.h"

namespace sts {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();

// The nearest among the rows of one item, of one row at a time.
class Neighbours {
 public:
  Neighbours(const cpu::FloatRows& rows, int64_t k)
      : rows_(rows), k_(k), error_(2 * cpu::dot_error(rows.channels)), measured_(rows.count), sorted_(rows.count) {
    candidates_.reserve(rows.count);
  }

  // Mean of the k smallest distances of row `i` to rows [first, first + present), its item's. dots: its products with them.
  double mean_from_dots(int64_t i, int64_t first, int64_t present, const float* dots) {
    const float* squares = rows_.square.data() + first;
    const char* usable = rows_.usable.data() + first;
    float most = 0.f, bound = kInf;
    int64_t count = 0;
    for (int64_t j = 0; j < present; ++j) {
      if (!usable[j]) continue;
      most = std::max(most, squares[j]);
      sorted_[count++] = measured_[j] = rows_.square[i] + squares[j] - 2.f * dots[j];
    }
    if (cpu::in_range(most)) {  // the k nearest by these distances, which may cancel, are no further than `bound`
      const int64_t kept = std::min(k_, count);
      std::nth_element(sorted_.begin(), sorted_.begin() + kept - 1, sorted_.begin() + count);
      bound = sorted_[kept - 1] + 2 * error_ * (rows_.square[i] + most);
    }
    candidates_.clear();
    for (int64_t j = 0; j < present; ++j)
      if (usable[j] && !(measured_[j] > bound)) candidates_.push_back(rows_.row[first + j]);
    count = static_cast<int64_t>(candidates_.size());
    cpu::sqdist(&rows_.row[i], 1, candidates_.data(), count, candidates_.data(), 0, rows_.channels, measured_.data(), count);
    return mean(count);
  }

  // The same from the distances themselves.
  double mean_from_distances(int64_t first, int64_t present, const float* distances) {
    int64_t count = 0;
    for (int64_t j = 0; j < present; ++j)
      if (rows_.usable[first + j]) measured_[count++] = distances[j];
    return mean(count);
  }

 private:
  // In order of size, so that the sum depends on the distances alone.
  double mean(int64_t count) {
    const int64_t kept = std::min(k_, count);
    std::nth_element(measured_.begin(), measured_.begin() + kept - 1, measured_.begin() + count);
    std::sort(measured_.begin(), measured_.begin() + kept);
    double sum = 0;
    for (int64_t j = 0; j < kept; ++j) sum += measured_[j];
    return sum / static_cast<double>(kept);
  }

  const cpu::FloatRows& rows_;
  const int64_t k_;
  const float error_;
  std::vector<float> measured_, sorted_;
  std::vector<const float*> candidates_;
};

Tensor knn_density_cpu(const Tensor& features, int64_t k, std::optional<Tensor> num_tokens) {
  const KnnDensity call(features, k, num_tokens);
  const Tensor& x = call.features;
  const int64_t batch = x.size(0), tokens = x.size(1), channels = x.size(2);
  call.check_values(data_or_null(call.num_tokens));
  Tensor density = new_floats(x, {batch, tokens});
  float* out = static_cast<float*>(density.mutable_data_ptr());
  cpu::dispatch(x.scalar_type(), [&](auto* element) {
    using scalar_t = std::remove_pointer_t<decltype(element)>;
    cpu::with_team(2 * batch * tokens * tokens * channels, [&](cpu::WorkerTeam& team) {
      const auto rows = cpu::FloatRows::of(team, rows_of<scalar_t>(x), batch, tokens, false);
      const int64_t parts = ceil_div(tokens, cpu::kQueries);
      const bool estimate = 8 * k < tokens;  // else too many distances would be measured again
      team.for_rows(batch * parts, 2 * cpu::kQueries * tokens * rows.channels, [&](int64_t begin, int64_t end) {
        Neighbours neighbours(rows, k);
        std::vector<float> strip(cpu::kQueries * tokens);
        for (int64_t part = begin; part < end; ++part) {
          const int64_t b = part / parts, i0 = part % parts * cpu::kQueries, i1 = std::min(i0 + cpu::kQueries, tokens), item = b * tokens;
          const int64_t present = cpu::counted(data_or_null(call.num_tokens), b, tokens);
          for (int64_t j = 0; j < present; j += cpu::kKeys) {
            const float* const* keys = &rows.row[item + j];
            const int64_t count = std::min<int64_t>(cpu::kKeys, present - j);
            for (int64_t i = i0; i < std::min(i1, present); i += cpu::kPoints) {
              const int used = static_cast<int>(std::min<int64_t>(cpu::kPoints, i1 - i));
              float* values = strip.data() + (i - i0) * tokens + j;
              if (estimate)
                cpu::dot(&rows.row[item + i], used, keys, count, rows.channels, values, tokens);
              else
                cpu::sqdist(&rows.row[item + i], used, keys, count, keys, 0, rows.channels, values, tokens);
            }
          }
          for (int64_t i = i0; i < i1; ++i) {
            const float* values = strip.data() + (i - i0) * tokens;
            out[item + i] = 0.f;
            if (i >= present || !rows.usable[item + i]) continue;
            const double mean = estimate ? neighbours.mean_from_dots(item + i, item, present, values)
                                         : neighbours.mean_from_distances(item, present, values);
            out[item + i] = static_cast<float>(std::exp(-mean / static_cast<double>(channels)));
          }
        }
      });
    });
  });
  return density;
}

}  // namespace
}  // namespace sts

STABLE_TORCH_LIBRARY_IMPL(STS_NAMESPACE, CPU, m) { m.impl("knn_density", TORCH_BOX(&sts::knn_density_cpu)); }
