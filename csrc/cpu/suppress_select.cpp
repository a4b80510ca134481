// suppress_select on the CPU: threshold suppression in the order of the ranks.
//
// What: a token is picked if no earlier pick suppresses it. Tokens are visited in the order of their ranks and compared with the picks
//   alone. The loop ends when all picks are found. A pair's distance has the same bits in any block, so the picks are those of the plain
//   loop.
// Chosen when: the features are on the CPU.
// Steps:
//   (1) build a heap of the ranks;
//   (2) pop a block of up to kPoints tokens;
//   (3) compute their squared distances to the picks and to each other;
//   (4) decide for one token after another whether a pick suppresses it; repeat from (2);
//   (5) if picks are missing, take the suppressed tokens by rank, then the unusable tokens by index.
// Synchronisation: the team shares (3) (for_rows). If there are enough items, each thread runs whole items instead.
#include <algorithm>
#include <cstring>
#include <functional>
#include <vector>

#include "select.h"

namespace sts {
namespace {

// Selects from one item at a time; scratch memory is reused from item to item.
template <class scalar_t>
class SuppressSelector {
 public:
  SuppressSelector(cpu::WorkerTeam& team, const Rows<scalar_t>& rows, const Items& items)
      : team_(team), rows_(rows), items_(items), size_(cpu::point_size(rows.channels)), block_(cpu::kPoints * size_) {
    for (int p = 0; p < cpu::kPoints; ++p) block_row_.push_back(block_.data() + p * size_);
  }

  void run(int64_t b, int64_t* out) {
    const Item item = items_[b];
    const int64_t picks = std::min(item.picks, item.tokens), first = items_.first_token(b, item), entry = items_.entry(b);
    std::fill(out + picks, out + item.picks, -1);
    if (picks == 0) return;
    heapify(first, item.tokens);  // (1)
    pick_row_.clear();
    pick_tau_.clear();
    suppressed_.clear();
    int64_t picked = 0;
    while (picked < picks && !heap_.empty()) {
      // (2) pop a block
      block_token_.clear();
      while (static_cast<int64_t>(block_token_.size()) < std::min<int64_t>(cpu::kPoints, picks - picked) && !heap_.empty()) {
        const int64_t token = pop_token();
        const scalar_t* row = rows_.row(entry, item.first + token);
        if (!cpu::all_finite(row, rows_.channels)) {
          unusable_.push_back(token);
          continue;
        }
        cpu::to_unit_point(row, rows_.channels, token, block_.data() + block_token_.size() * size_);
        block_token_.push_back(token);
      }
      compute_sqdist(picked, picks);  // (3)
      const int64_t earlier_picks = picked;
      // (4) decide
      for (size_t t = 0; t < block_token_.size(); ++t) {
        if (is_suppressed(static_cast<int>(t), earlier_picks)) {
          suppressed_.push_back(block_token_[t]);
          continue;
        }
        out[picked] = block_token_[t];
        add_pick(static_cast<int>(t), picked++, items_.parameter_of(first + block_token_[t]));
      }
    }
    // (5) missing picks
    std::sort(unusable_.begin(), unusable_.end());
    for (const std::vector<int64_t>* rest : {&suppressed_, &unusable_})
      for (size_t i = 0; i < rest->size() && picked < picks; ++i) out[picked++] = (*rest)[i];
  }

