#include "vector_math.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>
#include <utility>

#include "common/dpp_rule.h"

// Inlined into the function of each instruction set, and so compiled for that set.
#define STS_INLINE inline __attribute__((always_inline))

// STS_PER_ISA(type, name, parameters, arguments, body) defines function `name`, compiled once per instruction set. In `body`, the
// constant L is the number of float lanes of a vector register. Tests set STS_CPU_LANES to compile a single width.
#if !defined(STS_CPU_LANES) && defined(__x86_64__) && defined(__ELF__) && defined(__GNUC__) && !defined(__clang__) && \
    !defined(__SANITIZE_THREAD__)
#define STS_PER_ISA(type, name, parameters, arguments, body)       \
  namespace isa {                                                  \
  __attribute__((target("arch=x86-64-v4"))) type name parameters { \
    constexpr int L = 16;                                          \
    return body;                                                   \
  }                                                                \
  __attribute__((target("arch=x86-64-v3"))) type name parameters { \
    constexpr int L = 8;                                           \
    return body;                                                   \
  }                                                                \
  __attribute__((target("default"))) type name parameters {        \
    constexpr int L = 4;                                           \
    return body;                                                   \
  }                                                                \
  }                                                                \
  type name parameters { return isa::name arguments; } /* calls an ifunc, resolved when the library loads */
#else
#ifndef STS_CPU_LANES
#define STS_CPU_LANES 4
#endif
#define STS_PER_ISA(type, name, parameters, arguments, body) \
  type name parameters {                                     \
    constexpr int L = STS_CPU_LANES;                         \
    return body;                                             \
  }
#endif

