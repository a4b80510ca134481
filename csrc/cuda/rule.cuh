// A selection rule (selection_rule.h) in kernels: what is stored for a pair of tokens, and how potentials compare.
#pragma once
#include "rows.cuh"

namespace sts {

template <class Rule>
constexpr bool kOfDistance = !Rule::kByToken && !Rule::kByPick;

// What stands in a matrix for a pair: the weight, where it depends on the distance alone, else the distance. Infinity is the diagonal's.
template <class Rule>
__device__ __forceinline__ float stored_value(const Rule& rule, float sqdist) {
  if constexpr (kOfDistance<Rule>)
    return rule.weight(sqdist);
  else
    return sqdist == kInfinity ? kNonFinitePotential : sqdist;
}

// The potential of a token after a pick; token, pick: their parameters. Infinity for the pick itself, and where it was infinite before.
template <class Rule>
__device__ __forceinline__ float after_pick(const Rule& rule, float potential, float stored, float token, float pick) {
  if constexpr (kOfDistance<Rule>)
    return Rule::add(potential, stored);
  else
    return stored == kInfinity ? kInfinity : Rule::add(potential, rule.weight(stored, token, pick));
}

// Orders like the potential as an unsigned number. What is added to a token that is none may be a NaN: it comes after infinity, or is +inf.
template <class Rule>
__device__ __forceinline__ uint32_t order_of(float potential) {
  return Rule::kNegative ? ordered_bits(potential) : __float_as_uint(potential);
}

// A token's potential before the first pick. finite: it has no NaN or infinity.
template <class Rule>
__device__ __forceinline__ float first_potential(const Rule& rule, bool finite, float start, float parameter) {
  return finite ? rule.start(start, parameter) : kNonFinitePotential;
}

// The lowest of these is the first pick, where there is no anchor. has_start: `start` was given.
template <class Rule>
__device__ __forceinline__ float first_key(const Rule& rule, float mean_sqdist, float potential, bool has_start, float parameter) {
  if constexpr (Rule::kFromMean)
    return mean_sqdist;
  else
    return has_start || potential == kNonFinitePotential ? potential : rule.start(1.f, parameter);
}

// numbers[first + at[i]] for all i, or `otherwise` where there are none.
template <int kCount>
__device__ __forceinline__ void load_numbers(const float* numbers, int64_t first, const int (&at)[kCount], float otherwise,
                                             float (&out)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) out[i] = otherwise;
  if (!numbers) return;
#pragma unroll
  for (int i = 0; i < kCount; ++i) out[i] = __ldg(numbers + first + at[i]);
}

}  // namespace sts
