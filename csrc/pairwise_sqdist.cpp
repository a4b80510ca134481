#include <vector>

#include "cpu_math.h"
#include "cpu_parallel.h"

namespace sts {
namespace {

constexpr int64_t kBlock = 64;  // columns that stay in cache while the rows above them pass

// The upper triangle of one item, mirrored.
template <class scalar_t>
void pairs(const Rows<scalar_t>& rows, int64_t b, int64_t tokens, float* out) {
  const int64_t channels = rows.channels;
  cpu::for_rows(ceil_div(tokens, kBlock), kBlock * tokens * channels, [&](int64_t begin, int64_t end) {
    std::vector<float> wide(cpu::kPoints * channels), strip(cpu::kPoints * kBlock);
    for (int64_t block = begin; block < end; ++block) {
      const int64_t j0 = block * kBlock, j1 = std::min(j0 + kBlock, tokens);
      for (int64_t i = 0; i < j1; i += cpu::kPoints) {
        const int points = static_cast<int>(std::min<int64_t>(cpu::kPoints, j1 - i));
        const float* point[cpu::kPoints];
        for (int p = 0; p < points; ++p) {
          cpu::widen(rows.row(b, i + p), wide.data() + p * channels, channels);
          point[p] = wide.data() + p * channels;
        }
        cpu::sqdist(point, points, rows.row(b, j0), rows.row_stride, j1 - j0, channels, strip.data(), kBlock);
        for (int p = 0; p < points; ++p)
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
    for (int64_t b = 0; b < batch; ++b) pairs(rows, b, tokens, matrices + b * tokens * tokens);
  });
  return out;
}

}  // namespace
}  // namespace sts

STABLE_TORCH_LIBRARY_IMPL(sts_kernels, CPU, m) { m.impl("pairwise_sqdist", TORCH_BOX(&sts::pairwise_sqdist_cpu)); }
