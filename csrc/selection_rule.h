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

// STS Eq. 4: the sum of 1 / (squared distance + eps) over the picks.
struct Repulsion {
  float eps;
  STS_HOST_DEVICE static float start() { return 0.f; }
  // A distance that is not a number comes from a token that repels none.
  STS_HOST_DEVICE float weight(float sqdist) const { return sqdist == sqdist ? 1.f / (sqdist + eps) : 0.f; }
  STS_HOST_DEVICE static float add(float potential, float weight) { return potential + weight; }
  // Potentials are never negative: their bits order like them. A NaN, which only a weight of no pair can make, comes after infinity.
  STS_HOST_DEVICE static uint32_t order(float potential) { return float_bits(potential); }
};

}  // namespace sts