namespace sts::cpu {
namespace {

// SIMD vectors: Float and Word have L lanes, Half (16-bit words) L, Double and HalfFloat L / 2.
template <int L>
struct VectorOf {
  typedef float Float __attribute__((vector_size(L * 4)));
  typedef uint32_t Word __attribute__((vector_size(L * 4)));
  typedef uint16_t Half __attribute__((vector_size(L * 2)));
  typedef double Double __attribute__((vector_size(L * 4)));
  typedef float HalfFloat __attribute__((vector_size(L * 2)));
};
template <int L>
using Floats = typename VectorOf<L>::Float;
template <int L>
using Doubles = typename VectorOf<L>::Double;  // L / 2 lanes

// Rows are read in blocks of L * kVectorsPerBlock channels.
template <class scalar_t>
constexpr int kVectorsPerBlock = std::is_same_v<scalar_t, BFloat16> ? 2 : 1;

template <int L>
STS_INLINE void load(Floats<L>* out, const float* in) {
  std::memcpy(out, in, sizeof *out);
}

// Loads 2 * L channels, permuted: out[0] holds the even channels (lower halves of 32-bit words), out[1] the odd ones. Channel order would
// cost a shuffle per vector.
template <int L>
STS_INLINE void load(Floats<L>* out, const BFloat16* in) {
  typename VectorOf<L>::Word word, upper;
  std::memcpy(&word, in, sizeof word);
  upper = word & 0xffff0000u;
  word <<= 16;
  std::memcpy(out, &word, sizeof word);
  std::memcpy(out + 1, &upper, sizeof upper);
}

template <int L>
STS_INLINE void load(Floats<L>* out, const Half* in) {
  typename VectorOf<L>::Half half;
  std::memcpy(&half, in, sizeof half);
#if defined(__x86_64__)
  if constexpr (L > 4) {  // x86-64-v3 and -v4 have an instruction for it, which vector extensions cannot express
    Floats<L> wide;
    asm("vcvtph2ps %1, %0" : "=v"(wide) : "v"(half));
    *out = wide;
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
  std::memcpy(out, &bits, sizeof bits);
}

// Loads the first `count` channels of a block; the other lanes are zero.
template <int L, class scalar_t>
STS_INLINE void load_some(Floats<L>* out, const scalar_t* in, int64_t count) {
  alignas(64) scalar_t padded[L * kVectorsPerBlock<scalar_t>] = {};
  std::memcpy(padded, in, count * sizeof(scalar_t));
  load<L>(out, padded);
}

// Calls f(c, vectors) for every block of a row; c is its first channel. The last block is padded with zeros.
template <int L, class scalar_t, class F>
STS_INLINE void for_blocks(const scalar_t* row, int64_t channels, const F& f) {
  constexpr int kBlock = L * kVectorsPerBlock<scalar_t>;
  Floats<L> x[kVectorsPerBlock<scalar_t>];
  int64_t c = 0;
  for (; c + kBlock <= channels; c += kBlock) {
    load<L>(x, row + c);
    f(c, x);
  }
  if (c < channels) {
    load_some<L>(x, row + c, channels - c);
    f(c, x);
  }
}

// out = the lower (kHalf = 0) or upper (kHalf = 1) half of every group of W lanes: the groups of `a`, then those of `b`.
template <int L, int W, int kHalf, int... I>
STS_INLINE void halves(Floats<L>& out, const Floats<L>& a, const Floats<L>& b, std::integer_sequence<int, I...>) {
#if defined(__clang__)
  out = __builtin_shufflevector(a, b, (I / (W / 2) * W + kHalf * (W / 2) + I % (W / 2))...);
#else
  out = __builtin_shuffle(a, b, typename VectorOf<L>::Word{(I / (W / 2) * W + kHalf * (W / 2) + I % (W / 2))...});
#endif
}

// Horizontal sums: sums[i] = the sum of the lanes of lanes[i]. Butterfly order for any N: lane l adds lane l + L / 2, then l + L / 4, ...
// Each step folds groups of W lanes in half, and packs two vectors into one while there are two.
template <int L, int N, int W = L>
STS_INLINE void horizontal_sums(Floats<L>* lanes, float* sums) {
  if constexpr (W == 1) {
    std::memcpy(sums, lanes, N * sizeof(float));
  } else {
    constexpr int kCount = (N * W + L - 1) / L;  // vectors that hold groups
    constexpr auto kLanes = std::make_integer_sequence<int, L>();
    for (int v = 0; v < kCount; v += 2) {
      const Floats<L>&a = lanes[v], &b = lanes[v + 1 < kCount ? v + 1 : v];
      Floats<L> lower, upper;
      halves<L, W, 0>(lower, a, b, kLanes);
      halves<L, W, 1>(upper, a, b, kLanes);
      lanes[v / 2] = lower + upper;
    }
    horizontal_sums<L, N, W / 2>(lanes, sums);
  }
}

// The term that a channel adds to the sum of a pair.
struct SquaredDifference {
  template <class V>
  STS_INLINE static void add(V& sum, const V& point, const V& row) {
    const V difference = point - row;
    sum += difference * difference;
  }
};
struct Product {
  template <class V>
  STS_INLINE static void add(V& sum, const V& point, const V& row) {
    sum += point * row;
  }
};

// A register tile: the P x R sums of P points and R rows stay in registers over all channels. Meanwhile the F rows `prefetch` are
// prefetched into L2, one cache line of each row per block.
template <class Term, int L, int P, int R, int F, class scalar_t>
STS_INLINE void pairs_tile(const float* const* points, const scalar_t* const* rows, const scalar_t* const* prefetch, int64_t channels,
                           float* out, int64_t out_stride) {
  constexpr int kBlock = L * kVectorsPerBlock<scalar_t>;
  Floats<L> sum[P][R] = {}, x[R][kVectorsPerBlock<scalar_t>];
  const auto add = [&](int64_t c) __attribute__((always_inline)) {
    for (int v = 0; v < kVectorsPerBlock<scalar_t>; ++v) {
      for (int p = 0; p < P; ++p) {
        Floats<L> point;
        load<L>(&point, points[p] + c + v * L);
        for (int r = 0; r < R; ++r) Term::add(sum[p][r], point, x[r][v]);
      }
    }
  };
  int64_t c = 0;
  for (; c + kBlock <= channels; c += kBlock) {
    for (int r = 0; r < R; ++r) load<L>(x[r], rows[r] + c);
    for (int f = 0; f < F; ++f) __builtin_prefetch(prefetch[f] + c, 0, 2);
    add(c);
  }
  if (c < channels) {
    for (int r = 0; r < R; ++r) load_some<L>(x[r], rows[r] + c, channels - c);
    add(c);
  }
  float sums[P][R];
  horizontal_sums<L, P * R>(sum[0], sums[0]);
  for (int p = 0; p < P; ++p) std::memcpy(out + p * out_stride, sums[p], sizeof sums[p]);
}

// P points with all rows, in tiles of R rows. Each tile prefetches F rows of `next`. Returns how many rows were prefetched.
template <class Term, int L, int P, int R, int F, class scalar_t>
STS_INLINE int64_t pairs_strip(const float* const* points, const scalar_t* const* rows, int64_t num_rows, const scalar_t* const* next,
                               int64_t num_next, int64_t channels, float* out, int64_t out_stride) {
  int64_t r = 0, prefetched = 0;
  for (; r + R <= num_rows; r += R) {
    const scalar_t* prefetch[F];
    for (int f = 0; f < F; ++f, ++prefetched) prefetch[f] = prefetched < num_next ? next[prefetched] : rows[r];
    pairs_tile<Term, L, P, R, F>(points, rows + r, prefetch, channels, out + r, out_stride);
  }
  for (; r < num_rows; ++r) pairs_tile<Term, L, P, 1, 0, scalar_t>(points, rows + r, nullptr, channels, out + r, out_stride);
  return std::min(prefetched, num_next);
}

// All points with all rows, in register tiles. A tile and its sums fit the registers: 32 with AVX-512, else 16. Tiles of 8 x 2 load fewer
// vectors per product, but took twice as long with AVX-512.
// While the rows are compared with all points, as many rows of `next` are prefetched, spread evenly over the points. Reading a row from
// memory takes about as long as the arithmetic of a dozen points, so the first few points alone would wait for it.
template <class Term, int L, class scalar_t>
STS_INLINE void pairs_all(const float* const* points, int num_points, const scalar_t* const* rows, int64_t num_rows,
                          const scalar_t* const* next, int64_t num_next, int64_t channels, float* out, int64_t out_stride) {
  constexpr int kTileRows = L == 16 ? 4 : 2;
  int64_t prefetched = 0;
  int p = 0;
  for (; p + 4 <= num_points; p += 4) {
    const auto strip = [&](auto prefetches) __attribute__((always_inline)) {
      prefetched += pairs_strip<Term, L, 4, kTileRows, prefetches()>(points + p, rows, num_rows, next + prefetched, num_next - prefetched,
                                                                     channels, out + p * out_stride, out_stride);
    };
    if (num_points < 8) {
      strip(std::integral_constant<int, kTileRows>());
    } else if (num_points < 16) {
      strip(std::integral_constant<int, kTileRows / 2>());
    } else {
      strip(std::integral_constant<int, 1>());
    }
  }
  for (; p < num_points; ++p)
    prefetched += pairs_strip<Term, L, 1, 4, 4>(points + p, rows, num_rows, next + prefetched, num_next - prefetched, channels,
                                                out + p * out_stride, out_stride);
}

template <int L, class scalar_t>
STS_INLINE void to_point_all(const scalar_t* row, float* point, int64_t channels) {
  for_blocks<L>(row, channels, [&](int64_t c, const auto& x) __attribute__((always_inline)) { std::memcpy(point + c, x, sizeof x); });
  constexpr int kBlock = L * kVectorsPerBlock<scalar_t>;
  for (int64_t c = (channels + kBlock - 1) / kBlock * kBlock; c < point_size(channels); ++c) point[c] = 0.f;
}

template <int L, class scalar_t>
STS_INLINE void add_all(const scalar_t* row, float* point, int64_t channels) {
  for_blocks<L>(row, channels, [&](int64_t c, const auto& x) __attribute__((always_inline)) {
    for (int v = 0; v < kVectorsPerBlock<scalar_t>; ++v) {
      Floats<L> sum;
      load<L>(&sum, point + c + v * L);
      sum += x[v];
      std::memcpy(point + c + v * L, &sum, sizeof sum);
    }
  });
}

template <int L, class scalar_t>
STS_INLINE bool finite_all(const scalar_t* row, int64_t channels) {
  Floats<L> nan_sum = {};
  for_blocks<L>(row, channels, [&](int64_t, const auto& x) __attribute__((always_inline)) {
    for (int v = 0; v < kVectorsPerBlock<scalar_t>; ++v) nan_sum += x[v] - x[v];  // NaN if x is not finite
  });
  float sum;
  horizontal_sums<L, 1>(&nan_sum, &sum);
  return sum == 0.f;
}

template <int L, class scalar_t>
STS_INLINE void add_weighted_all(const scalar_t* row, double weight, double* sum, int64_t channels) {
  for (int64_t c = 0; c < channels; ++c) sum[c] += weight * static_cast<double>(static_cast<float>(row[c]));
}

// First scales by a power of two, to a largest magnitude in [0.5, 1). So the sum of squares neither overflows nor vanishes, and rows that
// differ by a power of two have equal unit rows.
template <int L>
STS_INLINE bool unit_all(float* point, int64_t size) {
  Floats<L> x, lanes = {}, nan_sum = {};
  for (int64_t c = 0; c < size; c += L) {
    load<L>(&x, point + c);
    nan_sum += x - x;  // NaN if x is not finite
    x = x < 0.f ? -x : x;
    lanes = x > lanes ? x : lanes;
  }
  float total, max_abs = 0.f;
  horizontal_sums<L, 1>(&nan_sum, &total);
  if (total != 0.f) {
    std::fill_n(point, size, __builtin_nanf(""));
    return true;
  }
  for (int lane = 0; lane < L; ++lane) max_abs = std::max(max_abs, lanes[lane]);
  if (max_abs == 0.f) return false;
  int exponent;
  std::frexp(max_abs, &exponent);
  const int half = exponent / 2;  // scale in two steps: 2^-exponent may overflow
  const float first = std::ldexp(1.f, -half), second = std::ldexp(1.f, half - exponent);
  lanes = Floats<L>{};
  for (int64_t c = 0; c < size; c += L) {
    load<L>(&x, point + c);
    x = x * first * second;
    std::memcpy(point + c, &x, sizeof x);
    lanes += x * x;
  }
  horizontal_sums<L, 1>(&lanes, &total);
  const float length = std::sqrt(total);
  for (int64_t c = 0; c < size; c += L) {
    load<L>(&x, point + c);
    x /= length;
    std::memcpy(point + c, &x, sizeof x);
  }
  return true;
}

// Two passes: (1) write the potentials and take the minimum lane by lane, without branches; (2) search its index. A null `rule` leaves the
// potentials as they are.
template <int L, class Rule>
STS_INLINE Lowest lowest_all(const Rule* rule, float* potentials, const float* weights, int64_t count) {
  float value = kInfinity;
  Floats<L> best, x, y;
  for (int lane = 0; lane < L; ++lane) best[lane] = value;
  int64_t i = 0;
  for (; i + L <= count; i += L) {
    load<L>(&x, potentials + i);
    if (rule) {
      load<L>(&y, weights + i);
      x = rule->add(x, y);
      std::memcpy(potentials + i, &x, sizeof x);
    }
    best = x < best ? x : best;
  }
  for (int lane = 0; lane < L; ++lane) value = best[lane] < value ? best[lane] : value;
  for (; i < count; ++i) {
    if (rule) potentials[i] = rule->add(potentials[i], weights[i]);
    value = potentials[i] < value ? potentials[i] : value;
  }
  int64_t index = 0;
  while (index + 1 < count && potentials[index] != value) ++index;
  return {value, index};
}

template <int L, class Rule>
STS_INLINE void weight_all(const Rule& rule, float* sqdist, const float* parameters, int64_t count, float pick) {
  Floats<L> x, parameter;
  for (int lane = 0; lane < L; ++lane) parameter[lane] = 1.f;
  int64_t i = 0;
  for (; i + L <= count; i += L) {
    load<L>(&x, sqdist + i);
    if (parameters) load<L>(&parameter, parameters + i);
    x = rule.weight(x, parameter, pick);
    std::memcpy(sqdist + i, &x, sizeof x);
  }
  for (; i < count; ++i) sqdist[i] = rule.weight(sqdist[i], parameters ? parameters[i] : 1.f, pick);
}

template <int L>
STS_INLINE float lowest_sum_all(const float* a, const float* b, int64_t count) {
  float value = kInfinity;
  Floats<L> best[2], x, y;
  for (int lane = 0; lane < L; ++lane) best[0][lane] = best[1][lane] = value;
  int64_t i = 0;
  for (; i + 2 * L <= count; i += 2 * L)
    for (int v = 0; v < 2; ++v) {
      load<L>(&x, a + i + v * L);
      load<L>(&y, b + i + v * L);
      x += y;
      best[v] = x < best[v] ? x : best[v];
    }
  best[0] = best[1] < best[0] ? best[1] : best[0];
  for (int lane = 0; lane < L; ++lane) value = best[0][lane] < value ? best[0][lane] : value;
  for (; i < count; ++i) value = std::min(value, a[i] + b[i]);
  return value;
}

// Loads of L / 2 doubles, the second from float32.
template <int L>
STS_INLINE void load(Doubles<L>* out, const double* in) {
  std::memcpy(out, in, sizeof *out);
}
template <int L>
STS_INLINE void load(Doubles<L>* out, const float* in) {
  typename VectorOf<L>::HalfFloat narrow;
  std::memcpy(&narrow, in, sizeof narrow);
  *out = __builtin_convertvector(narrow, Doubles<L>);
}

template <int L, int P, int R>
STS_INLINE void dot64_tile(const double* const* points, const float* const* rows, int64_t size, double* out, int64_t out_stride) {
  constexpr int kLanes = L / 2;
  Doubles<L> sum[P][R] = {}, x[R], point;
  for (int64_t c = 0; c < size; c += kLanes) {
    for (int r = 0; r < R; ++r) load<L>(&x[r], rows[r] + c);
    for (int p = 0; p < P; ++p) {
      load<L>(&point, points[p] + c);
      for (int r = 0; r < R; ++r) sum[p][r] += point * x[r];
    }
  }
  for (int p = 0; p < P; ++p)
    for (int r = 0; r < R; ++r) {
      double total = 0;
      for (int lane = 0; lane < kLanes; ++lane) total += sum[p][r][lane];
      out[p * out_stride + r] = total;
    }
}

template <int L>
STS_INLINE void dot64_all(const double* const* points, int num_points, const float* const* rows, int64_t num_rows, int64_t size,
                          double* out, int64_t out_stride) {
  constexpr int kTileRows = L == 16 ? 4 : 2;
  int p = 0;
  for (; p + 4 <= num_points; p += 4) {
    int64_t r = 0;
    for (; r + kTileRows <= num_rows; r += kTileRows)
      dot64_tile<L, 4, kTileRows>(points + p, rows + r, size, out + p * out_stride + r, out_stride);
    for (; r < num_rows; ++r) dot64_tile<L, 4, 1>(points + p, rows + r, size, out + p * out_stride + r, out_stride);
  }
  for (; p < num_points; ++p) {
    int64_t r = 0;
    for (; r + 4 <= num_rows; r += 4) dot64_tile<L, 1, 4>(points + p, rows + r, size, out + p * out_stride + r, out_stride);
    for (; r < num_rows; ++r) dot64_tile<L, 1, 1>(points + p, rows + r, size, out + p * out_stride + r, out_stride);
  }
}

// A register tile of P rows and V vectors of columns, which stays in registers while all terms are subtracted.
template <int L, int P, int V>
STS_INLINE void subtract_tile(double* const* rows, const double* const* factors, const double* terms, int64_t stride, int64_t num_terms,
                              int64_t i) {
  constexpr int kLanes = L / 2;
  Doubles<L> acc[P][V], x[V];
  for (int p = 0; p < P; ++p)
    for (int v = 0; v < V; ++v) load<L>(&acc[p][v], rows[p] + i + v * kLanes);
  for (int64_t t = 0; t < num_terms; ++t) {
    for (int v = 0; v < V; ++v) load<L>(&x[v], terms + t * stride + i + v * kLanes);
    for (int p = 0; p < P; ++p) {
      const Doubles<L> factor = Doubles<L>{} + factors[p][t];
      for (int v = 0; v < V; ++v) acc[p][v] -= factor * x[v];
    }
  }
  for (int p = 0; p < P; ++p)
    for (int v = 0; v < V; ++v) std::memcpy(rows[p] + i + v * kLanes, &acc[p][v], sizeof acc[p][v]);
}

template <int L>
STS_INLINE void subtract_all(double* const* rows, const double* const* factors, int num_rows, const double* terms, int64_t stride,
                             int64_t num_terms, int64_t begin, int64_t end) {
  constexpr int kTileVectors = L == 16 ? 4 : 2, kLanes = L / 2;
  int p = 0;
  for (; p + 4 <= num_rows; p += 4)
    for (int64_t i = begin; i < end; i += kTileVectors * kLanes)
      subtract_tile<L, 4, kTileVectors>(rows + p, factors + p, terms, stride, num_terms, i);
  for (; p < num_rows; ++p)
    for (int64_t i = begin; i < end; i += 4 * kLanes) subtract_tile<L, 1, 4>(rows + p, factors + p, terms, stride, num_terms, i);
}

template <int L>
STS_INLINE Lowest finish_all(double* row, double pivot, double* distance, const float* weight, float* loss, int64_t count) {
  constexpr int kLanes = L / 2;
  Doubles<L> e, d, w;
  for (int64_t i = 0; i < count; i += kLanes) {
    load<L>(&e, row + i);
    load<L>(&d, distance + i);
    load<L>(&w, weight + i);
    e /= pivot;
    d -= e * e;
    d = d < kInSpan ? Doubles<L>{} : d;
    const auto losses = __builtin_convertvector(-(w * d), typename VectorOf<L>::HalfFloat);
    std::memcpy(row + i, &e, sizeof e);
    std::memcpy(distance + i, &d, sizeof d);
    std::memcpy(loss + i, &losses, sizeof losses);
  }
  return lowest_all<L, Repulsion>(nullptr, loss, nullptr, count);
}

}  // namespace

#define STS_CPU_MATH(scalar_t)                                                                                                         \
  STS_PER_ISA(void, to_point, (const scalar_t* row, float* point, int64_t channels), (row, point, channels),                           \
              (to_point_all<L>(row, point, channels)))                                                                                 \
  STS_PER_ISA(void, add_row, (const scalar_t* row, float* point, int64_t channels), (row, point, channels),                            \
              (add_all<L>(row, point, channels)))                                                                                      \
  STS_PER_ISA(bool, all_finite, (const scalar_t* row, int64_t channels), (row, channels), (finite_all<L>(row, channels)))              \
  STS_PER_ISA(void, sqdist,                                                                                                            \
              (const float* const* points, int num_points, const scalar_t* const* rows, int64_t num_rows, const scalar_t* const* next, \
               int64_t num_next, int64_t channels, float* out, int64_t out_stride),                                                    \
              (points, num_points, rows, num_rows, next, num_next, channels, out, out_stride),                                         \
              (pairs_all<SquaredDifference, L>(points, num_points, rows, num_rows, next, num_next, channels, out, out_stride)))
STS_CPU_MATH(float)
STS_CPU_MATH(Half)
STS_CPU_MATH(BFloat16)
#undef STS_CPU_MATH

STS_PER_ISA(void, dot,
            (const float* const* points, int num_points, const float* const* rows, int64_t num_rows, int64_t channels, float* out,
             int64_t out_stride),
            (points, num_points, rows, num_rows, channels, out, out_stride),
            (pairs_all<Product, L>(points, num_points, rows, num_rows, rows, 0, channels, out, out_stride)))
STS_PER_ISA(void, add_weighted, (const float* row, double weight, double* sum, int64_t channels), (row, weight, sum, channels),
            (add_weighted_all<L>(row, weight, sum, channels)))
STS_PER_ISA(void, add_weighted, (const Half* row, double weight, double* sum, int64_t channels), (row, weight, sum, channels),
            (add_weighted_all<L>(row, weight, sum, channels)))
STS_PER_ISA(void, add_weighted, (const BFloat16* row, double weight, double* sum, int64_t channels), (row, weight, sum, channels),
            (add_weighted_all<L>(row, weight, sum, channels)))

#define STS_CPU_RULE(Rule)                                                                                            \
  STS_PER_ISA(void, to_weight, (const Rule& rule, float* sqdist, const float* parameters, int64_t count, float pick), \
              (rule, sqdist, parameters, count, pick), (weight_all<L>(rule, sqdist, parameters, count, pick)))        \
  STS_PER_ISA(Lowest, add_then_lowest, (const Rule& rule, float* potentials, const float* weights, int64_t count),    \
              (rule, potentials, weights, count), (lowest_all<L>(&rule, potentials, weights, count)))
STS_CPU_RULE(Repulsion)
STS_CPU_RULE(Farthest)
STS_CPU_RULE(UnitRows<Farthest>)
#undef STS_CPU_RULE

STS_PER_ISA(bool, to_unit, (float* point, int64_t size), (point, size), (unit_all<L>(point, size)))
// Without a rule, lowest_all only reads the values.
STS_PER_ISA(Lowest, lowest, (const float* values, int64_t count), (values, count),
            (lowest_all<L, Repulsion>(nullptr, const_cast<float*>(values), nullptr, count)))
STS_PER_ISA(float, lowest_sum, (const float* a, const float* b, int64_t count), (a, b, count), (lowest_sum_all<L>(a, b, count)))
STS_PER_ISA(void, dot64,
            (const double* const* points, int num_points, const float* const* rows, int64_t num_rows, int64_t size, double* out,
             int64_t out_stride),
            (points, num_points, rows, num_rows, size, out, out_stride),
            (dot64_all<L>(points, num_points, rows, num_rows, size, out, out_stride)))
STS_PER_ISA(void, subtract_products,
            (double* const* rows, const double* const* factors, int num_rows, const double* terms, int64_t stride, int64_t num_terms,
             int64_t begin, int64_t end),
            (rows, factors, num_rows, terms, stride, num_terms, begin, end),
            (subtract_all<L>(rows, factors, num_rows, terms, stride, num_terms, begin, end)))
STS_PER_ISA(Lowest, finish_row, (double* row, double pivot, double* distance, const float* weight, float* loss, int64_t count),
            (row, pivot, distance, weight, loss, count), (finish_all<L>(row, pivot, distance, weight, loss, count)))

}  // namespace sts::cpu
