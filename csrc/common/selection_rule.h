// Rules of greedy selection. Every token has a potential. The next pick is the token of the lowest potential; ties go to the lowest index:
//   potential[i] = start(start[i], parameter[i])
//   repeat: j = argmin potential;  potential[i] = add(potential[i], weight(|x_i - x_j|^2, parameter[i], parameter[j]));  potential[j] = inf
// Invariants that the kernels rely on:
//   Potentials never fall, are never NaN and never -0.
//   add(p, w) is monotone in p and w. For `Farthest` and `Suppress` the potentials do not depend on the order of the picks, bit for bit.
//   add(p, w) == p for p = kNonFinitePotential and p = infinity.
// Constants of a rule:
//   kFromMean: the default first pick is the token nearest the mean; if false, the token of the lowest first key (first_key)
//   kByToken: the weight depends on the token's parameter
//   kByPick: the weight depends on the pick's parameter
//   kNegative: potentials may be below 0
// T of weight() and add(): float, or on the host a SIMD vector of floats.
#pragma once
#include <cstdint>

#ifdef __CUDACC__
#define STS_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define STS_HOST_DEVICE inline __attribute__((always_inline))
#endif

namespace sts {

// FLT_MAX, above every other potential. Tokens with a NaN or infinity have it, and are picked after all finite tokens.
constexpr float kNonFinitePotential = 3.402823466e+38f;
constexpr float kInfinity = __builtin_huge_valf();

// 1 / x, correctly rounded, for x >= 2^-126. CUDA's own division branches for values that do not occur here.
template <class T>
STS_HOST_DEVICE T reciprocal(T x) {
#if defined(__CUDACC__) && defined(__CUDA_ARCH__)  // the emulator defines __CUDA_ARCH__ alone
  float guess;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(guess) : "f"(x));
  const float refined = __fmaf_rn(guess, __fmaf_rn(-x, guess, 1.f), guess);
  return x < 0x1p126f ? refined : guess;  // above 2^126 the result is subnormal, which ftz makes 0
#else
  return 1.f / x;
#endif
}

// STS Eq. 4: potential = sum over the picks of 1 / (squared distance + eps). No start, no parameter.
struct Repulsion {
  static constexpr bool kFromMean = true, kByToken = false, kByPick = false, kNegative = false;
  float eps;
  STS_HOST_DEVICE static float start(float = 0.f, float = 0.f) { return 0.f; }
  // A NaN distance comes from a non-finite token, whose weights are 0.
  template <class T>
  STS_HOST_DEVICE T weight(T sqdist, T = {}, float = 0.f) const {
    const T weight = reciprocal(sqdist + eps);  // before the select, so that no pair branches
    return sqdist == sqdist ? weight : T{};
  }
  template <class T>
  STS_HOST_DEVICE static T add(T potential, T weight) {
    return potential + weight;
  }
};

// Farthest-first (max-min): picks the largest quality * min over the picks of the squared distance. The potential is the negative of that.
// start: squared distance to the tokens already kept. parameter: the quality, which start() and weight() multiply in.
struct Farthest {
  static constexpr bool kFromMean = false, kByToken = true, kByPick = false, kNegative = true;
  // A negative or NaN start marks a token already kept. Such tokens, and those of negative or non-finite quality, are picked last.
  STS_HOST_DEVICE static float start(float sqdist, float quality) {
    return sqdist >= 0.f && quality >= 0.f && quality <= kNonFinitePotential ? weight(sqdist, quality) : kNonFinitePotential;
  }
  // A NaN or infinite distance counts as FLT_MAX. The result is never -0.
  template <class T>
  STS_HOST_DEVICE static T weight(T sqdist, T quality, float = 0.f) {
    const T bounded = sqdist < kNonFinitePotential ? sqdist : T{} + kNonFinitePotential, value = bounded * quality;
    return value > 0.f ? -value : T{};
  }
  template <class T>
  STS_HOST_DEVICE static T add(T potential, T weight) {
    return weight > potential ? weight : potential;
  }
};

// Threshold suppression by rank, on unit rows: a pick suppresses the tokens with 1 - cosine < tau, where 1 - cosine is half the squared
// distance. Suppressed tokens are picked after all others, by rank. start: the rank, an integer stored in float32. parameter: tau of the
// pick.
struct Suppress {
  static constexpr bool kFromMean = false, kByToken = false, kByPick = true, kNegative = false;
  static constexpr float kSuppressed = 8388608.f;  // 2^23: above every rank, and rank + 2^23 is exact
  STS_HOST_DEVICE static float start(float rank, float) { return rank >= 0.f && rank < kSuppressed ? 0.f + rank : kNonFinitePotential; }
  template <class T>
  STS_HOST_DEVICE static T weight(T sqdist, T, float tau) {
    return sqdist < 2.f * tau ? T{} + kSuppressed : T{};
  }
  template <class T>
  STS_HOST_DEVICE static T add(T potential, T weight) {
    return potential < kSuppressed ? potential + weight : potential;
  }
};

// A token's potential before the first pick. finite: no channel of the token is NaN or infinite.
template <class Rule>
STS_HOST_DEVICE float first_potential(const Rule& rule, bool finite, float start, float parameter) {
  return finite ? rule.start(start, parameter) : kNonFinitePotential;
}

// The sort key of a token for the first pick, where there is no anchor: the lowest is picked. has_start: the caller gave `start`. Without,
// a distance of 1 stands in for infinity, so that the parameter decides and no product overflows.
template <class Rule>
STS_HOST_DEVICE float first_key(const Rule& rule, float mean_sqdist, float potential, bool has_start, float parameter) {
  if constexpr (Rule::kFromMean)
    return mean_sqdist;
  else
    return has_start || potential == kNonFinitePotential ? potential : rule.start(1.f, parameter);
}

// A rule on unit rows. A zero row must have cosine 0, squared distance 2, to every row. So a zero row i stores zero_row_mark(i) in its
// first channel. Its squared distance to any other row then exceeds 5, which unit rows (at most 4) never do, and counts as 2.
template <class Rule>
struct UnitRows : Rule {
  template <class T>
  STS_HOST_DEVICE T weight(T sqdist, T token, float pick) const {
    return Rule::weight(sqdist > 5.f ? T{} + 2.f : sqdist, token, pick);
  }
};
STS_HOST_DEVICE constexpr float zero_row_mark(int64_t row) { return 16.f * static_cast<float>(row + 1); }  // distinct for up to 2^24 rows

}  // namespace sts
