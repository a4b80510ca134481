// Vector loops of the CPU kernels, compiled for several instruction sets; the dynamic linker takes the best the machine has.
// Rows are float32, float16 or bfloat16 and are widened on the fly; all arithmetic is float32.
#pragma once
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>

#include "common/selection_rule.h"

namespace sts::cpu {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

// Points that `sqdist` is given at once at the most: tiles of four of them share rows that are in cache.
constexpr int kPoints = 16;

// A point is a row in float32, its channels in the order in which the vector loops read them from a row of that type, and then
// zeros up to a whole number of the largest blocks they read.
constexpr int64_t point_size(int64_t channels) { return (channels + 31) / 32 * 32; }

#define STS_CPU_MATH(scalar_t)                                                                                                        \
  void to_point(const scalar_t* row, float* point, int64_t channels);                                                                 \
  /* Adds the row to the point. */                                                                                                    \
  void add_row(const scalar_t* row, float* point, int64_t channels);                                                                  \
  /* Whether no channel is a NaN or infinity. */                                                                                      \
  bool all_finite(const scalar_t* row, int64_t channels);                                                                             \
  /* out[p * out_stride + r] = |points[p] - rows[r]|^2, summed over differences: nothing cancels. A pair's bits depend on  \
     the pair alone, and are the same with point and row exchanged. `next`: rows that are needed next, which are fetched  \
     into cache meanwhile. */          \
  void sqdist(const float* const* points, int num_points, const scalar_t* const* rows, int64_t num_rows, const scalar_t* const* next, \
              int64_t num_next, int64_t channels, float* out, int64_t out_stride);
STS_CPU_MATH(float)
STS_CPU_MATH(Half)
STS_CPU_MATH(BFloat16)
#undef STS_CPU_MATH

// out[p * out_stride + r] = points[p] . rows[r]: twice as fast as sqdist. A pair's bits depend on the pair alone.
void dot(const float* const* points, int num_points, const float* const* rows, int64_t num_rows, int64_t channels, float* out,
         int64_t out_stride);

// sum[c] += weight * row[c]. The product is exact.
void add_weighted(const float* row, double weight, double* sum, int64_t channels);
void add_weighted(const Half* row, double weight, double* sum, int64_t channels);
void add_weighted(const BFloat16* row, double weight, double* sum, int64_t channels);

// Divides a point by its length, in place. A point with a NaN or infinity becomes NaN throughout. False where the length is 0.
bool to_unit(float* point, int64_t size);

// Smallest value and the lowest index that holds it.
struct Lowest {
  float value;
  int64_t index;
};
Lowest lowest(const float* values, int64_t count);

#define STS_CPU_RULE(Rule)                                                                                               \
  /* sqdist[i] = the rule's weight of sqdist[i], in place. `parameters`: of the tokens, or null; `pick`: of the pick. */ \
  void to_weight(const Rule& rule, float* sqdist, const float* parameters, int64_t count, float pick);                   \
  /* potentials[i] = the rule's sum of potentials[i] and weights[i], then `lowest`. */                                   \
  Lowest add_then_lowest(const Rule& rule, float* potentials, const float* weights, int64_t count);
STS_CPU_RULE(Repulsion)
STS_CPU_RULE(Farthest)
STS_CPU_RULE(UnitRows<Farthest>)
#undef STS_CPU_RULE

// The smallest of a[i] + b[i], count at least 1. Neither holds a NaN.
float lowest_sum(const float* a, const float* b, int64_t count);

// out[p * out_stride + r] = points[p] . rows[r] in float64. `size`, a multiple of 32. A pair's bits depend on the pair alone.
void dot64(const double* const* points, int num_points, const float* const* rows, int64_t num_rows, int64_t size, double* out,
           int64_t out_stride);

// Columns that subtract_products takes at a time.
constexpr int64_t kColumns = 32;
// rows[p][i] -= factors[p][t] * terms[t * stride + i] for t = 0, 1, ... and i in [begin, end), both multiples of kColumns. The bits of
// an element depend on neither the range nor num_rows.
void subtract_products(double* const* rows, const double* const* factors, int num_rows, const double* terms, int64_t stride,
                       int64_t num_terms, int64_t begin, int64_t end);
// row[i] /= pivot; distance[i] -= row[i]^2, 0 where below kInSpan; loss[i] = -weight[i] * distance[i]; then `lowest` of the losses.
// count: a multiple of kColumns.
Lowest finish_row(double* row, double pivot, double* distance, const float* weight, float* loss, int64_t count);

}  // namespace sts::cpu
