// Suppression by rank on the CPU. A walk in the order of the ranks needs the distances of a token to the picks before it alone, so that it
// reads no more tokens than it takes to find all picks. Blocks of tokens are compared with the picks together. A pair's distance has the same
// bits in any block, so the picks are those of the plain loop.
#include <algorithm>
#include <cstring>
#include <functional>
#include <vector>

#include "select.h"

namespace sts {
namespace {

// Selects from one item at a time; its scratch is kept from item to item.
template <class scalar_t>
class Walker {
 public:
  Walker(cpu::WorkerTeam& team, const Rows<scalar_t>& rows, const Items& items)
      : team_(team), rows_(rows), items_(items), size_(cpu::point_size(rows.channels)), block_(cpu::kPoints * size_) {
    for (int p = 0; p < cpu::kPoints; ++p) block_row_.push_back(block_.data() + p * size_);
  }

  void run(int64_t b, int64_t* out) {
    const Item item = items_[b];
    const int64_t picks = std::min(item.picks, item.tokens), first = items_.first_token(b, item), entry = items_.packed() ? 0 : b;
    std::fill(out + picks, out + item.picks, -1);
    if (picks == 0) return;
    sort(first, item.tokens);
    pick_row_.clear();
    pick_tau_.clear();
    suppressed_.clear();
    int64_t picked = 0;
    while (picked < picks && !waiting_.empty()) {
      token_.clear();
      while (static_cast<int64_t>(token_.size()) < std::min<int64_t>(cpu::kPoints, picks - picked) && !waiting_.empty()) {
        const int64_t token = next();
        const scalar_t* row = rows_.row(entry, item.first + token);
        if (!cpu::all_finite(row, rows_.channels)) {
          last_resort_.push_back(token);
          continue;
        }
        cpu::to_unit_point(row, rows_.channels, token, block_.data() + token_.size() * size_);
        token_.push_back(token);
      }
      compare(picked, picks);
      const int64_t before = picked;
      for (size_t t = 0; t < token_.size(); ++t) {
        if (is_suppressed(static_cast<int>(t), before)) {
          suppressed_.push_back(token_[t]);
          continue;
        }
        out[picked] = token_[t];
        add_pick(static_cast<int>(t), picked++, items_.parameter_of(first + token_[t]));
      }
    }
    std::sort(last_resort_.begin(), last_resort_.end());
    for (const std::vector<int64_t>* rest : {&suppressed_, &last_resort_})
      for (size_t i = 0; i < rest->size() && picked < picks; ++i) out[picked++] = (*rest)[i];
  }

 private:
  // Tokens with a rank as a heap, the lowest first: bits 32..63 are the rank, whose order is that of its bits, bits 0..31 the index.
  void sort(int64_t first, int64_t tokens) {
    waiting_.clear();
    last_resort_.clear();
    for (int64_t i = 0; i < tokens; ++i) {
      const float rank = items_.start_of(Suppress(), first + i);
      if (rank == kNonFinitePotential) {
        last_resort_.push_back(i);
        continue;
      }
      uint32_t bits;
      std::memcpy(&bits, &rank, sizeof bits);
      waiting_.push_back(static_cast<uint64_t>(bits) << 32 | static_cast<uint64_t>(i));
    }
    std::make_heap(waiting_.begin(), waiting_.end(), std::greater<>());
  }
  int64_t next() {
    std::pop_heap(waiting_.begin(), waiting_.end(), std::greater<>());
    const auto token = static_cast<int64_t>(waiting_.back() & 0xffffffffu);
    waiting_.pop_back();
    return token;
  }

  // Squared distances of the block's tokens to the picks, and to each other.
  void compare(int64_t picked, int64_t picks) {
    const auto used = static_cast<int>(token_.size());
    if (picked) {
      to_pick_.resize(cpu::kPoints * picks);
      team_.for_rows(picked, 2 * used * size_, [&](int64_t begin, int64_t end) {
        const auto* rows = pick_row_.data() + begin;
        cpu::sqdist(block_row_.data(), used, rows, end - begin, rows, 0, size_, to_pick_.data() + begin, picked);
      });
    }
    cpu::sqdist(block_row_.data(), used, block_row_.data(), used, block_row_.data(), 0, size_, to_token_, cpu::kPoints);
    slot_.clear();
  }

  // By the first `before` picks, or by the picks of the block.
  bool is_suppressed(int t, int64_t before) const {
    const UnitRows<Suppress> rule;
    const float* sqdist = to_pick_.data() + t * before;
    for (int64_t p = 0; p < before; ++p)
      if (rule.weight(sqdist[p], 1.f, pick_tau_[p]) > 0.f) return true;
    for (size_t s = 0; s < slot_.size(); ++s)
      if (rule.weight(to_token_[t * cpu::kPoints + slot_[s]], 1.f, pick_tau_[before + s]) > 0.f) return true;
    return false;
  }

  // Keeps the row, if it is to be compared with.
  void add_pick(int t, int64_t number, float tau) {
    slot_.push_back(t);
    if (static_cast<int64_t>(pick_values_.size()) <= number) pick_values_.emplace_back();
    pick_values_[number].assign(block_row_[t], block_row_[t] + size_);
    pick_row_.push_back(pick_values_[number].data());
    pick_tau_.push_back(tau);
  }

  cpu::WorkerTeam& team_;
  Rows<scalar_t> rows_;
  Items items_;
  int64_t size_;                     // of a unit point
  std::vector<uint64_t> waiting_;    // a heap
  std::vector<int64_t> suppressed_;  // by rank
  std::vector<int64_t> last_resort_;
  std::vector<int64_t> token_;  // of the block
  std::vector<int> slot_;       // of the block's picks
  std::vector<float> block_;
  std::vector<const float*> block_row_, pick_row_;
  std::vector<std::vector<float>> pick_values_;
  std::vector<float> pick_tau_, to_pick_;  // to_pick_: (block, picks)
  float to_token_[cpu::kPoints * cpu::kPoints];
};

Tensor select(const Selection& selection) {
  return cpu::select_all(selection, [&](cpu::WorkerTeam& team, const auto& rows, int64_t begin, int64_t end, int64_t* picks) {
    Walker walker(team, rows, selection.items);
    for (int64_t b = begin; b < end; ++b) walker.run(b, picks + selection.items[b].out);
  });
}

Tensor suppress_select_cpu(const Tensor& features, const Tensor& rank, const Tensor& tau, int64_t k, std::optional<Tensor> num_tokens) {
  return select(Selection::padded("suppress_select", features, k, std::nullopt, num_tokens).with_suppress(rank, tau));
}

Tensor suppress_select_varlen_cpu(const Tensor& features, const Tensor& rank, const Tensor& tau, const Tensor& cu_seqlens,
                                  const Tensor& cu_budgets, int64_t total_k, std::optional<int64_t> max_seqlen) {
  return select(Selection::packed("suppress_select_varlen", features, cu_seqlens, cu_budgets, total_k, std::nullopt, max_seqlen)
                    .with_suppress(rank, tau));
}

}  // namespace
}  // namespace sts

STABLE_TORCH_LIBRARY_IMPL(STS_NAMESPACE, CPU, m) {
  m.impl("suppress_select", TORCH_BOX(&sts::suppress_select_cpu));
  m.impl("suppress_select_varlen", TORCH_BOX(&sts::suppress_select_varlen_cpu));
}
