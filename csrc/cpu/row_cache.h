// Cache of rows that a greedy loop computes ahead of their picks.
//
// What: the row of a drafted token stays until the token is picked, or until its slot is needed. Rows and their elements are indexed by
//   position, a token's index in the arrays of the loop.
// Chosen when: a CPU kernel drafts rows (select.h, dpp_select.cpp).
// Steps, for a batch of rows: (1) make_room for all of them; (2) add each. Invariant: a row of the batch never evicts another one.
// Synchronisation: none; the leader of the team alone changes the cache.
#pragma once
#include <algorithm>
#include <cstdint>
#include <vector>

namespace sts::cpu {

// T: element type of a row.
template <class T>
class RowCache {
 public:
  void reset(int64_t positions, int slots) {
    row_size_ = positions;
    position_of_.assign(slots, -1);
    slot_of_.assign(positions, -1);
    rows_.resize(slots * positions);
  }
  bool has(int64_t position) const { return slot_of_[position] >= 0; }
  T* row(int64_t position) { return slot(slot_of_[position]); }

  // Evicts rows until `count` slots are free: those of the highest potential, the least likely to be picked soon.
  void make_room(int count, const float* potential) {
    const auto slots = static_cast<int>(position_of_.size());
    int used = static_cast<int>(std::count_if(position_of_.begin(), position_of_.end(), [](int64_t position) { return position >= 0; }));
    for (; used > slots - count; --used) {
      int64_t victim = -1;
      for (const int64_t position : position_of_)
        if (position >= 0 && (victim < 0 || potential[position] > potential[victim])) victim = position;
      remove(victim);
    }
  }
  // Assigns a free slot to a row, which the caller fills.
  T* add(int64_t position) {
    const auto slot = static_cast<int>(std::find(position_of_.begin(), position_of_.end(), -1) - position_of_.begin());
    position_of_[slot] = position;
    slot_of_[position] = slot;
    return row(position);
  }
  void append_positions(std::vector<int64_t>& positions) const {
    for (const int64_t position : position_of_)
      if (position >= 0) positions.push_back(position);
  }
  void remove(int64_t position) {
    position_of_[slot_of_[position]] = -1;
    slot_of_[position] = -1;
  }
  // Moves position old[i] to position i. Precondition: `old` is ascending and holds all cached positions.
  void compact(const std::vector<int64_t>& old) {
    for (size_t i = 0; i < old.size(); ++i) {
      const int slot = slot_of_[i] = slot_of_[old[i]];
      if (slot >= 0) position_of_[slot] = static_cast<int64_t>(i);
    }
    for (size_t s = 0; s < position_of_.size(); ++s) {
      if (position_of_[s] < 0) continue;
      T* row = slot(static_cast<int>(s));
      for (size_t i = 0; i < old.size(); ++i) row[i] = row[old[i]];
    }
  }

 private:
  T* slot(int slot) { return rows_.data() + slot * row_size_; }

  int64_t row_size_ = 0;
  std::vector<int64_t> position_of_;  // (slots): position of the row in a slot, or -1
  std::vector<int> slot_of_;          // (positions): slot of a position's row, or -1
  std::vector<T> rows_;               // (slots, row_size_)
};

}  // namespace sts::cpu