 private:
  // heap_ = the tokens of valid rank, the lowest rank on top, ties by token. Key: bits 32..63 hold the rank as float32 bits, which sort
  // like the rank because it is not negative; bits 0..31 hold the token.
  void heapify(int64_t first, int64_t tokens) {
    heap_.clear();
    unusable_.clear();
    for (int64_t i = 0; i < tokens; ++i) {
      const float rank = Suppress::start(items_.start_of(first + i), 1.f);
      if (rank == kNonFinitePotential) {
        unusable_.push_back(i);
        continue;
      }
      uint32_t bits;
      std::memcpy(&bits, &rank, sizeof bits);
      heap_.push_back(static_cast<uint64_t>(bits) << 32 | static_cast<uint64_t>(i));
    }
    std::make_heap(heap_.begin(), heap_.end(), std::greater<>());
  }
  // Pops the token of the lowest rank.
  int64_t pop_token() {
    std::pop_heap(heap_.begin(), heap_.end(), std::greater<>());
    const auto token = static_cast<int64_t>(heap_.back() & 0xffffffffu);
    heap_.pop_back();
    return token;
  }

  // Squared distances of the block's tokens to the picks, and to each other.
  void compute_sqdist(int64_t picked, int64_t picks) {
    const auto used = static_cast<int>(block_token_.size());
    if (picked) {
      pick_sqdist_.resize(cpu::kPoints * picks);
      team_.for_rows(picked, 2 * used * size_, [&](int64_t begin, int64_t end) {
        const auto* rows = pick_row_.data() + begin;
        cpu::sqdist(block_row_.data(), used, rows, end - begin, rows, 0, size_, pick_sqdist_.data() + begin, picked);
      });
    }
    cpu::sqdist(block_row_.data(), used, block_row_.data(), used, block_row_.data(), 0, size_, block_sqdist_, cpu::kPoints);
    block_picks_.clear();
  }

  // Whether token t of the block is suppressed by one of the earlier picks, or by a pick of this block.
  bool is_suppressed(int t, int64_t earlier_picks) const {
    const UnitRows<Suppress> rule;
    const float* sqdist = pick_sqdist_.data() + t * earlier_picks;
    for (int64_t p = 0; p < earlier_picks; ++p)
      if (rule.weight(sqdist[p], 1.f, pick_tau_[p]) > 0.f) return true;
    for (size_t s = 0; s < block_picks_.size(); ++s)
      if (rule.weight(block_sqdist_[t * cpu::kPoints + block_picks_[s]], 1.f, pick_tau_[earlier_picks + s]) > 0.f) return true;
    return false;
  }

  // Appends token t of the block to the picks.
  void add_pick(int t, int64_t number, float tau) {
    block_picks_.push_back(t);
    if (static_cast<int64_t>(pick_values_.size()) <= number) pick_values_.emplace_back();
    pick_values_[number].assign(block_row_[t], block_row_[t] + size_);
    pick_row_.push_back(pick_values_[number].data());
    pick_tau_.push_back(tau);
  }

  cpu::WorkerTeam& team_;
  Rows<scalar_t> rows_;
  Items items_;
  int64_t size_;                                     // floats of a unit point
  std::vector<uint64_t> heap_;                       // min-heap of (rank, token)
  std::vector<int64_t> suppressed_;                  // ascending rank
  std::vector<int64_t> unusable_;                    // tokens of a non-finite row or an invalid rank
  std::vector<int64_t> block_token_;                 // (block): tokens
  std::vector<int> block_picks_;                     // block indices of the picks of this block
  std::vector<float> block_;                         // (kPoints, size_): unit points
  std::vector<const float*> block_row_;              // (kPoints)
  std::vector<const float*> pick_row_;               // (picks), in pick_values_
  std::vector<std::vector<float>> pick_values_;      // (picks, size_)
  std::vector<float> pick_tau_;                      // (picks)
  std::vector<float> pick_sqdist_;                   // (block, picks before the block): squared distances
  float block_sqdist_[cpu::kPoints * cpu::kPoints];  // (block, block), row stride kPoints: squared distances
};

Tensor select(const Selection& selection) {
  return cpu::select_all(selection, [&](cpu::WorkerTeam& team, const auto& rows, int64_t begin, int64_t end, int64_t* picks) {
    SuppressSelector selector(team, rows, selection.items);
    for (int64_t b = begin; b < end; ++b) selector.run(b, picks + selection.items[b].out);
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
