#include <vector>

#include "cpu_math.h"
#include "cpu_parallel.h"

namespace sts {
namespace {

constexpr int64_t kBlock = 64;  // columns that stay in cache while the rows above them pass

// The upper triangle of one item, mirrored.
template <class scalar_t>
void pairs(cpu::Team& team, const Rows<scalar_t>& rows, int64_t b, int64_t tokens, float* out) {
  const int64_t channels = rows.channels, point_size = cpu::point_size(channels);
  team.for_rows(ceil_div(tokens, kBlock), kBlock * tokens * channels, [&](int64_t begin, int64_t end) {
    std::vector<float> points(cpu::kPoints * point_size), strip(cpu::kPoints * kBlock);
    const scalar_t* column[kBlock];
    const float* point[cpu::kPoints];
    for (int p = 0; p < cpu::kPoints; ++p) point[p] = points.data() + p * point_size;
    for (int64_t block = begin; block < end; ++block) {
      const int64_t j0 = block * kBlock, j1 = std::min(j0 + kBlock, tokens);
      for (int64_t j = j0; j < j1; ++j) column[j - j0] = rows.row(b, j);
      for (int64_t i = 0; i < j1; i += cpu::kPoints) {
        const int used = static_cast<int>(std::min<int64_t>(cpu::kPoints, j1 - i));
        for (int p = 0; p < used; ++p) cpu::to_point(rows.row(b, i + p), points.data() + p * point_size, channels);
        cpu::sqdist(point, used, column, j1 - j0, column, 0, channels, strip.data(), kBlock);
        for (int p = 0; p < used; ++p)
          for (int64_t j = std::max(j0, i + p); j < j1; ++j)
            out[(i + p) * tokens + j] = out[j * tokens + i + p] = j == i + p ? 0.f : strip[p * kBlock + j - j0];
      }
    }
  });
}

Tensor pairwise_sqdist_cpu(const Tensor& features) {
  const Tensor x = checked_features("pairwise_sqdist", features, 3);
  const int64_t batch = x.size(0), tokens = x.size(1);
  Tensor out = new_floats(x, {batch, tokens, tokens});
  float* matrices = static_cast<float*>(out.mutable_data_ptr());
  cpu::dispatch(x.scalar_type(), [&](auto* element) {
    const auto rows = rows_of<std::remove_pointer_t<decltype(element)>>(x);
    cpu::with_team(batch * tokens * tokens * rows.channels, [&](cpu::Team& team) {
      for (int64_t b = 0; b < batch; ++b) pairs(team, rows, b, tokens, matrices + b * tokens * tokens);
    });
  });
  return out;
}

}  // namespace
}  // namespace sts

STABLE_TORCH_LIBRARY_IMPL(sts_kernels, CPU, m) { m.impl("pairwise_sqdist", TORCH_BOX(&sts::pairwise_sqdist_cpu)); }
