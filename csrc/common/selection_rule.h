// Rules of greedy selection. Every token i has a potential, and the smallest potential is picked next, the lowest index among equals:
//   potential[i] = start(start[i], parameter[i])
//   repeat: j = argmin potential;  potential[i] = add(potential[i], weight(|x_i - x_j|^2, parameter[i], parameter[j]));  potential[j] = inf
// Invariants that the kernels rely on:
//   potentials never fall, are never NaN and never -0
//   add(p, w) is monotone in p and w, and the order of the picks does not change a bit of `Farthest` and `Suppress`
//   kNonFinitePotential and infinity keep their value, whatever is added
// Constants of a rule:
//   kFromMean: the default first pick is the token nearest the mean; else the smallest potential
//   kByToken, kByPick: the weight depends on the parameter of the token, of the pick
//   kNegative: potentials may be below 0
// A rule's functions take a float, or on the host a vector of them, T.
#pragma once
#include <cstdint>

#ifdef __CUDACC__
#define STS_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define STS_HOST_DEVICE inline __attribute__((always_inline))
#endif

namespace sts {

// Above every potential: a token with a NaN or infinity, picked after all finite ones.
constexpr float kNonFinitePotential = 3.402823466e+38f;

// 1 / x, correctly rounded, for x of at least 2^-126. CUDA's own division branches for values that do not occur here.
template <class T>
STS_HOST_DEVICE T reciprocal(T x) {
#if defined(__CUDACC__) && defined(__CUDA_ARCH__)  // the emulator defines the latter alone
  float guess;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(guess) : "f"(x));
  const float refined = __fmaf_rn(guess, __fmaf_rn(-x, guess, 1.f), guess);
  return x < 0x1p126f ? refined : guess;  // above, the result is a subnormal number, and counts as 0
#else
  return 1.f / x;
#endif
}

// STS Eq. 4: the sum of 1 / (squared distance + eps) over the picks. No start, no parameter.
struct Repulsion {
  static constexpr bool kFromMean = true, kByToken = false, kByPick = false, kNegative = false;
  float eps;
  STS_HOST_DEVICE static float start(float = 0.f, float = 0.f) { return 0.f; }
  // A distance that is not a number comes from a token that repels none.
  template <class T>
  STS_HOST_DEVICE T weight(T sqdist, T = {}, float = 0.f) const {
    const T weight = reciprocal(sqdist + eps);  // before the choice: no branch a pair
    return sqdist == sqdist ? weight : T{};
  }
  template <class T>
  STS_HOST_DEVICE static T add(T potential, T weight) {
    return potential + weight;
  }
};

// Max-min: the largest quality * (smallest squared distance to a pick). The potential is its negative, so quality is folded into
// start and weight. start: the squared distance to what is kept already. parameter: the quality.
struct Farthest {
  static constexpr bool kFromMean = false, kByToken = true, kByPick = false, kNegative = true;
  // A negative or NaN start is a token that is kept already. A quality must be finite and at least 0.
  STS_HOST_DEVICE static float start(float sqdist, float quality) {
    return sqdist >= 0.f && quality >= 0.f && quality <= kNonFinitePotential ? weight(sqdist, quality) : kNonFinitePotential;
  }
  // A distance that is not a number, or beyond float32's range, is the largest there is.
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

// Threshold suppression by rank, on rows of length 1: a pick suppresses the tokens with 1 - cosine < tau, which is half the squared
// distance. Suppressed tokens come after all others, by rank. start: the rank, an integer of float32. parameter: tau, of the pick.
struct Suppress {
  static constexpr bool kFromMean = false, kByToken = false, kByPick = true, kNegative = false;
  static constexpr float kSuppressed = 8388608.f;  // 2^23: above every rank, and the sum of both is exact
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

// A rule on rows of length 1. A row of zeros has cosine 0, and squared distance 2, to every row: such a row i holds zero_row_mark(i) in its
// first channel, which puts it further from every other row than 4.
template <class Rule>
struct UnitRows : Rule {
  template <class T>
  STS_HOST_DEVICE T weight(T sqdist, T token, float pick) const {
    return Rule::weight(sqdist > 5.f ? T{} + 2.f : sqdist, token, pick);
  }
};
STS_HOST_DEVICE constexpr float zero_row_mark(int64_t row) { return 16.f * static_cast<float>(row + 1); }  // distinct up to 2^24 rows

}  // namespace sts
