#include <algorithm>
#include <vector>

#include "cpu_rows.h"
#include "torch_glue.h"

namespace sts {
namespace {

Tensor pairwise_sqdist_cpu(const Tensor& features) {
  const Tensor x = checked_features("pairwise_sqdist", features, 3);
  const int64_t batch = x.size(0), tokens = x.size(1), channels = x.size(2);
  Tensor out = torch::stable::new_empty(x, {batch, tokens, tokens}, ScalarType::Float);
  float* all = static_cast<float*>(out.mutable_data_ptr());
  cpu::FloatRows rows(x);
  for (int64_t b = 0; b < batch; ++b) {
    rows.load(b, 0, tokens);
    float* sqdist = all + b * tokens * tokens;
    // Upper triangle, a few rows at a time against blocks of columns that stay in cache, mirrored.
    constexpr int64_t kBlock = 64;
    torch::stable::parallel_for(0, ceil_div(tokens, kBlock), 1, [&](int64_t begin, int64_t end) {
      for (int64_t block = begin; block < end; ++block) {
        const int64_t j0 = block * kBlock, j1 = std::min(j0 + kBlock, tokens);
        float strip[cpu::kPoints * kBlock];
        for (int64_t i = 0; i < j1; i += cpu::kPoints) {
          const int points = static_cast<int>(std::min<int64_t>(cpu::kPoints, j1 - i));
          const float* point[cpu::kPoints];
          for (int p = 0; p < points; ++p) point[p] = rows[i + p];
          cpu::sqdist(point, points, rows[j0], rows.stride(), j1 - j0, channels, strip, kBlock);
          for (int p = 0; p < points; ++p)
            for (int64_t j = std::max(j0, i + p); j < j1; ++j)
              sqdist[(i + p) * tokens + j] = sqdist[j * tokens + i + p] = j == i + p ? 0.f : strip[p * kBlock + j - j0];
        }
      }
    });
  }
  return out;
}

}  // namespace
}  // namespace sts

STABLE_TORCH_LIBRARY_IMPL(sts_kernels, CPU, m) { m.impl("pairwise_sqdist", TORCH_BOX(&sts::pairwise_sqdist_cpu)); }
