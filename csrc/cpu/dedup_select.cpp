// dedup_select on the CPU: VisPruner's rounds of duplicate removal, over stored squared distances of unit rows.
//
// What: a round compares the tokens at even list positions with those at odd positions. The even tokens nearest to an odd token are
//   removed. The next list holds the other even tokens by ascending distance (ties in list order), then the odd tokens.
// Chosen when: the features are on the CPU.
// Steps:
//   (1) list the finite tokens; if there are at most `keep`, keep them all, then non-finite tokens up to `keep`;
//   (2) else compute the distance matrix;
//   (3) rounds, until `keep` tokens are left; a round first compacts the matrix, if fewer than 4/5 of its tokens are left.
// Synchronisation: the team shares (2) and the row minima of a round (for_rows). If there are enough items, each thread runs whole items.
#include <numeric>
#include <vector>

#include "common/dedup_glue.h"
#include "pairs.h"

namespace sts {
namespace {

// Selects from one item at a time; scratch memory is reused from item to item.
template <class scalar_t>
class Deduplicator {
 public:
  Deduplicator(cpu::WorkerTeam& team, const Rows<scalar_t>& features)
      : team_(team), features_(features), point_size_(cpu::point_size(features.channels)) {}

  // `listed`: the tokens of item b, at most `length`; the first -1 ends them. out: (keep).
  void run(int64_t b, const int64_t* listed, int64_t length, int64_t keep, int64_t step, int64_t* out) {
    length = std::find(listed, listed + length, int64_t(-1)) - listed;
    finite_.assign(length, 0);
    team_.for_rows(length, features_.channels, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) finite_[i] = cpu::all_finite(features_.row(b, listed[i]), features_.channels);
    });
    // (1) Finite tokens in list order, then the others.
    token_.clear();
    for (const bool finite : {true, false})
      for (int64_t i = 0; i < length; ++i)
        if (finite_[i] == finite) token_.push_back(listed[i]);
    const int64_t finite = std::count(finite_.begin(), finite_.end(), 1);
    if (finite > keep) {
      token_.resize(finite);
      compute_sqdist(b);                                                    // (2)
      while (static_cast<int64_t>(list_.size()) > keep) round(keep, step);  // (3)
    } else {
      list_.resize(std::min(length, keep));
      std::iota(list_.begin(), list_.end(), int64_t(0));
    }
    for (size_t i = 0; i < list_.size(); ++i) out[i] = token_[list_[i]];
    std::fill(out + list_.size(), out + keep, int64_t(-1));
  }

