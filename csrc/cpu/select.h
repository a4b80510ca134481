// Greedy selection on the CPU by any rule of selection_rule.h: the plain loop, except that the distances to several tokens are
// computed in one pass over the features. When the next pick's row of weights is not at hand, it is computed together with the rows of the tokens
// that the loop would pick next if it had to choose among a few candidates of low potential. Mostly these are the next picks, and
// their rows are kept until they are; a wrong guess costs time and never a result. Potentials are exact at every pick, so the
// picks are those of the plain loop, bit for bit. A pass leaves out the tokens already picked. Where nearly all of a few tokens
// are picked, the plain loop runs over the stored weights of all pairs.
#pragma once
#include <limits>
#include <type_traits>
#include <vector>

#include "common/selection_plan.h"
#include "pairs.h"

namespace sts::cpu {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr int64_t kStripRows = 16;  // of a pass: they stay in cache while they meet all points
constexpr int kCachedRows = 2 * kCpuLookahead;
static_assert(kCpuLookahead <= kPoints, "a pass's points meet a strip at once");
constexpr int64_t kPlacesPerCandidate = 64;  // so that their distances cost little beside a pass

// Rows of weights computed and not yet used, by place.
class RowCache {
 public:
  void reset(int64_t places, int slots) {
    row_size_ = places;
    place_of_.assign(slots, -1);
    slot_of_.assign(places, -1);
    rows_.resize(slots * places);
  }
  bool has(int64_t place) const { return slot_of_[place] >= 0; }
  float* row(int64_t place) { return slot(slot_of_[place]); }

  // Frees rows until `count` can be added: those of the tokens furthest from being picked.
  void make_room(int count, const float* potential) {
    const auto slots = static_cast<int>(place_of_.size());
    int used = static_cast<int>(std::count_if(place_of_.begin(), place_of_.end(), [](int64_t place) { return place >= 0; }));
    for (; used > slots - count; --used) {
      int64_t last = -1;
      for (const int64_t place : place_of_)
        if (place >= 0 && (last < 0 || potential[place] > potential[last])) last = place;
      remove(last);
    }
  }
  float* add(int64_t place) {
    const auto slot = static_cast<int>(std::find(place_of_.begin(), place_of_.end(), -1) - place_of_.begin());
    place_of_[slot] = place;
    slot_of_[place] = slot;
    return row(place);
  }
  void append_places(std::vector<int64_t>& places) const {
    for (const int64_t place : place_of_)
      if (place >= 0) places.push_back(place);
  }
  void remove(int64_t place) {
    place_of_[slot_of_[place]] = -1;
    slot_of_[place] = -1;
  }
  // What was at place from[i] moves to place i; from[i] rises, and no place with a row is left out.
  void compact(const std::vector<int64_t>& from) {
    for (size_t i = 0; i < from.size(); ++i) {
      const int slot = slot_of_[i] = slot_of_[from[i]];
      if (slot >= 0) place_of_[slot] = static_cast<int64_t>(i);
    }
    for (size_t s = 0; s < place_of_.size(); ++s) {
      if (place_of_[s] < 0) continue;
      float* row = slot(static_cast<int>(s));
      for (size_t i = 0; i < from.size(); ++i) row[i] = row[from[i]];
    }
  }

 private:
  float* slot(int slot) { return rows_.data() + slot * row_size_; }

  int64_t row_size_ = 0;
  std::vector<int64_t> place_of_;
  std::vector<int> slot_of_;
  std::vector<float> rows_;
};

// Selects from one item at a time; its scratch is kept from item to item. Tokens are known by their places, which keep their
// order and close up as tokens are picked.
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

  // `first`: the item's first row in entry `entry` of `rows`.
  void run(const Rows<scalar_t>& rows, int64_t entry, int64_t first, int64_t b, const Item& item, int64_t* out) {
    places_ = item.tokens;
    const int64_t picks = std::min(item.picks, places_);
    std::fill(out + picks, out + item.picks, -1);
    if (picks == 0) return;
    row_.resize(places_);
    token_.resize(places_);
    for (int64_t i = 0; i < places_; ++i) row_[i] = rows.row(entry, first + i), token_[i] = i;
    int64_t pick = start(items_.first_token(b, item), item.anchor), picked = 0;  // places that hold picked tokens
    const CpuSelectionPlan plan = plan_cpu_selection(places_, picks, places_ * channels_ * sizeof(scalar_t));
    const int asked = asked_lookahead(kCpuLookahead);
    if (plan.stored && !asked) return run_stored(pick, picks, out);
    lookahead_ = asked ? asked : plan.lookahead;
    cache_.reset(places_, kCachedRows);
    for (int64_t step = 0;; ++step) {
      out[step] = token_[pick];
      if (step + 1 == picks) break;
      if (!cache_.has(pick)) {
        if (picked > places_ / 16) pick = close_up(pick), picked = 0;
        look_ahead(pick, step == 0, picks - 1 - step);
        compute_rows();
      }
      potential_[pick] = kInfinity;
      ++picked;
      const float* weight = cache_.row(pick);
      cache_.remove(pick);
      pick = add_then_lowest(rule_, potential_.data(), weight, places_).index;
    }
  }

