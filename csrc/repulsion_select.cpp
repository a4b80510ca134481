// Selection on the CPU: the plain loop of Algorithm 1, except that the distances to several tokens are computed in one pass
// over the features. When the next pick's row of weights is not at hand, it is computed together with the rows of the tokens
// that come after it in the order of their potentials. They tend to be picked next, and their rows are kept until they are; a
// wrong guess costs time and never a result. Potentials are exact at every pick, so the picks are those of the plain loop, bit
// for bit. A pass leaves out the tokens already picked: all N picks compute half a matrix, and none is ever stored.
#include <limits>
#include <vector>

#include "cpu_math.h"
#include "cpu_parallel.h"

namespace sts {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

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
template <class scalar_t>
class Selector {
 public:
  Selector(cpu::Team& team, const Rows<scalar_t>& features, Repulsion rule, int lookahead)
      : team_(team),
        features_(features),
        rule_(rule),
        lookahead_(lookahead),
        point_size_(cpu::point_size(features.channels)),
        points_(lookahead * point_size_) {}

  void run(int64_t b, const Item& item, int64_t* out) {
    places_ = item.tokens;
    const int64_t picks = std::min(item.picks, places_);
    std::fill(out + picks, out + item.picks, -1);
    if (picks == 0) return;
    row_.resize(places_);
    token_.resize(places_);
    for (int64_t i = 0; i < places_; ++i) row_[i] = features_.row(b, item.first + i), token_[i] = i;
    int64_t pick = start(item.anchor), picked = 0;  // places that hold picked tokens
    cache_.reset(places_, 4 * lookahead_);
    for (int64_t step = 0;; ++step) {
      out[step] = token_[pick];
      if (step + 1 == picks) break;
      if (!cache_.has(pick)) {
        if (picked > places_ / 16) pick = close_up(pick), picked = 0;
        // Before the first weights the potentials are all equal and say nothing about the picks to come.
        compute_rows(pick, step == 0 ? 1 : std::min<int64_t>(lookahead_, picks - 1 - step));
      }
      potential_[pick] = kInfinity;
      ++picked;
      const float* weight = cache_.row(pick);
      cache_.remove(pick);
      pick = cpu::add_then_lowest(potential_.data(), weight, places_).index;
    }
  }

 private:
  // Fills the potentials and returns the first pick: the anchor, or the finite token nearest the mean of the finite ones, or the
  // first token where there is none.
  int64_t start(int64_t anchor) {
    constexpr int64_t kChunk = 64;  // sums of sums of fixed chunks: small errors, and the same for any number of threads
    const int64_t channels = features_.channels, tokens = places_, chunks = ceil_div(tokens, kChunk);
    potential_.resize(tokens);
    if (anchor < 0) chunk_sums_.assign(chunks * point_size_, 0.f);
    team_.for_rows(chunks, kChunk * 2 * channels, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin * kChunk; i < std::min(end * kChunk, tokens); ++i) {
        const bool finite = cpu::all_finite(row_[i], channels);
        potential_[i] = finite ? rule_.start() : kLastResort;
        if (finite && anchor < 0) cpu::add_row(row_[i], chunk_sums_.data() + i / kChunk * point_size_, channels);
      }
    });
    if (anchor >= 0) return anchor;

