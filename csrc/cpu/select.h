// Greedy selection on the CPU by any rule of selection_rule.h, with drafted rows of weights.
//
// What: the picks of the plain loop, bit for bit. One pass over the features computes the weight rows of several tokens: of the pick and of
//   drafted tokens, which are likely to be picked soon. A drafted row is cached until its token is picked. Potentials are exact at every
//   pick, so a wrong draft costs time and never changes a result.
// Chosen when: the features are on the CPU. If most of a few tokens are picked (plan_cpu_selection), the plain loop over stored N x N
//   weights replaces the drafts.
// Steps, for each pick:
//   (1) look up its row in the cache; if it is there, go to (5);
//   (2) compact the positions, if more than 1/16 of them hold picked tokens;
//   (3) draft: run the plain loop among a few candidates of low potential, to guess the next picks;
//   (4) compute the rows of the pick and the drafts in one pass;
//   (5) add the row to the potentials and take the lowest.
// Synchronisation: the leader runs the loop; the team shares the passes (for_rows). If there are enough items, each thread runs whole items
//   instead.
#pragma once
#include <type_traits>
#include <vector>

#include "common/selection_plan.h"
#include "pairs.h"
#include "row_cache.h"

namespace sts::cpu {

constexpr int64_t kStripRows = 16;              // rows per strip of a pass: they stay in cache while they are compared with all points
constexpr int kCachedRows = 2 * kCpuLookahead;  // slots of the row cache
static_assert(kCpuLookahead <= kPoints, "a pass compares a strip with its points in one call");
constexpr int64_t kTokensPerCandidate = 64;  // so few candidates that their distances cost little next to a pass

// Selects from one item at a time; scratch memory is reused from item to item. Arrays are indexed by position: compaction removes picked
// tokens and keeps the order of the others, so that passes leave picked tokens out and ties still go to the lowest token.
template <class scalar_t, class Rule>
class Selector {
 public:
  Selector(WorkerTeam& team, int64_t channels, const Items& items, Rule rule)
      : team_(team),
        channels_(channels),
        items_(items),
        rule_(rule),
        point_size_(point_size(channels)),
        points_(kPoints),
        point_values_(kPoints * point_size_) {}

  // Selects from item b, whose tokens are rows [first, first + item.tokens) of entry `entry`. out: item.picks slots.
  void run(const Rows<scalar_t>& rows, int64_t entry, int64_t first, int64_t b, const Item& item, int64_t* out) {
    num_positions_ = item.tokens;
    const int64_t picks = std::min(item.picks, num_positions_);
    std::fill(out + picks, out + item.picks, -1);
    if (picks == 0) return;
    row_.resize(num_positions_);
    token_.resize(num_positions_);
    for (int64_t i = 0; i < num_positions_; ++i) row_[i] = rows.row(entry, first + i), token_[i] = i;
    int64_t pick = start(items_.first_token(b, item), item.anchor), picked = 0;  // picked: tokens picked since the last compaction
    const CpuSelectionPlan plan = plan_cpu_selection(num_positions_, picks, num_positions_ * channels_ * sizeof(scalar_t));
    const int asked = asked_lookahead(kCpuLookahead);
    if (plan.stored && !asked) return run_stored(pick, picks, out);
    lookahead_ = asked ? asked : plan.lookahead;
    cache_.reset(num_positions_, kCachedRows);
    for (int64_t step = 0;; ++step) {
      out[step] = token_[pick];
      if (step + 1 == picks) break;
      if (!cache_.has(pick)) {                                                         // (1) look up
        if (picked > num_positions_ / 16) pick = compact_positions(pick), picked = 0;  // (2) compact
        draft(pick, step == 0, picks - 1 - step);                                      // (3) draft
        compute_rows();                                                                // (4) pass
      }
      // (5) add the row
      potential_[pick] = kInfinity;
      ++picked;
      const float* weight = cache_.row(pick);
      cache_.remove(pick);
      pick = add_then_lowest(rule_, potential_.data(), weight, num_positions_).index;
    }
  }

