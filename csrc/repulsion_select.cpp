// Selection on the CPU: the plain loop of Algorithm 1, except that the distances to several tokens are computed in one pass
// over the features. When the next pick's row of weights is not at hand, it is computed together with the rows of the tokens
// that come after it in the order of their potentials. They tend to be picked next, and their rows are kept until they are; a
// wrong guess costs time and never a result. Potentials are exact at every pick, so the picks are those of the plain loop, bit
// for bit.
#include <limits>
#include <vector>

#include "cpu_math.h"
#include "cpu_parallel.h"

namespace sts {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// Rows of weights computed and not yet used, by token.
class RowCache {
 public:
  void reset(int64_t tokens, int slots) {
    tokens_ = tokens;
    token_of_.assign(slots, -1);
    slot_of_.assign(tokens, -1);
    rows_.resize(slots * tokens);
  }
  bool has(int64_t token) const { return slot_of_[token] >= 0; }
  float* row(int64_t token) { return rows_.data() + slot_of_[token] * tokens_; }

  // Frees rows until `count` can be added: those of the tokens furthest from being picked.
  void make_room(int count, const float* potential) {
    const auto slots = static_cast<int>(token_of_.size());
    int used = static_cast<int>(std::count_if(token_of_.begin(), token_of_.end(), [](int64_t token) { return token >= 0; }));
    for (; used > slots - count; --used) {
      int64_t last = -1;
      for (const int64_t token : token_of_)
        if (token >= 0 && (last < 0 || potential[token] > potential[last])) last = token;
      remove(last);
    }
  }
  float* add(int64_t token) {
    const auto slot = static_cast<int>(std::find(token_of_.begin(), token_of_.end(), -1) - token_of_.begin());
    token_of_[slot] = token;
    slot_of_[token] = slot;
    return row(token);
  }
  void remove(int64_t token) {
    token_of_[slot_of_[token]] = -1;
    slot_of_[token] = -1;
  }

 private:
  int64_t tokens_ = 0;
  std::vector<int64_t> token_of_;
  std::vector<int> slot_of_;
  std::vector<float> rows_;
};

// Selects from one item at a time; its scratch is kept from item to item.
template <class scalar_t>
class Selector {
 public:
  Selector(const Rows<scalar_t>& rows, Repulsion rule, int lookahead)
      : rows_(rows), rule_(rule), lookahead_(lookahead), points_(lookahead * rows.channels) {}

  void run(int64_t b, const Item& item, int64_t* out) {
    tokens_ = item.tokens;
    const int64_t picks = std::min(item.picks, tokens_);
    std::fill(out + picks, out + item.picks, -1);
    if (picks == 0) return;
    first_ = rows_.row(b, item.first);
    int64_t pick = start(item.anchor);
    cache_.reset(tokens_, 4 * lookahead_);
    for (int64_t step = 0;; ++step) {
      out[step] = pick;
      if (step + 1 == picks) break;
      // Before the first weights the potentials are all equal and say nothing about the picks to come.
      if (!cache_.has(pick)) compute_rows(pick, step == 0 ? 1 : std::min<int64_t>(lookahead_, picks - 1 - step));
      potential_[pick] = kInfinity;
      const float* weight = cache_.row(pick);
      cache_.remove(pick);
      pick = cpu::add_then_lowest(potential_.data(), weight, tokens_).index;
    }
  }

 private:
  const scalar_t* row(int64_t i) const { return first_ + i * rows_.row_stride; }

  // Fills the potentials and returns the first pick: the anchor, or the finite token nearest the mean of the finite ones, or the
  // first token where there is none.
  int64_t start(int64_t anchor) {
    constexpr int64_t kChunk = 64;  // sums of sums of fixed chunks: small errors, and the same for any number of threads
    const int64_t channels = rows_.channels, chunks = ceil_div(tokens_, kChunk);
    potential_.resize(tokens_);
    if (anchor < 0) chunk_sums_.assign(chunks * channels, 0.f);
    cpu::for_rows(chunks, kChunk * 2 * channels, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin * kChunk; i < std::min(end * kChunk, tokens_); ++i) {
        const bool finite = cpu::all_finite(row(i), channels);
        potential_[i] = finite ? rule_.start() : kLastResort;
        if (finite && anchor < 0) cpu::add_row(row(i), chunk_sums_.data() + i / kChunk * channels, channels);
      }
    });
    if (anchor >= 0) return anchor;

