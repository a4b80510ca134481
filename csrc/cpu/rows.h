// float32 rows of a batch, with their norms, for the kernels that compare all rows with all others (nearest, knn_density).
#pragma once
#include <memory>
#include <type_traits>
#include <vector>

#include "parallel.h"
#include "vector_math.h"

namespace sts::cpu {

constexpr int kQueries = 64;  // query rows per task, compared in groups of kPoints
constexpr int kKeys = 64;     // key rows per tile: they stay in L2 while they are compared with all queries of the task

// Error bound of a dot product of C channels, relative to |a||b|: each of 4 or more lanes sums at most C / 4 products. The 16 covers the
// rest: adding the lanes, and the sums |a|^2 + |b|^2 - 2 a.b.
inline float dot_error(int64_t channels) { return static_cast<float>(channels / 4 + 16) * 0x1p-23f; }

// Whether the products of rows with this |row|^2 neither overflow nor vanish in float32.
inline bool in_range(float square) { return square >= 0x1p-60f && square <= 0x1p60f; }

// `row` points into the features, or into `copies`.
struct FloatRows {
  int64_t batch, count, channels;   // channels: padded with zeros, point_size of the given channels
  std::vector<const float*> row;    // (batch, count)
  std::vector<float> square;        // (batch, count): |row|^2; for_cosine: 1 / |row|, or 0 for a zero row
  std::vector<char> usable;         // (batch, count): no NaN or infinity
  std::unique_ptr<float[]> copies;  // uninitialised: pages that are never written cost nothing

  // Copies a row if it is 16-bit, needs padding, or (for_cosine) its |row|^2 is out of range. An out-of-range row is scaled by a power of
  // two, which is exact and does not change cosines.
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
  // copy = row * 2^n, with the largest magnitude in [1, 2), or as near as a float32 power of two takes it. Returns false for a zero row.
  static bool scale(const float* row, float* copy, int64_t size) {
    float max_abs = 0.f;
    for (int64_t c = 0; c < size; ++c) max_abs = std::max(max_abs, std::fabs(row[c]));
    if (max_abs == 0.f) return false;
    const float power = std::ldexp(1.f, std::min(std::max(-std::ilogb(max_abs), -126), 126));
    for (int64_t c = 0; c < size; ++c) copy[c] = row[c] * power;
    return true;
  }
};

}  // namespace sts::cpu