 private:
  // The plain loop over the weights of all pairs.
  void run_stored(int64_t pick, int64_t picks, int64_t* out) {
    weights_.resize(places_ * places_);
    all_pairs(team_, row_.data(), places_, channels_, weights_.data());
    team_.for_rows(places_, places_, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) to_weight(rule_, weights_.data() + i * places_, parameter_.data(), places_, parameter_of(i));
    });
    for (int64_t step = 0;; ++step) {
      out[step] = pick;
      if (step + 1 == picks) return;
      potential_[pick] = kInfinity;
      pick = add_then_lowest(rule_, potential_.data(), weights_.data() + pick * places_, places_).index;
    }
  }

  // Fills the potentials and returns the first pick: the anchor, or the rule's own. `first`: number of the item's first token.
  int64_t start(int64_t first, int64_t anchor) {
    constexpr int64_t kChunk = 64;  // sums of sums of fixed chunks: small errors, and the same for any number of threads
    const int64_t channels = channels_, tokens = places_, chunks = ceil_div(tokens, kChunk);
    const bool from_mean = Rule::kFromMean && anchor < 0;
    parameter_.clear();
    if (items_.parameter) parameter_.assign(items_.parameter + first, items_.parameter + first + tokens);
    potential_.resize(tokens);
    if (from_mean) chunk_sums_.assign(chunks * point_size_, 0.f);
    team_.for_rows(chunks, kChunk * 2 * channels, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin * kChunk; i < std::min(end * kChunk, tokens); ++i) {
        const bool finite = all_finite(row_[i], channels);
        potential_[i] = finite ? items_.start_of(rule_, first + i) : kNonFinitePotential;
        if (finite && from_mean) add_row(row_[i], chunk_sums_.data() + i / kChunk * point_size_, channels);
      }
    });
    ranked_ = items_.start;
    first_rank_.clear();
    backward_ = true;
    if (anchor >= 0) return anchor;
    if (from_mean) return nearest_to_mean(chunks);
    std::vector<float> key(tokens);
    for (int64_t i = 0; i < tokens; ++i)
      key[i] = potential_[i] == kNonFinitePotential ? kNonFinitePotential : items_.first_key_of(rule_, first + i);
    return lowest(key.data(), tokens).index;
  }

  // The finite token nearest the mean of the finite ones, or the first token where there is none.
  int64_t nearest_to_mean(int64_t chunks) {
    const int64_t tokens = places_;
    const auto finite = static_cast<float>(tokens - std::count(potential_.begin(), potential_.end(), kNonFinitePotential));
    if (finite == 0.f) return 0;
    std::vector<float> mean(point_size_), sqdist(tokens);
    for (int64_t chunk = 0; chunk < chunks; ++chunk) add_row(chunk_sums_.data() + chunk * point_size_, mean.data(), point_size_);
    for (float& m : mean) m /= finite;
    const float* point = mean.data();
    sqdist_pass(&point, 1, [&](int64_t first, int64_t rows, const float* strip) { std::copy_n(strip, rows, sqdist.data() + first); });
    for (int64_t i = 0; i < tokens; ++i) {
      if (potential_[i] == kNonFinitePotential) {
        sqdist[i] = kInfinity;
      } else if (!(sqdist[i] < kNonFinitePotential)) {
        sqdist[i] = kNonFinitePotential;  // beyond float32's range
      }
    }
    ranked_ = true;
    first_rank_.resize(tokens);
    for (int64_t i = 0; i < tokens; ++i) first_rank_[i] = sqdist[i] == kInfinity ? kInfinity : -sqdist[i];
    return lowest(sqdist.data(), tokens).index;
  }

  // Drops the places of picked tokens; returns where `pick` is now.
  int64_t close_up(int64_t pick) {
    from_.clear();
    for (int64_t i = 0; i < places_; ++i)
      if (potential_[i] != kInfinity) from_.push_back(i);
    places_ = static_cast<int64_t>(from_.size());
    for (int64_t i = 0; i < places_; ++i) {
      potential_[i] = potential_[from_[i]];
      row_[i] = row_[from_[i]];
      token_[i] = token_[from_[i]];
      if (!parameter_.empty()) parameter_[i] = parameter_[from_[i]];
    }
    cache_.compact(from_);
    return std::lower_bound(from_.begin(), from_.end(), pick) - from_.begin();
  }

  // Caches the weights of the points, `points_`, in one pass over the features.
  void compute_rows() {
    const int used = static_cast<int>(ahead_.size());
    std::vector<float*> weights;
    cache_.make_room(used, potential_.data());
    for (const int64_t place : ahead_) weights.push_back(cache_.add(place));
    sqdist_pass(points_.data(), used, [&](int64_t first, int64_t rows, float* strip) {
      for (int p = 0; p < used; ++p) {
        to_weight(rule_, strip + p * kStripRows, parameters_from(first), rows, parameter_of(ahead_[p]));
        std::copy_n(strip + p * kStripRows, rows, weights[p] + first);
      }
    });
  }

  // f(first, rows, sqdist) for each strip of rows: while it is in cache it meets all points. Each pass goes the other way than the
  // one before, so that what is left of that one in cache is read first.
  template <class F>
  void sqdist_pass(const float* const* points, int count, const F& f) {
    const int64_t strips = ceil_div(places_, kStripRows);
    const auto strip_at = [&](int64_t i) {  // (first row, rows)
      const int64_t first = (backward_ ? strips - 1 - i : i) * kStripRows;
      return i < strips ? std::pair(first, std::min(kStripRows, places_ - first)) : std::pair<int64_t, int64_t>();
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

  void add_point(int64_t place) {
    float* point = point_values_.data() + ahead_.size() * point_size_;
    to_point(row_[place], point, channels_);
    points_[ahead_.size()] = point;
    ahead_.push_back(place);
  }

  // Makes points of `pick` and of tokens that have no row and are likely to be among the next `picks`: those that the plain loop
  // would pick if there were no tokens but the candidates, which are those of lowest potential and those with a row. Before the
  // first weights, when all potentials are equal, they are those furthest from the mean, if that is known.
  void look_ahead(int64_t pick, bool first, int64_t picks) {
    ahead_.clear();
    add_point(pick);
    const int64_t count = std::min<int64_t>(lookahead_, picks);
    if (count == 1 || (first && !ranked_)) return;
    find_candidates(first && !first_rank_.empty() ? first_rank_ : potential_, pick,
                    std::max<int64_t>(2 * lookahead_, places_ / kPlacesPerCandidate));
    const auto fresh = static_cast<int64_t>(candidates_.size());
    if (fresh < count) {
      for (const int64_t place : candidates_) add_point(place);
      return;
    }
    cache_.append_places(candidates_);
    const auto all = static_cast<int64_t>(candidates_.size());
    // A row of weights is also a column where no parameter tells the two tokens apart.
    const int64_t measured = parameter_.empty() ? fresh : all;
    candidate_rows_.resize(measured);
    candidate_parameter_.clear();
    candidate_potential_.resize(all);
    candidate_weight_.resize(all);
    for (int64_t i = 0; i < measured; ++i) candidate_rows_[i] = row_[candidates_[i]];
    if (!parameter_.empty())
      for (const int64_t place : candidates_) candidate_parameter_.push_back(parameter_[place]);
    for (int64_t i = 0; i < all; ++i) candidate_potential_[i] = potential_[candidates_[i]];
    for (int64_t picked = pick, step = 1; step < picks; ++step) {
      if (cache_.has(picked)) {
        const float* row = cache_.row(picked);
        for (int64_t i = 0; i < all; ++i) candidate_weight_[i] = row[candidates_[i]];
      } else {
        team_.for_rows(measured, 8 * channels_, [&](int64_t begin, int64_t end) {
          const auto* rows = candidate_rows_.data() + begin;
          sqdist(&points_[ahead_.size() - 1], 1, rows, end - begin, rows, 0, channels_, candidate_weight_.data() + begin, measured);
        });
        to_weight(rule_, candidate_weight_.data(), candidate_parameter_.data(), measured, parameter_of(picked));
        for (int64_t i = measured; i < all; ++i) candidate_weight_[i] = cache_.row(candidates_[i])[picked];
      }
      const auto lowest = add_then_lowest(rule_, candidate_potential_.data(), candidate_weight_.data(), all);
      if (lowest.value == kInfinity) break;
      candidate_potential_[lowest.index] = kInfinity;
      picked = candidates_[lowest.index];
      if (lowest.index >= fresh) continue;
      add_point(picked);
      if (static_cast<int64_t>(ahead_.size()) == count) break;
    }
  }

  // Of the tokens that are finite, not picked, not cached and not `pick`, those of lowest rank: about `count`, at most twice as many.
  void find_candidates(const std::vector<float>& rank, int64_t pick, int64_t count) {
    // `count` of the tokens that are the lowest of their group are no higher than the limit.
    const int64_t groups = std::max(4 * count, places_ / 16);
    group_lowest_.assign(groups, kInfinity);
    for (int64_t i = 0; i < places_; i += groups)
      for (int64_t g = 0; g < std::min(groups, places_ - i); ++g) group_lowest_[g] = std::min(group_lowest_[g], rank[i + g]);
    std::nth_element(group_lowest_.begin(), group_lowest_.begin() + count - 1, group_lowest_.end());
    const float limit = group_lowest_[count - 1];
    candidates_.clear();
    for (int64_t i = 0; i < places_ && static_cast<int64_t>(candidates_.size()) < 2 * count; ++i)
      if (rank[i] <= limit && potential_[i] < kNonFinitePotential && i != pick && !cache_.has(i)) candidates_.push_back(i);
  }

  // Null where there are none.
  const float* parameters_from(int64_t place) const { return parameter_.empty() ? nullptr : parameter_.data() + place; }
  float parameter_of(int64_t place) const { return parameter_.empty() ? 1.f : parameter_[place]; }

  WorkerTeam& team_;
  int64_t channels_;
  Items items_;
  Rule rule_;
  int64_t point_size_, places_ = 0;
  int lookahead_ = 0;
  bool backward_ = true;              // the next pass
  bool ranked_ = false;               // tokens differ before the first weights
  std::vector<const scalar_t*> row_;  // by place, like the next three
  std::vector<int64_t> token_;
  std::vector<float> parameter_;  // empty where there is none
  std::vector<float> potential_, first_rank_, chunk_sums_, weights_;
  std::vector<int64_t> from_, ahead_;  // ahead_: the places of points_
  std::vector<const float*> points_;
  std::vector<float> point_values_;
  std::vector<int64_t> candidates_;  // those without a row first
  std::vector<const scalar_t*> candidate_rows_;
  std::vector<float> candidate_potential_, candidate_weight_, candidate_parameter_, group_lowest_;
  RowCache cache_;
};

// A row as a unit point.
template <class scalar_t>
void to_unit_point(const scalar_t* row, int64_t channels, int64_t number, float* unit) {
  to_point(row, unit, channels);
  if (!to_unit(unit, point_size(channels))) unit[0] = zero_row_mark(number);
}

template <class scalar_t, class Rule>
void select_items(WorkerTeam& team, const Rows<scalar_t>& rows, const Items& items, Rule rule, int64_t begin, int64_t end, int64_t* picks) {
  Selector<scalar_t, Rule> selector(team, rows.channels, items, rule);
  for (int64_t b = begin; b < end; ++b) selector.run(rows, items.packed() ? 0 : b, items[b].first, b, items[b], picks + items[b].out);
}

// The same on a copy of unit points.
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
          to_unit_point(rows.row(items.packed() ? 0 : b, item.first + i), rows.channels, i, unit.data() + i * size);
      });
    }
    selector.run({unit.data(), 0, size, size}, 0, 0, b, item, picks + item.out);
  }
}