 private:
  // sqdist_ = squared distances of all pairs of unit rows: 2 - 2 cosine. A zero row has cosine 0, so distance 2, to every row.
  void compute_sqdist(int64_t b) {
    width_ = static_cast<int64_t>(token_.size());
    list_.resize(width_);
    std::iota(list_.begin(), list_.end(), int64_t(0));
    unit_.resize(width_ * point_size_);
    unit_row_.resize(width_);
    zero_.assign(width_, 0);
    sqdist_.resize(width_ * width_);
    team_.for_rows(width_, 4 * features_.channels, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        float* unit = unit_.data() + i * point_size_;
        unit_row_[i] = unit;
        cpu::to_point(features_.row(b, token_[i]), unit, features_.channels);
        zero_[i] = !cpu::to_unit(unit, point_size_);
      }
    });
    cpu::all_pairs(team_, unit_row_.data(), width_, point_size_, sqdist_.data());
    for (int64_t i = 0; i < width_; ++i)
      if (zero_[i])
        for (int64_t j = 0; j < width_; ++j) sqdist_[i * width_ + j] = sqdist_[j * width_ + i] = 2.f;
  }

  // One round, which removes at most `step` tokens. A row minimum runs over the whole row, with infinity added at positions that are not
  // odd: that is faster than gathering the odd tokens.
  void round(int64_t keep, int64_t step) {
    if (5 * static_cast<int64_t>(list_.size()) < 4 * width_) compact();
    const auto left = static_cast<int64_t>(list_.size());
    const int64_t evens = (left + 1) / 2, remove = std::min({step, left - keep, evens});
    odd_mask_.assign(width_, kInfinity);
    for (int64_t i = 1; i < left; i += 2) odd_mask_[list_[i]] = 0.f;
    closest_.resize(evens);
    team_.for_rows(evens, width_, [&](int64_t begin, int64_t end) {
      for (int64_t e = begin; e < end; ++e)
        closest_[e] = {cpu::lowest_sum(sqdist_.data() + list_[2 * e] * width_, odd_mask_.data(), width_), e};
    });
    std::sort(closest_.begin(), closest_.end());
    next_.clear();
    for (int64_t e = remove; e < evens; ++e) next_.push_back(list_[2 * closest_[e].second]);
    for (int64_t i = 1; i < left; i += 2) next_.push_back(list_[i]);
    std::swap(list_, next_);
  }

  // Compacts the matrix: removes the rows and columns of removed tokens, in place. The others keep their order.
  void compact() {
    next_ = list_;
    std::sort(next_.begin(), next_.end());
    new_row_.resize(width_);
    const auto left = static_cast<int64_t>(next_.size());
    for (int64_t i = 0; i < left; ++i) {
      const float* row = sqdist_.data() + next_[i] * width_;
      for (int64_t j = 0; j < left; ++j) sqdist_[i * left + j] = row[next_[j]];  // in place: the write index never passes the read index
      token_[i] = token_[next_[i]];
      new_row_[next_[i]] = i;
    }
    for (int64_t& i : list_) i = new_row_[i];
    width_ = left;
  }

  cpu::WorkerTeam& team_;
  Rows<scalar_t> features_;
  int64_t point_size_, width_ = 0;    // width_: tokens in the matrix
  std::vector<int64_t> token_;        // (width_): token of a matrix row
  std::vector<int64_t> list_, next_;  // matrix rows of the tokens left, in list order; next_: scratch
  std::vector<int64_t> new_row_;      // (width_): matrix row after compaction
  std::vector<char> finite_, zero_;
  std::vector<float> unit_;      // (width_, point_size_)
  std::vector<float> sqdist_;    // (width_, width_)
  std::vector<float> odd_mask_;  // (width_): 0 for tokens at odd list positions, else infinity
  std::vector<const float*> unit_row_;
  std::vector<std::pair<float, int64_t>> closest_;  // (distance to the nearest odd token, index among the even tokens)
};

Tensor dedup_select_cpu(const Tensor& features, const Tensor& order, int64_t keep, int64_t step) {
  const DedupArguments args(features, order, keep, step);
  const int64_t batch = args.features.size(0), channels = args.features.size(2), length = args.order.size(1);
  const auto* const listed = static_cast<const int64_t*>(args.order.const_data_ptr());
  args.check_values(listed);
  Tensor out = new_indices(args.features, {batch, keep});
  auto* const kept = static_cast<int64_t*>(out.mutable_data_ptr());
  cpu::dispatch(args.features.scalar_type(), [&](auto* element) {
    const auto rows = rows_of<std::remove_pointer_t<decltype(element)>>(args.features);
    const auto run = [&](cpu::WorkerTeam& team, int64_t begin, int64_t end) {
      Deduplicator deduplicator(team, rows);
      for (int64_t b = begin; b < end; ++b) deduplicator.run(b, listed + b * length, length, keep, step, kept + b * keep);
    };
    cpu::for_items(batch, length * length * (channels + length / 16), run);
  });
  return out;
}

}  // namespace
}  // namespace sts

STABLE_TORCH_LIBRARY_IMPL(STS_NAMESPACE, CPU, m) { m.impl("dedup_select", TORCH_BOX(&sts::dedup_select_cpu)); }