    const auto finite = static_cast<float>(std::count(potential_.begin(), potential_.end(), rule_.start()));
    if (finite == 0.f) return 0;
    std::vector<float> mean(channels), sqdist(tokens_);
    for (int64_t chunk = 0; chunk < chunks; ++chunk) cpu::add_row(chunk_sums_.data() + chunk * channels, mean.data(), channels);
    for (float& m : mean) m /= finite;
    cpu::for_rows(tokens_, 2 * channels, [&](int64_t begin, int64_t end) {
      const float* point[] = {mean.data()};
      cpu::sqdist(point, 1, row(begin), rows_.row_stride, end - begin, channels, sqdist.data() + begin, tokens_);
    });
    for (int64_t i = 0; i < tokens_; ++i) {
      if (potential_[i] != rule_.start()) {
        sqdist[i] = kInfinity;
      } else if (!(sqdist[i] < kLastResort)) {
        sqdist[i] = kLastResort;  // beyond float32's range
      }
    }
    return cpu::lowest(sqdist.data(), tokens_).index;
  }

  // Caches the weights of `pick` and of up to count - 1 tokens that look like the next picks, in one pass over the features.
  void compute_rows(int64_t pick, int64_t count) {
    const int64_t channels = rows_.channels;
    ahead_.assign(1, pick);
    if (count > 1) find_lowest(pick, count - 1);
    std::vector<const float*> points;
    std::vector<float*> weights;
    cache_.make_room(static_cast<int>(ahead_.size()), potential_.data());
    for (size_t p = 0; p < ahead_.size(); ++p) {
      cpu::widen(row(ahead_[p]), points_.data() + p * channels, channels);
      points.push_back(points_.data() + p * channels);
      weights.push_back(cache_.add(ahead_[p]));
    }
    const int used = static_cast<int>(points.size());
    cpu::for_rows(tokens_, 2 * used * channels, [&](int64_t begin, int64_t end) {
      constexpr int64_t kRows = 32;  // a strip of rows meets all points while it is in cache
      std::vector<float> strip(used * kRows);
      for (int64_t i = begin; i < end; i += kRows) {
        const int64_t rows = std::min(kRows, end - i);
        cpu::sqdist(points.data(), used, row(i), rows_.row_stride, rows, channels, strip.data(), kRows);
        for (int p = 0; p < used; ++p) {
          cpu::to_repulsion(strip.data() + p * kRows, rows, rule_.eps);
          std::copy_n(strip.data() + p * kRows, rows, weights[p] + i);
        }
      }
    });
  }

  // Appends to `ahead_` the `count` tokens of lowest potential that are finite, not picked, not cached and not `pick`.
  void find_lowest(int64_t pick, int64_t count) {
    const auto before = [&](int64_t a, int64_t b) { return potential_[a] < potential_[b]; };
    for (int64_t i = 0; i < tokens_; ++i) {
      const bool full = static_cast<int64_t>(ahead_.size()) > count;
      if (potential_[i] >= (full ? potential_[ahead_.back()] : kLastResort) || i == pick || cache_.has(i)) continue;
      if (full) ahead_.pop_back();
      ahead_.insert(std::upper_bound(ahead_.begin() + 1, ahead_.end(), i, before), i);
    }
  }

  Rows<scalar_t> rows_;
  Repulsion rule_;
  int lookahead_;
  int64_t tokens_ = 0;
  const scalar_t* first_ = nullptr;
  std::vector<float> potential_, points_, chunk_sums_;
  std::vector<int64_t> ahead_;
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
    const auto run = [&](int64_t begin, int64_t end) {
      Selector selector(rows, selection.rule, lookahead);
      for (int64_t b = begin; b < end; ++b) selector.run(items.packed() ? 0 : b, items[b], picks + items[b].out);
    };
    // Threads take whole items where there are enough of them, else rows of one item.
    if (items.count > 1 && items.count >= torch::stable::get_num_threads()) {
      torch::stable::parallel_for(0, items.count, 1, run);
    } else {
      run(0, items.count);
    }
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
