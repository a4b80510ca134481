// dpp_select on the CPU: greedy MAP of a DPP by Cholesky rows, with drafted rows.
//
// What: pick j has the row e[i] = (c[i][j] - sum over earlier picks t of e_t[i] e_t[j]) / sqrt(distance[j]), where c is the cosine. The
//   gain of token i is quality[i]^2 * distance[i], where distance[i] loses e[i]^2 with every pick. The picks are those of the plain loop,
//   bit for bit: each element takes the same operations in the same order, drafted or not. Sums are float64: in float32 their rounding
//   errors, divided by sqrt(distance), would soon be as large as the remaining gains.
// Chosen when: the features are on the CPU.
// Steps, for each pick:
//   (1) if its row is not drafted: draft the tokens of the largest gains, compute all their cosines in one pass over the features, and
//       subtract the terms of the picks so far;
//   (2) subtract the terms of the picks since the draft;
//   (3) finish the row: divide it, update distances and losses (loss = -gain), and take the lowest loss;
//   (4) if the gain is at most `floor` times the first gain, stop and fill up by quality.
// Synchronisation: the leader runs the loop; the team shares passes and subtractions (for_rows). If there are enough items, each thread
//   runs whole items instead.
#include <algorithm>
#include <cmath>
#include <tuple>
#include <vector>

#include "common/dpp_glue.h"
#include "common/dpp_rule.h"
#include "parallel.h"
#include "row_cache.h"
#include "vector_math.h"

namespace sts {
namespace {

constexpr int64_t kStripRows = 16;             // rows per strip of a pass: they stay in cache while they are compared with all points
constexpr int kCachedRows = 3 * cpu::kPoints;  // slots of the row cache

// Selects from one item at a time; scratch memory is reused from item to item.
template <class scalar_t>
class DppSelector {
 public:
  DppSelector(cpu::WorkerTeam& team, const Rows<scalar_t>& features, float floor)
      : team_(team), features_(features), point_size_(cpu::point_size(features.channels)), floor_(floor) {}

  // order, gain: (k) outputs of item b; slots past `tokens` get -1 and 0.
  void run(int64_t b, int64_t tokens, int64_t k, const float* quality, int64_t* order, float* gain) {
    const int64_t picks = std::min(k, tokens);
    std::fill(order + picks, order + k, -1);
    std::fill(gain, gain + k, 0.f);
    if (picks == 0) return;
    const double max_quality = start(b, tokens, quality);
    cpu::Lowest best = cpu::lowest(loss_.data(), width_);
    const float min_gain = -best.value * floor_;
    int64_t step = 0;
    for (; step < picks && -best.value > min_gain; ++step) {
      const auto pick = best.index;
      order[step] = pick;
      gain[step] = static_cast<float>(-best.value * max_quality * max_quality);
      weight_[pick] = 0.f;
      if (step + 1 == picks) return;
      best = add_row(step, pick, picks - step);
    }
    fill(tokens, quality, order, step, picks);  // (4) fill up
  }

 private:
  // Fills the unit rows, scales (1 / length of the rounded unit row), weights (q_i / max |q|)^2, squared distances to the empty span (1, or
  // 0 for a zero or unusable row) and losses. Returns max |q| over the tokens of distance 1.
  double start(int64_t b, int64_t tokens, const float* quality) {
    tokens_ = tokens;
    width_ = ceil_div(tokens, cpu::kColumns) * cpu::kColumns;
    unit_.resize(tokens * point_size_);
    unit_row_.resize(tokens);
    distance_.assign(width_, 0.);
    scale_.assign(tokens, 0.);
    weight_.assign(width_, 0.f);
    loss_.assign(width_, 0.f);
    usable_.resize(tokens);
    rows_.clear();
    cache_.reset(width_, kCachedRows);
    terms_subtracted_.resize(tokens);
    team_.for_rows(tokens, 4 * features_.channels, [&](int64_t begin, int64_t end) {
      std::vector<double> doubles(point_size_);
      for (int64_t i = begin; i < end; ++i) {
        const scalar_t* row = features_.row(b, i);
        float* unit = unit_.data() + i * point_size_;
        unit_row_[i] = unit;
        usable_[i] = std::isfinite(quality[i]) && cpu::all_finite(row, features_.channels);
        if (usable_[i]) {
          cpu::to_point(row, unit, features_.channels);
          if (!cpu::to_unit(unit, point_size_)) continue;
          std::copy_n(unit, point_size_, doubles.begin());
          const double* point = doubles.data();
          double square;
          cpu::dot64(&point, 1, &unit_row_[i], 1, point_size_, &square, 1);
          scale_[i] = 1. / std::sqrt(square);
          distance_[i] = 1.;
        } else {
          std::fill_n(unit, point_size_, 0.f);
        }
      }
    });
    float max_quality = 0.f;
    for (int64_t i = 0; i < tokens; ++i)
      if (distance_[i] > 0) max_quality = std::max(max_quality, std::fabs(quality[i]));
    for (int64_t i = 0; i < tokens; ++i) {
      if (!(distance_[i] > 0) || max_quality == 0) continue;
      const float relative = quality[i] / max_quality;
      weight_[i] = relative * relative;
      loss_[i] = -static_cast<float>(weight_[i] * distance_[i]);
    }
    return max_quality;
  }

