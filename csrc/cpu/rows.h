// Rows of a batch in float32, as the kernels that compare every row with every other read them.
#pragma once
#include <memory>
#include <type_traits>
#include <vector>

#include "parallel.h"
#include "vector_math.h"

namespace sts::cpu {

constexpr int kQueries = 64;  // rows that one part of a loop compares, in groups of kPoints
constexpr int kKeys = 64;     // with so many at a time, which stay in the second-level cache meanwhile

// Worst relative error of a dot product of C channels, of |a||b|, and of the sums that make a squared distance of it: each of 4 lanes
// or more adds C / 4 products.
inline float dot_error(int64_t channels) { return static_cast<float>(channels / 4 + 16) * 0x1p-23f; }

// Squares of such rows neither overflow nor vanish.
inline bool in_range(float square) { return square >= 0x1p-60f && square <= 0x1p60f; }

struct FloatRows {
  int64_t batch, count, channels;   // channels: of each row in float32, zeros at the end included
  std::vector<const float*> row;    // (batch, count)
  std::vector<float> square;        // |row|^2; cosine: 1 / |row|, or 0
  std::vector<char> usable;         // no NaN or infinity
  std::unique_ptr<float[]> copies;  // uninitialised: pages nobody writes to cost nothing

  // for_cosine: a row whose square is out of range is scaled by a power of two, which rounds nothing.
  template <class scalar_t>
  static FloatRows of(WorkerTeam& team, const Rows<scalar_t>& rows, int64_t batch, int64_t count, bool for_cosine) {
    FloatRows out{batch, count, point_size(rows.channels), {}, {}, {}, {}};
    const int64_t all = batch * count, size = out.channels;
    out.row.resize(all), out.square.resize(all), out.usable.resize(all);
    out.copies.reset(new float[all * size]);
    team.for_rows(all, 4 * size, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        const scalar_t* given = rows.row(r / count, r % count);
        float *copy = out.copies.get() + r * size, square;
        const float* row = copy;
        bool copied = true;
        if constexpr (std::is_same_v<scalar_t, float>)
          if (rows.channels == size) row = given, copied = false;
        if (copied) to_point(given, copy, rows.channels);
        dot(&row, 1, &row, 1, size, &square, 1);
        out.usable[r] = in_range(square) || all_finite(given, rows.channels);
        if (for_cosine && out.usable[r]) {
          if (!in_range(square) && scale(row, copy, size)) {
            row = copy;
            dot(&row, 1, &row, 1, size, &square, 1);
          }
          square = square > 0.f ? 1.f / std::sqrt(square) : 0.f;
        }
        out.row[r] = row, out.square[r] = square;
      }
    });
    return out;
  }

 private:
  // copy = row times the power of two that takes its largest element to [1, 2), or as near as one float goes; false for a zero row.
  static bool scale(const float* row, float* copy, int64_t size) {
    float largest = 0.f;
    for (int64_t c = 0; c < size; ++c) largest = std::max(largest, std::fabs(row[c]));
    if (largest == 0.f) return false;
    const float power = std::ldexp(1.f, std::min(std::max(-std::ilogb(largest), -126), 126));
    for (int64_t c = 0; c < size; ++c) copy[c] = row[c] * power;
    return true;
  }
};

// How many of an item's rows count; 0 where the number makes no sense.
inline int64_t counted(const int64_t* counts, int64_t b, int64_t most) {
  if (!counts) return most;
  return counts[b] >= 0 && counts[b] <= most ? counts[b] : 0;
}

}  // namespace sts::cpu
