#include <limits>
#include <vector>

#include "cpu_rows.h"
#include "torch_glue.h"

namespace sts {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// Selects from one item at a time; its scratch is kept from item to item.
class Selector {
 public:
  Selector(const Tensor& features, Repulsion rule) : rows_(features), rule_(rule) {}

  void run(int64_t b, const Item& item, int64_t* out) {
    const int64_t tokens = item.tokens, picks = std::min(item.picks, tokens);
    std::fill(out + picks, out + item.picks, -1);
    if (picks == 0) return;
    rows_.load(b, item.first, tokens);
    potential_.assign(tokens, rule_.start());
    sqdist_.resize(tokens);
    mark_not_finite(tokens);
    int64_t pick = item.anchor >= 0 ? item.anchor : nearest_to_mean(tokens);
    for (int64_t step = 0;; ++step) {
      out[step] = pick;
      if (step + 1 == picks) break;
      pick = repel(pick, tokens);
    }
  }

 private:
  void mark_not_finite(int64_t tokens) {
    torch::stable::parallel_for(0, tokens, cpu::row_grain(rows_.channels()), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i)
        if (!cpu::all_finite(rows_[i], rows_.channels())) potential_[i] = kLastResort;
    });
  }

  // Adds the repulsion of `pick` to every token and returns the next one.
  int64_t repel(int64_t pick, int64_t tokens) {
    const float* point = rows_[pick];
    torch::stable::parallel_for(0, tokens, cpu::row_grain(rows_.channels()), [&](int64_t begin, int64_t end) {
      cpu::sqdist(&point, 1, rows_[begin], rows_.stride(), end - begin, rows_.channels(), sqdist_.data() + begin, tokens);
      cpu::add_repulsion(potential_.data() + begin, sqdist_.data() + begin, end - begin, rule_.eps);
    });
    potential_[pick] = kInfinity;
    return cpu::lowest(potential_.data(), tokens).index;
  }

  // The finite token nearest the mean of the finite ones; the first token where there is none.
  int64_t nearest_to_mean(int64_t tokens) {
    const int64_t channels = rows_.channels();
    constexpr int64_t kChunk = 64;  // float32 sums of sums: the error stays small for any number of tokens
    std::vector<float> mean(channels), part(channels);
    int64_t finite = 0;
    for (int64_t i = 0; i < tokens; ++i) {
      if (potential_[i] == rule_.start()) {
        cpu::add_row(rows_[i], part.data(), channels);
        ++finite;
      }
      if (i % kChunk == kChunk - 1 || i == tokens - 1) {
        cpu::add_row(part.data(), mean.data(), channels);
        std::fill(part.begin(), part.end(), 0.f);
      }
    }
    if (finite == 0) return 0;
    for (float& m : mean) m /= static_cast<float>(finite);
    const float* point = mean.data();
    torch::stable::parallel_for(0, tokens, cpu::row_grain(channels), [&](int64_t begin, int64_t end) {
      cpu::sqdist(&point, 1, rows_[begin], rows_.stride(), end - begin, channels, sqdist_.data() + begin, tokens);
    });
    for (int64_t i = 0; i < tokens; ++i) {
      if (potential_[i] != rule_.start()) sqdist_[i] = kInfinity;
      else if (!(sqdist_[i] < kLastResort)) sqdist_[i] = kLastResort;  // out of float32's range
    }
    return cpu::lowest(sqdist_.data(), tokens).index;
  }

  cpu::FloatRows rows_;
  Repulsion rule_;
  std::vector<float> potential_, sqdist_;
};

Tensor select(const Selection& selection) {
  const Items& items = selection.items;
  Selection::check_values(items);
  Tensor out = selection.new_output();
  int64_t* picks = static_cast<int64_t*>(out.mutable_data_ptr());
  const auto run = [&](int64_t begin, int64_t end) {
    Selector selector(selection.features, selection.rule);
    for (int64_t b = begin; b < end; ++b) selector.run(items.packed() ? 0 : b, items[b], picks + items[b].out);
  };
  // Threads take items where there are enough of them, else each item's rows.
  if (items.count >= torch::stable::get_num_threads()) {
    torch::stable::parallel_for(0, items.count, 1, run);
  } else {
    run(0, items.count);
  }
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
