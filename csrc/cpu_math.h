// Vector loops of the CPU kernels, compiled once per instruction set and chosen when the library loads.
#pragma once
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>

namespace sts::cpu {

// out[i] = in[i] as float32.
void widen(const torch::headeronly::Half* in, float* out, int64_t count);
void widen(const torch::headeronly::BFloat16* in, float* out, int64_t count);

bool all_finite(const float* in, int64_t count);

// sum[c] += row[c]
void add_row(const float* row, float* sum, int64_t channels);

// Points compared with rows at once by `sqdist`: enough to use each row several times while it is in registers.
constexpr int kPoints = 4;

// out[p * out_stride + r] = |points[p] - rows[r]|^2, summed over differences: nothing cancels.
void sqdist(const float* const* points, int num_points, const float* rows, int64_t row_stride, int64_t num_rows, int64_t channels,
            float* out, int64_t out_stride);

// Smallest value and the lowest index that holds it.
struct Lowest {
  float value;
  int64_t index;
};
Lowest lowest(const float* values, int64_t count);

// potential[i] += 1 / (sqdist[i] + eps); nothing where the distance is not a number.
void add_repulsion(float* potential, const float* sqdist, int64_t count, float eps);

}  // namespace sts::cpu