// The output of a selection. select_some(team, rows, begin, end, picks) selects from the items from `begin` to `end`; picks: of all.
template <class F>
Tensor select_all(const Selection& selection, const F& select_some) {
  const Items& items = selection.items;
  Selection::check_values(selection.op, items);
  Tensor out = selection.new_output();
  int64_t* picks = static_cast<int64_t*>(out.mutable_data_ptr());
  dispatch(selection.features.scalar_type(), [&](auto* element) {
    const auto rows = rows_of<std::remove_pointer_t<decltype(element)>>(selection.features);
    const int64_t shared = items.packed() ? std::max<int64_t>(1, items.count) : 1;  // items that share the tokens and the picks
    const int64_t passes = 4 + ceil_div(items.picks, shared);  // the first pick reads the features as often as four others
    const int64_t item_work = 2 * rows.channels * ceil_div(items.tokens, shared) * passes;
    with_team(items.count * item_work, [&](WorkerTeam& team) {
      // Threads take whole items where there are enough of them, else rows of one item.
      if (items.count < team.members) return select_some(team, rows, 0, items.count, picks);
      team.for_rows(items.count, item_work, [&](int64_t begin, int64_t end) {
        WorkerTeam alone(1);
        select_some(alone, rows, begin, end, picks);
      });
    });
  });
  return out;
}

}  // namespace sts::cpu
