// Squared distances of all pairs of rows.
#pragma once
#include <type_traits>
#include <vector>

#include "parallel.h"
#include "vector_math.h"

namespace sts::cpu {

// out: (count, count), zeros on the diagonal. Computes one triangle and mirrors it.
template <class scalar_t>
void all_pairs(WorkerTeam& team, const scalar_t* const* rows, int64_t count, int64_t channels, float* out) {
  constexpr int64_t kMaxWidth = 128;
  const int64_t width = count < 1024 ? kMaxWidth / 2 : kMaxWidth;  // columns per block: their rows stay in cache for all i
  const int64_t size = point_size(channels), blocks = ceil_div(count, width);
  team.for_rows(blocks, width * count * channels, [&](int64_t begin, int64_t end) {
    std::vector<float> points(kPoints * size), strip(kPoints * kMaxWidth);
    const float* point[kPoints];
    for (int64_t block = blocks - end; block < blocks - begin; ++block) {  // the longest first, so that no task ends late
      const int64_t j0 = block * width, j1 = std::min(j0 + width, count);
      for (int64_t i = 0; i < j1; i += kPoints) {
        const int used = static_cast<int>(std::min<int64_t>(kPoints, j1 - i));
        for (int p = 0; p < used; ++p) {
          if constexpr (std::is_same_v<scalar_t, float>) {
            point[p] = rows[i + p];
            if (channels == size) continue;  // the row needs no padding and serves as the point
          }
          to_point(rows[i + p], points.data() + p * size, channels);
          point[p] = points.data() + p * size;
        }
        sqdist(point, used, rows + j0, j1 - j0, rows + j0, 0, channels, strip.data(), width);
        for (int p = 0; p < used; ++p)
          for (int64_t j = std::max(j0, i + p); j < j1; ++j)
            out[(i + p) * count + j] = out[j * count + i + p] = j == i + p ? 0.f : strip[p * width + j - j0];
      }
    }
  });
}

}  // namespace sts::cpu
