#include "cpu_math.h"

#include <cstring>

#include "selection_rule.h"

#if defined(__x86_64__) && defined(__ELF__) && defined(__GNUC__) && !defined(__clang__) && !defined(__SANITIZE_THREAD__)
#define STS_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define STS_CLONES
#endif
#define STS_INLINE inline __attribute__((always_inline))

namespace sts::cpu {
namespace {

constexpr int kLanes = 16;
using Lanes = float __attribute__((vector_size(kLanes * sizeof(float))));

STS_INLINE void load(Lanes& lanes, const float* in) { std::memcpy(&lanes, in, sizeof lanes); }

STS_INLINE void load_some(Lanes& lanes, const float* in, int64_t count) {
  lanes = Lanes{};
  std::memcpy(&lanes, in, count * sizeof(float));
}

STS_INLINE float total(const Lanes& lanes) {
  float sum[kLanes];
  std::memcpy(sum, &lanes, sizeof sum);
  for (int width = kLanes / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) sum[i] += sum[i + width];
  return sum[0];
}

template <int P, int R>
STS_INLINE void tile(const float* const* points, const float* rows, int64_t row_stride, int64_t channels, float* out, int64_t out_stride) {
  Lanes sum[P][R] = {};
  const auto add = [&](int64_t c, auto&& load) __attribute__((always_inline)) {
    Lanes x[R];
    for (int r = 0; r < R; ++r) load(x[r], rows + r * row_stride + c);
    for (int p = 0; p < P; ++p) {
      Lanes point;
      load(point, points[p] + c);
      for (int r = 0; r < R; ++r) {
        const Lanes difference = point - x[r];
        sum[p][r] += difference * difference;
      }
    }
  };
  int64_t c = 0;
  for (; c + kLanes <= channels; c += kLanes) add(c, [](Lanes& v, const float* in) __attribute__((always_inline)) { load(v, in); });
  if (c < channels) add(c, [=](Lanes& v, const float* in) __attribute__((always_inline)) { load_some(v, in, channels - c); });
  for (int p = 0; p < P; ++p)
    for (int r = 0; r < R; ++r) out[p * out_stride + r] = total(sum[p][r]);
}

template <int P>
STS_INLINE void strip(const float* const* points, const float* rows, int64_t row_stride, int64_t num_rows, int64_t channels, float* out,
                      int64_t out_stride) {
  int64_t r = 0;
  for (; r + 4 <= num_rows; r += 4) tile<P, 4>(points, rows + r * row_stride, row_stride, channels, out + r, out_stride);
  for (; r < num_rows; ++r) tile<P, 1>(points, rows + r * row_stride, row_stride, channels, out + r, out_stride);
}

}  // namespace

STS_CLONES void widen(const torch::headeronly::Half* in, float* out, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    uint16_t half;
    std::memcpy(&half, in + i, sizeof half);
    uint32_t magnitude = uint32_t(half & 0x7fff) << 13;
    float value;
    std::memcpy(&value, &magnitude, sizeof value);
    value *= 0x1p112f;  // rebias the exponent; exact, subnormals included
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    bits |= (magnitude >= 0x0f800000u ? 0x7f800000u : 0u) | uint32_t(half & 0x8000) << 16;
    std::memcpy(out + i, &bits, sizeof bits);
  }
}

STS_CLONES void widen(const torch::headeronly::BFloat16* in, float* out, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    uint16_t half;
    std::memcpy(&half, in + i, sizeof half);
    const uint32_t bits = uint32_t(half) << 16;
    std::memcpy(out + i, &bits, sizeof bits);
  }
}

STS_CLONES bool all_finite(const float* in, int64_t count) {
  uint32_t found = 0;
  for (int64_t i = 0; i < count; ++i) {
    uint32_t bits;
    std::memcpy(&bits, in + i, sizeof bits);
    found |= (bits & 0x7f800000u) == 0x7f800000u;
  }
  return !found;
}

STS_CLONES void add_row(const float* row, float* sum, int64_t channels) {
  for (int64_t c = 0; c < channels; ++c) sum[c] += row[c];
}

STS_CLONES void sqdist(const float* const* points, int num_points, const float* rows, int64_t row_stride, int64_t num_rows,
                       int64_t channels, float* out, int64_t out_stride) {
  switch (num_points) {
    case 1: return strip<1>(points, rows, row_stride, num_rows, channels, out, out_stride);
    case 2: return strip<2>(points, rows, row_stride, num_rows, channels, out, out_stride);
    case 3: return strip<3>(points, rows, row_stride, num_rows, channels, out, out_stride);
    default: return strip<kPoints>(points, rows, row_stride, num_rows, channels, out, out_stride);
  }
}

STS_CLONES Lowest lowest(const float* values, int64_t count) {
  float value = values[0];
  int64_t i = 0;
  if (count >= kLanes) {
    Lanes best, next;
    load(best, values);
    for (i = kLanes; i + kLanes <= count; i += kLanes) {
      load(next, values + i);
      best = next < best ? next : best;
    }
    for (int lane = 0; lane < kLanes; ++lane) value = best[lane] < value ? best[lane] : value;
  }
  for (; i < count; ++i) value = values[i] < value ? values[i] : value;
  int64_t index = 0;
  while (index + 1 < count && values[index] != value) ++index;
  return {value, index};
}

STS_CLONES void add_repulsion(float* potential, const float* sqdist, int64_t count, float eps) {
  const Repulsion rule{eps};
  for (int64_t i = 0; i < count; ++i) potential[i] = rule.add(potential[i], rule.weight(sqdist[i]));
}

}  // namespace sts::cpu
