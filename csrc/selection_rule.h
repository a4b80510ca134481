// What makes a token the next pick, apart from everything else a selection kernel does: potentials start at `start()`, every
// pick adds its `weight` to them, and the smallest potential wins (lowest index among equals). A max-min rule (farthest point
// sampling) would be start() = -infinity, weight(d) = -d, add(p, w) = max(p, w).
#pragma once
#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define STS_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define STS_HOST_DEVICE inline
#endif

namespace sts {

STS_HOST_DEVICE uint32_t float_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  return bits;
}

// Above every potential: a token with a NaN or infinity, picked after all finite ones.
constexpr float kLastResort = 3.402823466e+38f;

// 1 / x, correctly rounded, for x of at least 2^-126. CUDA's own division branches for values that do not occur here.
STS_HOST_DEVICE float reciprocal(float x) {
#ifdef __CUDA_ARCH__
  float guess;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(guess) : "f"(x));
  const float refined = __fmaf_rn(guess, __fmaf_rn(-x, guess, 1.f), guess);
  return x < 0x1p126f ? refined : guess;  // above, the result is a subnormal number, and counts as 0
#else
  return 1.f / x;
#endif
}

// STS Eq. 4: the sum of 1 / (squared distance + eps) over the picks.
struct Repulsion {
  float eps;
  STS_HOST_DEVICE static float start() { return 0.f; }
  // A distance that is not a number comes from a token that repels none.
  STS_HOST_DEVICE float weight(float sqdist) const { return sqdist == sqdist ? reciprocal(sqdist + eps) : 0.f; }
  STS_HOST_DEVICE static float add(float potential, float weight) { return potential + weight; }
  // Potentials are never negative: their bits order like them. A NaN, which only a weight of no pair can make, comes after infinity.
  STS_HOST_DEVICE static uint32_t order(float potential) { return float_bits(potential); }
};

}  // namespace sts
