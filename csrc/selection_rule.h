// What makes a token the next pick, apart from everything else a selection kernel does: potentials start at `start()`, every
// pick adds its `weight` to them, and the smallest potential wins (lowest index among equals). A max-min rule (farthest point
// sampling) would be start() = -infinity, weight(d) = -d, add(p, w) = max(p, w).
#pragma once

#ifdef __CUDACC__
#define STS_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define STS_HOST_DEVICE inline
#endif

namespace sts {

// Above every potential: a token with a NaN or infinity, picked after all finite ones.
constexpr float kLastResort = 3.402823466e+38f;

// STS Eq. 4: the sum of 1 / (squared distance + eps) over the picks.
struct Repulsion {
  float eps;
  STS_HOST_DEVICE static float start() { return 0.f; }
  // A distance that is not a number comes from a token that repels none.
  STS_HOST_DEVICE float weight(float sqdist) const { return sqdist == sqdist ? 1.f / (sqdist + eps) : 0.f; }
  STS_HOST_DEVICE static float add(float potential, float weight) { return potential + weight; }
};

}  // namespace sts
