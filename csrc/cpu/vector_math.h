// SIMD loops of the CPU kernels, compiled for several instruction sets. The dynamic linker takes the best that the CPU supports.
// Rows are float32, float16 or bfloat16, widened to float32 on load. Arithmetic is float32, or float64 where arguments are double.
#pragma once
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>

#include "common/selection_rule.h"

namespace sts::cpu {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

// Max points that a kernel passes to `sqdist` or `dot` at once. Tiles of 4 points share the rows, which stay in cache.
constexpr int kPoints = 16;

// Floats of a point. A point is a row in float32, with its channels in the order in which the loops load rows of its type (bfloat16 is
// permuted), padded with zeros to a multiple of the largest block: 32 channels.
constexpr int64_t point_size(int64_t channels) { return (channels + 31) / 32 * 32; }

// For rows of each type:
//   to_point    converts a row to a point.
//   add_row     adds a row to a point.
//   all_finite  whether no channel is NaN or infinite.
//   sqdist      out[p * out_stride + r] = |points[p] - rows[r]|^2, summed over squared differences: no cancellation.
//               Invariant: the bits of a pair depend on the pair alone; swapping point and row does not change them.
//               `next`: the rows that the next call reads, prefetched into L2.
#define STS_CPU_MATH(scalar_t)                                                                                                        \
  void to_point(const scalar_t* row, float* point, int64_t channels);                                                                 \
  void add_row(const scalar_t* row, float* point, int64_t channels);                                                                  \
  bool all_finite(const scalar_t* row, int64_t channels);                                                                             \
  void sqdist(const float* const* points, int num_points, const scalar_t* const* rows, int64_t num_rows, const scalar_t* const* next, \
              int64_t num_next, int64_t channels, float* out, int64_t out_stride);
STS_CPU_MATH(float)
STS_CPU_MATH(Half)
STS_CPU_MATH(BFloat16)
#undef STS_CPU_MATH

// out[p * out_stride + r] = points[p] . rows[r], at twice the speed of sqdist. Invariant: the bits of a pair depend on the pair alone.
void dot(const float* const* points, int num_points, const float* const* rows, int64_t num_rows, int64_t channels, float* out,
         int64_t out_stride);

// sum[c] += weight * row[c]. The product is exact for a weight of float32 precision.
void add_weighted(const float* row, double weight, double* sum, int64_t channels);
void add_weighted(const Half* row, double weight, double* sum, int64_t channels);
void add_weighted(const BFloat16* row, double weight, double* sum, int64_t channels);

// Divides a point by its length, in place. A point with a NaN or infinity becomes all NaN. Returns false for a zero point.
bool to_unit(float* point, int64_t size);

// The smallest value and its lowest index.
struct Lowest {
  float value;
  int64_t index;
};
Lowest lowest(const float* values, int64_t count);

// For each rule:
//   to_weight        sqdist[i] = rule.weight(sqdist[i], parameters[i], pick), in place. Null `parameters`: all 1.
//   add_then_lowest  potentials[i] = rule.add(potentials[i], weights[i]); returns the lowest potential.
#define STS_CPU_RULE(Rule)                                                                             \
  void to_weight(const Rule& rule, float* sqdist, const float* parameters, int64_t count, float pick); \
  Lowest add_then_lowest(const Rule& rule, float* potentials, const float* weights, int64_t count);
STS_CPU_RULE(Repulsion)
STS_CPU_RULE(Farthest)
STS_CPU_RULE(UnitRows<Farthest>)
#undef STS_CPU_RULE

// min over i of a[i] + b[i]. Precondition: count >= 1, no NaN.
float lowest_sum(const float* a, const float* b, int64_t count);

// out[p * out_stride + r] = points[p] . rows[r] in float64. `size` is a multiple of 32. Invariant: the bits of a pair depend on the pair
// alone.
void dot64(const double* const* points, int num_points, const float* const* rows, int64_t num_rows, int64_t size, double* out,
           int64_t out_stride);

// Column block of subtract_products and finish_row.
constexpr int64_t kColumns = 32;
// rows[p][i] -= factors[p][t] * terms[t * stride + i] for t = 0, 1, ... and i in [begin, end), both multiples of kColumns. Invariant: the
// bits of an element depend on neither the range nor num_rows.
void subtract_products(double* const* rows, const double* const* factors, int num_rows, const double* terms, int64_t stride,
                       int64_t num_terms, int64_t begin, int64_t end);
// row[i] /= pivot; distance[i] -= row[i]^2, set to 0 if below kInSpan; loss[i] = -weight[i] * distance[i]. Returns `lowest` of the losses.
// `count` is a multiple of kColumns.
Lowest finish_row(double* row, double pivot, double* distance, const float* weight, float* loss, int64_t count);

}  // namespace sts::cpu
