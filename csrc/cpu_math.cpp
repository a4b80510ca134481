#include "cpu_math.h"

#include <cstring>
#include <type_traits>

#include "selection_rule.h"

#define STS_INLINE inline __attribute__((always_inline))

// STS_PER_ISA(type, name, parameters, arguments, body): the function `name`, compiled once per instruction set, its body called
// with `L`, the number of float lanes that fill one vector register.
#if defined(__x86_64__) && defined(__ELF__) && defined(__GNUC__) && !defined(__clang__) && !defined(__SANITIZE_THREAD__)
#define STS_PER_ISA(type, name, parameters, arguments, body)                                             \
  namespace isa {                                                                                        \
  __attribute__((target("arch=x86-64-v4"))) type name parameters { constexpr int L = 16; return body; }  \
  __attribute__((target("arch=x86-64-v3"))) type name parameters { constexpr int L = 8; return body; }   \
  __attribute__((target("default"))) type name parameters { constexpr int L = 4; return body; }          \
  }                                                                                                      \
  type name parameters { return isa::name arguments; } /* through a pointer set when the library loads */
#else
#define STS_PER_ISA(type, name, parameters, arguments, body) \
  type name parameters { constexpr int L = 4; return body; }
#endif

namespace sts::cpu {
namespace {

template <int L>
struct VectorOf {
  typedef float Float __attribute__((vector_size(L * 4)));
  typedef uint32_t Word __attribute__((vector_size(L * 4)));
  typedef uint16_t Half __attribute__((vector_size(L * 2)));
};
template <int L>
using Floats = typename VectorOf<L>::Float;

template <int L>
STS_INLINE void load(Floats<L>& out, const float* in) {
  std::memcpy(&out, in, sizeof out);
}

template <int L>
STS_INLINE void load(Floats<L>& out, const BFloat16* in) {
  typename VectorOf<L>::Half half;
  std::memcpy(&half, in, sizeof half);
  const auto word = __builtin_convertvector(half, typename VectorOf<L>::Word) << 16;
  std::memcpy(&out, &word, sizeof out);
}

template <int L>
STS_INLINE void load(Floats<L>& out, const Half* in) {
  typename VectorOf<L>::Half half;
  std::memcpy(&half, in, sizeof half);
#if defined(__x86_64__)
  if constexpr (L > 4) {  // AVX2 and up convert in one instruction, for which there is no portable spelling
    Floats<L> wide;
    asm("vcvtph2ps %1, %0" : "=v"(wide) : "v"(half));
    out = wide;
    return;
  }
#endif
  const auto word = __builtin_convertvector(half, typename VectorOf<L>::Word);
  auto bits = (word & 0x7fffu) << 13;
  const auto infinite = bits >= 0x0f800000u;  // exponent all ones: an infinity or NaN
  Floats<L> value;
  std::memcpy(&value, &bits, sizeof value);
  value *= 0x1p112f;  // rebias the exponent; exact, subnormals included
  std::memcpy(&bits, &value, sizeof bits);
  bits |= (typename VectorOf<L>::Word(infinite) & 0x7f800000u) | (word & 0x8000u) << 16;
  std::memcpy(&out, &bits, sizeof out);
}

// The first `count` < L elements, zeros after them.
template <int L, class scalar_t>
STS_INLINE void load_some(Floats<L>& out, const scalar_t* in, int64_t count) {
  alignas(64) scalar_t padded[L] = {};
  for (int64_t i = 0; i < count; ++i) padded[i] = in[i];
  load<L>(out, padded);
}

template <int L>
STS_INLINE float total(const Floats<L>& lanes) {
  float sum[L];
  std::memcpy(sum, &lanes, sizeof sum);
  for (int width = L / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) sum[i] += sum[i + width];
  return sum[0];
}

template <int L, int P, int R, class scalar_t>
STS_INLINE void sqdist_tile(const float* const* points, const scalar_t* rows, int64_t row_stride, int64_t channels, float* out,
                            int64_t out_stride) {
  Floats<L> sum[P][R] = {};
  int64_t c = 0;
  for (; c + L <= channels; c += L) {
    Floats<L> x[R];
    for (int r = 0; r < R; ++r) load<L>(x[r], rows + r * row_stride + c);
    for (int p = 0; p < P; ++p) {
      Floats<L> point;
      load<L>(point, points[p] + c);
      for (int r = 0; r < R; ++r) {
        const Floats<L> difference = point - x[r];
        sum[p][r] += difference * difference;
      }
    }
  }
  if (c < channels) {
    for (int p = 0; p < P; ++p) {
      for (int r = 0; r < R; ++r) {
        Floats<L> point, x;
        load_some<L>(point, points[p] + c, channels - c);
        load_some<L>(x, rows + r * row_stride + c, channels - c);
        const Floats<L> difference = point - x;
        sum[p][r] += difference * difference;
      }
    }
  }
  for (int p = 0; p < P; ++p)
    for (int r = 0; r < R; ++r) out[p * out_stride + r] = total<L>(sum[p][r]);
}

template <int L, int P, int R, class scalar_t>
STS_INLINE void sqdist_strip(const float* const* points, const scalar_t* rows, int64_t row_stride, int64_t num_rows, int64_t channels,
                             float* out, int64_t out_stride) {
  int64_t r = 0;
  for (; r + R <= num_rows; r += R) sqdist_tile<L, P, R>(points, rows + r * row_stride, row_stride, channels, out + r, out_stride);
  for (; r < num_rows; ++r) sqdist_tile<L, P, 1>(points, rows + r * row_stride, row_stride, channels, out + r, out_stride);
}

// Tiles of points and rows whose sums fit the registers: 32 of them with AVX-512, else 16.
template <int L, class scalar_t>
STS_INLINE void sqdist_all(const float* const* points, int num_points, const scalar_t* rows, int64_t row_stride, int64_t num_rows,
                           int64_t channels, float* out, int64_t out_stride) {
  int p = 0;
  const auto strip = [&](auto width, auto height) __attribute__((always_inline)) {
    for (; p + width() <= num_points; p += width())
      sqdist_strip<L, width(), height()>(points + p, rows, row_stride, num_rows, channels, out + p * out_stride, out_stride);
  };
  if constexpr (L == 16) strip(std::integral_constant<int, 8>(), std::integral_constant<int, 2>());
  strip(std::integral_constant<int, 4>(), std::integral_constant<int, 2>());
  strip(std::integral_constant<int, 1>(), std::integral_constant<int, 4>());
}

template <int L, class scalar_t>
STS_INLINE void widen_all(const scalar_t* row, float* out, int64_t channels) {
  Floats<L> x;
  int64_t c = 0;
  for (; c + L <= channels; c += L) {
    load<L>(x, row + c);
    std::memcpy(out + c, &x, sizeof x);
  }
  if (c < channels) {
    load_some<L>(x, row + c, channels - c);
    std::memcpy(out + c, &x, (channels - c) * sizeof(float));
  }
}

template <int L, class scalar_t>
STS_INLINE void add_all(const scalar_t* row, float* sum, int64_t channels) {
  Floats<L> x, s;
  int64_t c = 0;
  for (; c + L <= channels; c += L) {
    load<L>(x, row + c);
    load<L>(s, sum + c);
    s += x;
    std::memcpy(sum + c, &s, sizeof s);
  }
  if (c < channels) {
    load_some<L>(x, row + c, channels - c);
    for (int64_t i = c; i < channels; ++i) sum[i] += x[i - c];
  }
}

template <int L, class scalar_t>
STS_INLINE bool finite_all(const scalar_t* row, int64_t channels) {
  Floats<L> x, zero = {};
  int64_t c = 0;
  for (; c + L <= channels; c += L) {
    load<L>(x, row + c);
    zero += x - x;  // a NaN where x is not finite
  }
  if (c < channels) {
    load_some<L>(x, row + c, channels - c);
    zero += x - x;
  }
  return total<L>(zero) == 0.f;
}

// Lane by lane minimum, then the index: two passes without a branch in the first.
template <int L, bool kAdd>
STS_INLINE Lowest lowest_all(float* values, const float* addend, int64_t count) {
  float value = __builtin_huge_valf();
  Floats<L> best, x, y;
  for (int lane = 0; lane < L; ++lane) best[lane] = value;
  int64_t i = 0;
  for (; i + L <= count; i += L) {
    load<L>(x, values + i);
    if constexpr (kAdd) {
      load<L>(y, addend + i);
      x += y;
      std::memcpy(values + i, &x, sizeof x);
    }
    best = x < best ? x : best;
  }
  for (int lane = 0; lane < L; ++lane) value = best[lane] < value ? best[lane] : value;
  for (; i < count; ++i) {
    if constexpr (kAdd) values[i] += addend[i];
    value = values[i] < value ? values[i] : value;
  }
  int64_t index = 0;
  while (index + 1 < count && values[index] != value) ++index;
  return {value, index};
}

template <int L>
STS_INLINE void repulsion_all(float* sqdist, int64_t count, float eps) {
  Floats<L> x;
  int64_t i = 0;
  for (; i + L <= count; i += L) {
    load<L>(x, sqdist + i);
    x = x == x ? 1.f / (x + eps) : Floats<L>{};
    std::memcpy(sqdist + i, &x, sizeof x);
  }
  for (; i < count; ++i) sqdist[i] = Repulsion{eps}.weight(sqdist[i]);
}

}  // namespace

#define STS_CPU_MATH(scalar_t)                                                                                             \
  STS_PER_ISA(void, widen, (const scalar_t* row, float* out, int64_t channels), (row, out, channels),                      \
              (widen_all<L>(row, out, channels)))                                                                          \
  STS_PER_ISA(void, add_row, (const scalar_t* row, float* sum, int64_t channels), (row, sum, channels),                    \
              (add_all<L>(row, sum, channels)))                                                                            \
  STS_PER_ISA(bool, all_finite, (const scalar_t* row, int64_t channels), (row, channels), (finite_all<L>(row, channels)))  \
  STS_PER_ISA(void, sqdist,                                                                                                \
              (const float* const* points, int num_points, const scalar_t* rows, int64_t row_stride, int64_t num_rows,     \
               int64_t channels, float* out, int64_t out_stride),                                                          \
              (points, num_points, rows, row_stride, num_rows, channels, out, out_stride),                                 \
              (sqdist_all<L>(points, num_points, rows, row_stride, num_rows, channels, out, out_stride)))
STS_CPU_MATH(float)
STS_CPU_MATH(Half)
STS_CPU_MATH(BFloat16)
#undef STS_CPU_MATH

STS_PER_ISA(void, to_repulsion, (float* sqdist, int64_t count, float eps), (sqdist, count, eps), (repulsion_all<L>(sqdist, count, eps)))
STS_PER_ISA(Lowest, lowest, (const float* values, int64_t count), (values, count),
            (lowest_all<L, false>(const_cast<float*>(values), nullptr, count)))
STS_PER_ISA(Lowest, add_then_lowest, (float* values, const float* addend, int64_t count), (values, addend, count),
            (lowest_all<L, true>(values, addend, count)))

}  // namespace sts::cpu