 private:
  // The plain loop over stored N x N weights.
  void run_stored(int64_t pick, int64_t picks, int64_t* out) {
    weights_.resize(num_positions_ * num_positions_);
    all_pairs(team_, row_.data(), num_positions_, channels_, weights_.data());
    team_.for_rows(num_positions_, num_positions_, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i)
        to_weight(rule_, weights_.data() + i * num_positions_, parameter_.data(), num_positions_, parameter_of(i));
    });
    for (int64_t step = 0;; ++step) {
      out[step] = pick;
      if (step + 1 == picks) return;
      potential_[pick] = kInfinity;
      pick = add_then_lowest(rule_, potential_.data(), weights_.data() + pick * num_positions_, num_positions_).index;
    }
  }

  // Fills the potentials and returns the first pick: the anchor, or the rule's default. `first`: see Items::first_token.
  int64_t start(int64_t first, int64_t anchor) {
    constexpr int64_t kChunk = 64;  // tokens per partial sum: limits rounding errors; fixed, so that the bits do not depend on the threads
    const int64_t channels = channels_, tokens = num_positions_, chunks = ceil_div(tokens, kChunk);
    const bool from_mean = Rule::kFromMean && anchor < 0;
    parameter_.clear();
    if (items_.parameter) parameter_.assign(items_.parameter + first, items_.parameter + first + tokens);
    potential_.resize(tokens);
    if (from_mean) chunk_sums_.assign(chunks * point_size_, 0.f);
    team_.for_rows(chunks, kChunk * 2 * channels, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin * kChunk; i < std::min(end * kChunk, tokens); ++i) {
        const bool finite = all_finite(row_[i], channels);
        potential_[i] = first_potential(rule_, finite, items_.start_of(first + i), items_.parameter_of(first + i));
        if (finite && from_mean) add_row(row_[i], chunk_sums_.data() + i / kChunk * point_size_, channels);
      }
    });
    ranked_ = items_.start;
    first_rank_.clear();
    backward_ = true;
    if (anchor >= 0) return anchor;
    if (from_mean) return nearest_to_mean(chunks);
    std::vector<float> key(tokens);
    for (int64_t i = 0; i < tokens; ++i) key[i] = first_key(rule_, 0.f, potential_[i], items_.start, items_.parameter_of(first + i));
    return lowest(key.data(), tokens).index;
  }

  // Returns the finite token nearest the mean of the finite tokens, or token 0 if none is finite. Ranks the tokens by distance from the
  // mean, furthest first, for the first draft.
  int64_t nearest_to_mean(int64_t chunks) {
    const int64_t tokens = num_positions_;
    const int64_t finite = tokens - std::count(potential_.begin(), potential_.end(), kNonFinitePotential);
    if (finite == 0) return 0;
    std::vector<float> mean(point_size_), sqdist(tokens);
    std::vector<double> sum(point_size_);  // in float32 the mean of 131072 equal tokens would be off by 2e-5
    for (int64_t chunk = 0; chunk < chunks; ++chunk)
      for (int64_t c = 0; c < point_size_; ++c) sum[c] += chunk_sums_[chunk * point_size_ + c];
    for (int64_t c = 0; c < point_size_; ++c) mean[c] = static_cast<float>(sum[c] / static_cast<double>(finite));
    const float* point = mean.data();
    sqdist_pass(&point, 1, [&](int64_t first, int64_t rows, const float* strip) { std::copy_n(strip, rows, sqdist.data() + first); });
    for (int64_t i = 0; i < tokens; ++i) {
      if (potential_[i] == kNonFinitePotential) {
        sqdist[i] = kInfinity;
      } else if (!(sqdist[i] < kNonFinitePotential)) {
        sqdist[i] = kNonFinitePotential;  // overflow
      }
    }
    ranked_ = true;
    first_rank_.resize(tokens);
    for (int64_t i = 0; i < tokens; ++i) first_rank_[i] = sqdist[i] == kInfinity ? kInfinity : -sqdist[i];
    return lowest(sqdist.data(), tokens).index;
  }

  // Removes the positions of picked tokens. Returns the new position of `pick`.
  int64_t compact_positions(int64_t pick) {
    old_position_.clear();
    for (int64_t i = 0; i < num_positions_; ++i)
      if (potential_[i] != kInfinity) old_position_.push_back(i);
    num_positions_ = static_cast<int64_t>(old_position_.size());
    for (int64_t i = 0; i < num_positions_; ++i) {
      potential_[i] = potential_[old_position_[i]];
      row_[i] = row_[old_position_[i]];
      token_[i] = token_[old_position_[i]];
      if (!parameter_.empty()) parameter_[i] = parameter_[old_position_[i]];
    }
    cache_.compact(old_position_);
    return std::lower_bound(old_position_.begin(), old_position_.end(), pick) - old_position_.begin();
  }

  // Caches the weight rows of the drafted tokens, from one pass over the features.
  void compute_rows() {
    const int used = static_cast<int>(drafted_.size());
    std::vector<float*> weights;
    cache_.make_room(used, potential_.data());
    for (const int64_t position : drafted_) weights.push_back(cache_.add(position));
    sqdist_pass(points_.data(), used, [&](int64_t first, int64_t rows, float* strip) {
      for (int p = 0; p < used; ++p) {
        to_weight(rule_, strip + p * kStripRows, parameters_from(first), rows, parameter_of(drafted_[p]));
        std::copy_n(strip + p * kStripRows, rows, weights[p] + first);
      }
    });
  }

  // Calls f(first, rows, sqdist) for each strip of rows, whose squared distances to all points are sqdist[p * kStripRows + r]. Passes
  // alternate in direction: each begins with the rows that the previous pass left in cache.
  template <class F>
  void sqdist_pass(const float* const* points, int count, const F& f) {
    const int64_t strips = ceil_div(num_positions_, kStripRows);
    const auto strip_at = [&](int64_t i) {  // (first row, number of rows) of the i-th strip to visit; (0, 0) past the end
      const int64_t first = (backward_ ? strips - 1 - i : i) * kStripRows;
      return i < strips ? std::pair(first, std::min(kStripRows, num_positions_ - first)) : std::pair<int64_t, int64_t>();
    };
    team_.for_rows(strips, kStripRows * 2 * count * channels_, [&](int64_t begin, int64_t end) {
      float strip[kPoints * kStripRows];
      for (int64_t i = begin; i < end; ++i) {
        const auto [first, rows] = strip_at(i);
        const auto [next, num_next] = strip_at(i + 1);
        sqdist(points, count, row_.data() + first, rows, row_.data() + next, num_next, channels_, strip, kStripRows);
        f(first, rows, strip);
      }
    });
    backward_ = !backward_;
  }

  // Drafts a token: converts its row to a point of the next pass.
  void draft_token(int64_t position) {
    float* point = point_values_.data() + drafted_.size() * point_size_;
    to_point(row_[position], point, channels_);
    points_[drafted_.size()] = point;
    drafted_.push_back(position);
  }

  // Drafts `pick` and uncached tokens that are likely among the next `picks` picks: those that the plain loop picks if the candidates are
  // the only tokens. Candidates are tokens of low potential, and all cached tokens. Before the first weights, tokens rank by their distance
  // from the mean, furthest first, or by their start. Without either, only `pick` is drafted.
  void draft(int64_t pick, bool first, int64_t picks) {
    drafted_.clear();
    draft_token(pick);
    const int64_t count = std::min<int64_t>(lookahead_, picks);
    if (count == 1 || (first && !ranked_)) return;
    find_candidates(first && !first_rank_.empty() ? first_rank_ : potential_, pick,
                    std::max<int64_t>(2 * lookahead_, num_positions_ / kTokensPerCandidate));
    const auto uncached = static_cast<int64_t>(candidates_.size());
    if (uncached < count) {  // too few to choose from
      for (const int64_t position : candidates_) draft_token(position);
      return;
    }
    cache_.append_positions(candidates_);
    const auto num_candidates = static_cast<int64_t>(candidates_.size());
    // Without a parameter weights are symmetric, so a cached row is also a column: only uncached candidates need distances.
    const int64_t num_computed = parameter_.empty() ? uncached : num_candidates;
    candidate_rows_.resize(num_computed);
    candidate_parameter_.clear();
    candidate_potential_.resize(num_candidates);
    candidate_weight_.resize(num_candidates);
    for (int64_t i = 0; i < num_computed; ++i) candidate_rows_[i] = row_[candidates_[i]];
    if (!parameter_.empty())
      for (const int64_t position : candidates_) candidate_parameter_.push_back(parameter_[position]);
    for (int64_t i = 0; i < num_candidates; ++i) candidate_potential_[i] = potential_[candidates_[i]];
    // The plain loop among the candidates.
    for (int64_t current = pick, step = 1; step < picks; ++step) {
      if (cache_.has(current)) {
        const float* row = cache_.row(current);
        for (int64_t i = 0; i < num_candidates; ++i) candidate_weight_[i] = row[candidates_[i]];
      } else {
        team_.for_rows(num_computed, 8 * channels_, [&](int64_t begin, int64_t end) {
          const auto* rows = candidate_rows_.data() + begin;
          sqdist(&points_[drafted_.size() - 1], 1, rows, end - begin, rows, 0, channels_, candidate_weight_.data() + begin, num_computed);
        });
        to_weight(rule_, candidate_weight_.data(), candidate_parameter_.data(), num_computed, parameter_of(current));
        for (int64_t i = num_computed; i < num_candidates; ++i) candidate_weight_[i] = cache_.row(candidates_[i])[current];
      }
      const auto lowest = add_then_lowest(rule_, candidate_potential_.data(), candidate_weight_.data(), num_candidates);
      if (lowest.value == kInfinity) break;
      candidate_potential_[lowest.index] = kInfinity;
      current = candidates_[lowest.index];
      if (lowest.index >= uncached) continue;
      draft_token(current);
      if (static_cast<int64_t>(drafted_.size()) == count) break;
    }
  }

  // candidates_ = about `count` tokens of lowest rank, at most 2 * count, that are finite, not picked, not cached and not `pick`.
  void find_candidates(const std::vector<float>& rank, int64_t pick, int64_t count) {
    // Limit = the count-th lowest group minimum. So at least `count` tokens are within it, without a selection over all tokens. Group g
    // holds positions g, g + groups, ...
    const int64_t groups = std::max(4 * count, num_positions_ / 16);
    group_lowest_.assign(groups, kInfinity);
    for (int64_t i = 0; i < num_positions_; i += groups)
      for (int64_t g = 0; g < std::min(groups, num_positions_ - i); ++g) group_lowest_[g] = std::min(group_lowest_[g], rank[i + g]);
    std::nth_element(group_lowest_.begin(), group_lowest_.begin() + count - 1, group_lowest_.end());
    const float limit = group_lowest_[count - 1];
    candidates_.clear();
    for (int64_t i = 0; i < num_positions_ && static_cast<int64_t>(candidates_.size()) < 2 * count; ++i)
      if (rank[i] <= limit && potential_[i] < kNonFinitePotential && i != pick && !cache_.has(i)) candidates_.push_back(i);
  }

  // Null if there is no parameter.
  const float* parameters_from(int64_t position) const { return parameter_.empty() ? nullptr : parameter_.data() + position; }
  float parameter_of(int64_t position) const { return parameter_.empty() ? 1.f : parameter_[position]; }

  WorkerTeam& team_;
  int64_t channels_;
  Items items_;
  Rule rule_;
  int64_t point_size_, num_positions_ = 0;
  int lookahead_ = 0;
  bool backward_ = true;               // direction of the next pass
  bool ranked_ = false;                // potential_ or first_rank_ tells tokens apart before the first weights
  std::vector<const scalar_t*> row_;   // (positions)
  std::vector<int64_t> token_;         // (positions): index in the item
  std::vector<float> parameter_;       // (positions), or empty
  std::vector<float> potential_;       // (positions)
  std::vector<float> first_rank_;      // (N): minus the squared distance to the mean, or empty
  std::vector<float> chunk_sums_;      // (chunks, point_size_)
  std::vector<float> weights_;         // (N, N), run_stored only
  std::vector<int64_t> old_position_;  // (positions): before the last compaction
  std::vector<int64_t> drafted_;       // positions of the drafted tokens, the pick first
  std::vector<const float*> points_;   // their rows as points, in point_values_
  std::vector<float> point_values_;    // (kPoints, point_size_)
  std::vector<int64_t> candidates_;    // positions, uncached tokens first
  std::vector<const scalar_t*> candidate_rows_;
  std::vector<float> candidate_potential_, candidate_weight_, candidate_parameter_, group_lowest_;
  RowCache<float> cache_;
};