  // Appends the Cholesky row of `pick`, whose weight is already 0, and returns the token of the largest gain after it.
  cpu::Lowest add_row(int64_t step, int64_t pick, int64_t picks) {
    if (!cache_.has(pick)) compute_rows(step, pick, picks);  // (1) draft
    // (2) terms of the picks since the draft
    double* row = cache_.row(pick);
    subtract(&pick, &row, 1, terms_subtracted_[pick], step);
    cache_.remove(pick);
    rows_.resize((step + 1) * width_);
    std::copy_n(row, width_, rows_.data() + step * width_);
    // (3) finish the row
    return cpu::finish_row(rows_.data() + step * width_, std::sqrt(distance_[pick]), distance_.data(), weight_.data(), loss_.data(),
                           width_);
  }

  // rows[p] -= sum over t in [from, to) of e_t[tokens[p]] e_t.
  void subtract(const int64_t* tokens, double* const* rows, int count, int64_t from, int64_t to) {
    if (from == to) return;
    factors_.resize(count * (to - from));
    const double* factor[cpu::kPoints];
    for (int p = 0; p < count; ++p) {
      factor[p] = factors_.data() + p * (to - from);
      for (int64_t t = from; t < to; ++t) factors_[p * (to - from) + t - from] = rows_[t * width_ + tokens[p]];
    }
    team_.for_rows(width_ / cpu::kColumns, cpu::kColumns * 2 * count * (to - from), [&](int64_t begin, int64_t end) {
      cpu::subtract_products(rows, factor, count, rows_.data() + from * width_, width_, to - from, begin * cpu::kColumns,
                             end * cpu::kColumns);
    });
  }

  // Computes the rows of `pick` and of drafted tokens, before the division: cosines less the terms of all rows so far.
  void compute_rows(int64_t step, int64_t pick, int64_t picks) {
    choose_drafts(pick, std::min<int64_t>(max_draft(), picks));
    const int count = static_cast<int>(drafted_.size());
    double* rows[cpu::kPoints];
    const double* points[cpu::kPoints];
    points_.resize(count * point_size_);
    cache_.make_room(count, loss_.data());
    for (int p = 0; p < count; ++p) {
      terms_subtracted_[drafted_[p]] = step;
      rows[p] = cache_.add(drafted_[p]);
      double* point = points_.data() + p * point_size_;
      std::copy_n(unit_row_[drafted_[p]], point_size_, point);
      points[p] = point;
      std::fill(rows[p] + tokens_, rows[p] + width_, 0.);
    }
    const int64_t strips = ceil_div(tokens_, kStripRows);
    team_.for_rows(strips, kStripRows * 2 * count * features_.channels, [&](int64_t begin, int64_t end) {
      double strip[cpu::kPoints * kStripRows];
      for (int64_t s = begin; s < end; ++s) {
        const int64_t first = s * kStripRows, used = std::min(kStripRows, tokens_ - first);
        cpu::dot64(points, count, unit_row_.data() + first, used, point_size_, strip, kStripRows);
        for (int p = 0; p < count; ++p)
          for (int64_t i = 0; i < used; ++i) rows[p][first + i] = strip[p * kStripRows + i] * scale_[drafted_[p]] * scale_[first + i];
      }
    });
    subtract(drafted_.data(), rows, count, 0, step);
  }

  // Max tokens per draft.
  int max_draft() const {
    const int asked = asked_lookahead(cpu::kPoints);
    return asked ? asked : cpu::kPoints;
  }

