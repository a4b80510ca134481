// knn_density on the CPU: exp(-mean of the k smallest squared distances / C) of each token.
//
// What: small k: distances in product form, |a|^2 + |b|^2 - 2 a.b, which may cancel, with an error bound. The k-th smallest of them plus
//   the error bounds the k smallest distances; the tokens within that bound are recomputed by differences, and the mean is taken over those
//   alone. Larger k: all distances by differences.
// Chosen when: the features are on the CPU.
// Steps, for a block of kQueries tokens:
//   (1) compute their dot products or distances with all tokens of the item, a strip of (kQueries, N);
//   (2) select the k smallest of each token and take the mean.
// Synchronisation: a task is a range of such blocks, and writes the outputs of its tokens alone.
#include <algorithm>
#include <cmath>

#include "common/knn_glue.h"
#include "rows.h"

namespace sts {
namespace {

// Selects the k nearest rows of an item, for one row at a time. A row is its own neighbour.
class Neighbours {
 public:
  Neighbours(const cpu::FloatRows& rows, int64_t k)
      : rows_(rows), k_(k), error_(2 * cpu::dot_error(rows.channels)), sqdist_(rows.count), scratch_(rows.count) {
    candidates_.reserve(rows.count);
  }

  // Mean of the k smallest distances of row i to the rows of its item, [first, first + present). dots: the products of row i with them.
  double mean_from_dots(int64_t i, int64_t first, int64_t present, const float* dots) {
    const float* squares = rows_.square.data() + first;
    const char* usable = rows_.usable.data() + first;
    float max_square = 0.f, bound = kInfinity;
    int64_t count = 0;
    for (int64_t j = 0; j < present; ++j) {
      if (!usable[j]) continue;
      max_square = std::max(max_square, squares[j]);
      scratch_[count++] = sqdist_[j] = rows_.square[i] + squares[j] - 2.f * dots[j];
    }
    if (cpu::in_range(max_square)) {  // product-form distances of the k nearest are <= bound; out of range, recompute all
      const int64_t kept = std::min(k_, count);
      std::nth_element(scratch_.begin(), scratch_.begin() + kept - 1, scratch_.begin() + count);
      bound = scratch_[kept - 1] + 2 * error_ * (rows_.square[i] + max_square);
    }
    candidates_.clear();
    for (int64_t j = 0; j < present; ++j)
      if (usable[j] && !(sqdist_[j] > bound)) candidates_.push_back(rows_.row[first + j]);
    count = static_cast<int64_t>(candidates_.size());
    cpu::sqdist(&rows_.row[i], 1, candidates_.data(), count, candidates_.data(), 0, rows_.channels, sqdist_.data(), count);
    return mean(count);
  }

  // As mean_from_dots, from distances by differences.
  double mean_from_distances(int64_t first, int64_t present, const float* distances) {
    int64_t count = 0;
    for (int64_t j = 0; j < present; ++j)
      if (rows_.usable[first + j]) sqdist_[count++] = distances[j];
    return mean(count);
  }

 private:
  // Mean of the k smallest of the first `count` distances, summed in ascending order: the bits do not depend on the order of the rows.
  double mean(int64_t count) {
    const int64_t kept = std::min(k_, count);
    std::nth_element(sqdist_.begin(), sqdist_.begin() + kept - 1, sqdist_.begin() + count);
    std::sort(sqdist_.begin(), sqdist_.begin() + kept);
    double sum = 0;
    for (int64_t j = 0; j < kept; ++j) sum += sqdist_[j];
    return sum / static_cast<double>(kept);
  }

  const cpu::FloatRows& rows_;
  const int64_t k_;
  const float error_;
  std::vector<float> sqdist_, scratch_;
  std::vector<const float*> candidates_;
};

Tensor knn_density_cpu(const Tensor& features, int64_t k, std::optional<Tensor> num_tokens) {
  const KnnArguments args(features, k, num_tokens);
  const Tensor& x = args.features;
  const int64_t batch = x.size(0), tokens = x.size(1), channels = x.size(2);
  args.check_values(data_or_null(args.num_tokens));
  Tensor density = new_floats(x, {batch, tokens});
  float* out = static_cast<float*>(density.mutable_data_ptr());
  cpu::dispatch(x.scalar_type(), [&](auto* element) {
    using scalar_t = std::remove_pointer_t<decltype(element)>;
    cpu::with_team(2 * batch * tokens * tokens * channels, [&](cpu::WorkerTeam& team) {
      const auto rows = cpu::FloatRows::of(team, rows_of<scalar_t>(x), batch, tokens, false);
      const int64_t blocks = ceil_div(tokens, cpu::kQueries);
      const bool use_products = 8 * k < tokens;  // else too many distances would be recomputed
      team.for_rows(batch * blocks, 2 * cpu::kQueries * tokens * rows.channels, [&](int64_t begin, int64_t end) {
        Neighbours neighbours(rows, k);
        std::vector<float> strip(cpu::kQueries * tokens);
        for (int64_t block = begin; block < end; ++block) {
          const int64_t b = block / blocks, i0 = block % blocks * cpu::kQueries, i1 = std::min(i0 + cpu::kQueries, tokens),
                        item = b * tokens;
          const int64_t present = counted(data_or_null(args.num_tokens), b, tokens);
          // (1) the strip
          for (int64_t j = 0; j < present; j += cpu::kKeys) {
            const float* const* keys = &rows.row[item + j];
            const int64_t count = std::min<int64_t>(cpu::kKeys, present - j);
            for (int64_t i = i0; i < std::min(i1, present); i += cpu::kPoints) {
              const int used = static_cast<int>(std::min<int64_t>(cpu::kPoints, i1 - i));
              float* values = strip.data() + (i - i0) * tokens + j;
              if (use_products)
                cpu::dot(&rows.row[item + i], used, keys, count, rows.channels, values, tokens);
              else
                cpu::sqdist(&rows.row[item + i], used, keys, count, keys, 0, rows.channels, values, tokens);
            }
          }
          // (2) the means
          for (int64_t i = i0; i < i1; ++i) {
            const float* values = strip.data() + (i - i0) * tokens;
            out[item + i] = 0.f;
            if (i >= present || !rows.usable[item + i]) continue;
            const double mean = use_products ? neighbours.mean_from_dots(item + i, item, present, values)
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