// Converts row `number` of an item to a unit point; a zero row gets its mark (UnitRows).
template <class scalar_t>
void to_unit_point(const scalar_t* row, int64_t channels, int64_t number, float* unit) {
  to_point(row, unit, channels);
  if (!to_unit(unit, point_size(channels))) unit[0] = zero_row_mark(number);
}

// Selects from items [begin, end). picks: the output of all items.
template <class scalar_t, class Rule>
void select_items(WorkerTeam& team, const Rows<scalar_t>& rows, const Items& items, Rule rule, int64_t begin, int64_t end, int64_t* picks) {
  Selector<scalar_t, Rule> selector(team, rows.channels, items, rule);
  for (int64_t b = begin; b < end; ++b) selector.run(rows, items.entry(b), items[b].first, b, items[b], picks + items[b].out);
}

// As select_items, on a copy of the rows as unit points.
template <class scalar_t, class Rule>
void select_unit_items(WorkerTeam& team, const Rows<scalar_t>& rows, const Items& items, Rule rule, int64_t begin, int64_t end,
                       int64_t* picks) {
  const auto size = static_cast<int>(point_size(rows.channels));
  Selector<float, UnitRows<Rule>> selector(team, size, items, {rule});
  std::vector<float> unit;
  for (int64_t b = begin; b < end; ++b) {
    const Item item = items[b];
    if (item.picks > 0) {
      unit.resize(item.tokens * size);
      team.for_rows(item.tokens, 8 * size, [&](int64_t first, int64_t last) {
        for (int64_t i = first; i < last; ++i)
          to_unit_point(rows.row(items.entry(b), item.first + i), rows.channels, i, unit.data() + i * size);
      });
    }
    selector.run({unit.data(), 0, size, size}, 0, 0, b, item, picks + item.out);
  }
}

// Runs a selection op. select_some(team, rows, begin, end, picks) selects from items [begin, end); picks: the output of all items.
template <class F>
Tensor select_all(const Selection& selection, const F& select_some) {
  const Items& items = selection.items;
  Selection::check_values(selection.op, items);
  Tensor out = selection.new_output();
  if (items.tokens == 0) return out;  // packed: every item is empty
  int64_t* picks = static_cast<int64_t*>(out.mutable_data_ptr());
  dispatch(selection.features.scalar_type(), [&](auto* element) {
    const auto rows = rows_of<std::remove_pointer_t<decltype(element)>>(selection.features);
    const int64_t shared = items.packed() ? std::max<int64_t>(1, items.count) : 1;  // packed: tokens and picks are totals, so take averages
    const int64_t passes = 4 + ceil_div(items.picks, shared);                       // the first pick costs about as much as four passes
    const int64_t item_flops = 2 * rows.channels * ceil_div(items.tokens, shared) * passes;
    for_items(items.count, item_flops, [&](WorkerTeam& team, int64_t begin, int64_t end) { select_some(team, rows, begin, end, picks); });
  });
  return out;
}

}  // namespace sts::cpu