  // drafted_ = `pick` and the uncached tokens of the largest gains, at most `count` together.
  void choose_drafts(int64_t pick, int64_t count) {
    drafted_.assign(1, pick);
    if (count < 2) return;
    candidates_.clear();
    for (int64_t i = 0; i < tokens_; ++i)
      if (loss_[i] < 0 && weight_[i] > 0 && !cache_.has(i)) candidates_.push_back(i);
    const int64_t more = std::min<int64_t>(count - 1, static_cast<int64_t>(candidates_.size()));
    std::nth_element(candidates_.begin(), candidates_.begin() + more, candidates_.end(),
                     [&](int64_t a, int64_t b) { return loss_[a] < loss_[b]; });
    drafted_.insert(drafted_.end(), candidates_.begin(), candidates_.begin() + more);
  }

  // Fills order[done] .. order[picks - 1] with the tokens not picked: usable ones by descending quality, then the others by index.
  void fill(int64_t tokens, const float* quality, int64_t* order, int64_t done, int64_t picks) {
    std::vector<bool> picked(tokens);
    for (int64_t step = 0; step < done; ++step) picked[order[step]] = true;
    candidates_.clear();
    for (int64_t i = 0; i < tokens; ++i)
      if (!picked[i]) candidates_.push_back(i);
    const auto before = [&](int64_t a, int64_t b) {
      if (usable_[a] != usable_[b]) return usable_[a] > usable_[b];
      if (usable_[a] && quality[a] != quality[b]) return quality[a] > quality[b];
      return a < b;
    };
    std::partial_sort(candidates_.begin(), candidates_.begin() + (picks - done), candidates_.end(), before);
    std::copy_n(candidates_.begin(), picks - done, order + done);
  }

  cpu::WorkerTeam& team_;
  Rows<scalar_t> features_;
  int64_t point_size_, tokens_ = 0, width_ = 0;  // width_: tokens_ rounded up to kColumns, the row length of rows_ and cache_
  float floor_;
  std::vector<float> unit_;                // (tokens_, point_size_)
  std::vector<float> weight_, loss_;       // (width_)
  std::vector<double> scale_;              // (tokens_)
  std::vector<double> distance_;           // (width_)
  std::vector<double> points_;             // (drafted, point_size_)
  std::vector<double> rows_;               // (picks so far, width_): Cholesky rows
  std::vector<double> factors_;            // (rows, terms): scratch of subtract
  std::vector<const float*> unit_row_;     // (tokens_)
  std::vector<char> usable_;               // (tokens_): finite row and quality
  std::vector<int64_t> terms_subtracted_;  // (tokens_): number of terms subtracted from the drafted row of a token
  std::vector<int64_t> drafted_;           // drafted tokens, the pick first
  std::vector<int64_t> candidates_;        // scratch
  cpu::RowCache<double> cache_;            // drafted rows, before the division
};

std::tuple<Tensor, Tensor> dpp_select_cpu(const Tensor& features, const Tensor& quality, int64_t k, double floor,
                                          std::optional<Tensor> num_tokens) {
  const DppArguments args(features, quality, k, floor, num_tokens);
  const int64_t batch = args.features.size(0), tokens = args.features.size(1), channels = args.features.size(2);
  const int64_t* counts = data_or_null(args.num_tokens);
  args.check_values(counts);
  Tensor order = new_indices(args.features, {batch, k}), gain = new_floats(args.features, {batch, k});
  auto* const orders = static_cast<int64_t*>(order.mutable_data_ptr());
  auto* const gains = static_cast<float*>(gain.mutable_data_ptr());
  const auto* const qualities = static_cast<const float*>(args.quality.const_data_ptr());
  cpu::dispatch(args.features.scalar_type(), [&](auto* element) {
    const auto rows = rows_of<std::remove_pointer_t<decltype(element)>>(args.features);
    const auto run = [&](cpu::WorkerTeam& team, int64_t begin, int64_t end) {
      DppSelector selector(team, rows, args.floor);
      for (int64_t b = begin; b < end; ++b)
        selector.run(b, counts ? counts[b] : tokens, k, qualities + b * tokens, orders + b * k, gains + b * k);
    };
    cpu::for_items(batch, 2 * tokens * (k + 4) * channels, run);
  });
  return {order, gain};
}

}  // namespace
}  // namespace sts

STABLE_TORCH_LIBRARY_IMPL(STS_NAMESPACE, CPU, m) { m.impl("dpp_select", TORCH_BOX(&sts::dpp_select_cpu)); }