    const auto finite = static_cast<float>(std::count(potential_.begin(), potential_.end(), rule_.start()));
    if (finite == 0.f) return 0;
    std::vector<float> mean(point_size_), sqdist(tokens);
    for (int64_t chunk = 0; chunk < chunks; ++chunk) cpu::add_row(chunk_sums_.data() + chunk * point_size_, mean.data(), point_size_);
    for (float& m : mean) m /= finite;
    team_.for_rows(tokens, 2 * channels, [&](int64_t begin, int64_t end) {
      const float* point[] = {mean.data()};
      cpu::sqdist(point, 1, row_.data() + begin, end - begin, tokens - end, channels, sqdist.data() + begin, tokens);
    });
    for (int64_t i = 0; i < tokens; ++i) {
      if (potential_[i] != rule_.start()) {
        sqdist[i] = kInfinity;
      } else if (!(sqdist[i] < kLastResort)) {
        sqdist[i] = kLastResort;  // beyond float32's range
      }
    }
    return cpu::lowest(sqdist.data(), tokens).index;
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
    }
    cache_.compact(from_);
    return std::lower_bound(from_.begin(), from_.end(), pick) - from_.begin();
  }

  // Caches the weights of `pick` and of up to count - 1 tokens that look like the next picks, in one pass over the features.
  void compute_rows(int64_t pick, int64_t count) {
    const int64_t channels = features_.channels;
    ahead_.assign(1, pick);
    if (count > 1) find_lowest(pick, count - 1);
    const int used = static_cast<int>(ahead_.size());
    std::vector<const float*> point;
    std::vector<float*> weights;
    cache_.make_room(used, potential_.data());
    float* next = points_.data();
    for (const int64_t place : ahead_) {
      cpu::to_point(row_[place], next, channels);
      point.push_back(next);
      weights.push_back(cache_.add(place));
      next += point_size_;
    }
    constexpr int64_t kRows = 16;  // a strip of rows meets all points while it is in cache
    team_.for_rows(ceil_div(places_, kRows), kRows * 2 * used * channels, [&](int64_t begin, int64_t end) {
      float strip[cpu::kPoints * kRows];
      for (int64_t i = begin * kRows; i < std::min(end * kRows, places_); i += kRows) {
        const int64_t rows = std::min(kRows, places_ - i);
        cpu::sqdist(point.data(), used, row_.data() + i, rows, places_ - i - rows, channels, strip, kRows);
        for (int p = 0; p < used; ++p) {
          cpu::to_repulsion(strip + p * kRows, rows, rule_.eps);
          std::copy_n(strip + p * kRows, rows, weights[p] + i);
        }
      }
    });
  }

  // Appends to `ahead_` the `count` tokens of lowest potential that are finite, not picked, not cached and not `pick`.
  void find_lowest(int64_t pick, int64_t count) {
    const auto before = [&](int64_t a, int64_t b) { return potential_[a] < potential_[b]; };
    for (int64_t i = 0; i < places_; ++i) {
      const bool full = static_cast<int64_t>(ahead_.size()) > count;
      if (potential_[i] >= (full ? potential_[ahead_.back()] : kLastResort) || i == pick || cache_.has(i)) continue;
      if (full) ahead_.pop_back();
      ahead_.insert(std::upper_bound(ahead_.begin() + 1, ahead_.end(), i, before), i);
    }
  }

  cpu::Team& team_;
  Rows<scalar_t> features_;
  Repulsion rule_;
  int lookahead_;
  int64_t point_size_, places_ = 0;
  std::vector<const scalar_t*> row_;  // by place, like the next two
  std::vector<int64_t> token_;
  std::vector<float> potential_, points_, chunk_sums_;
  std::vector<int64_t> ahead_, from_;
  RowCache cache_;
};

Tensor select(const Selection& selection) {
  const Items& items = selection.items;
  Selection::check_values(items);
  Tensor out = selection.new_output();
  int64_t* picks = static_cast<int64_t*>(out.mutable_data_ptr());
  const int lookahead = planned_lookahead(cpu::kPoints);
  cpu::dispatch(selection.features.scalar_type(), [&](auto* element) {
    const auto rows = rows_of<std::remove_pointer_t<decltype(element)>>(selection.features);
    const auto run = [&](cpu::Team& team, int64_t begin, int64_t end) {
      Selector selector(team, rows, selection.rule, lookahead);
      for (int64_t b = begin; b < end; ++b) selector.run(items.packed() ? 0 : b, items[b], picks + items[b].out);
    };
    const int64_t shared = items.packed() ? std::max<int64_t>(1, items.count) : 1;  // items that share the tokens and the picks
    const int64_t passes = 4 + ceil_div(items.picks, shared);  // the first pick reads the features as often as four others
    const int64_t item_work = 2 * rows.channels * ceil_div(items.tokens, shared) * passes;
    cpu::with_team(items.count * item_work, [&](cpu::Team& team) {
      // Threads take whole items where there are enough of them, else rows of one item.
      if (items.count < team.members) return run(team, 0, items.count);
      team.for_rows(items.count, item_work, [&](int64_t begin, int64_t end) {
        cpu::Team alone(1);
        run(alone, begin, end);
      });
    });
  });
  return out;
}

Tensor repulsion_select_cpu(const Tensor& features, int64_t k, double eps, std::optional<Tensor> anchor, std::optional<Tensor> num_tokens) {
  return select(Selection::padded(features, k, eps, anchor, num_tokens));
}

Tensor repulsion_select_varlen_cpu(const Tensor& features, const Tensor& cu_seqlens, const Tensor& cu_budgets, int64_t total_k, double eps,
                                   std::optional<Tensor> anchor) {
  return select(Selection::packed(features, cu_seqlens, cu_budgets, total_k, eps, anchor));
}

}  // namespace
}  // namespace sts

STABLE_TORCH_LIBRARY_IMPL(sts_kernels, CPU, m) {
  m.impl("repulsion_select", TORCH_BOX(&sts::repulsion_select_cpu));
  m.impl("repulsion_select_varlen", TORCH_BOX(&sts::repulsion_select_varlen_cpu));
}
