// A selection rule (selection_rule.h) in kernels: the stored value of a pair of tokens, and the order of potentials.
#pragma once
#include "rows.cuh"

namespace sts {

// Whether the weight of a pair depends on the distance alone.
template <class Rule>
constexpr bool kOfDistance = !Rule::kByToken && !Rule::kByPick;

// An element of the matrix off the diagonal: the weight of the pair (kOfDistance), else the distance. Only the diagonal is infinite: an
// infinite distance is stored as kNonFinitePotential.
template <class Rule>
__device__ __forceinline__ float stored_value(const Rule& rule, float sqdist) {
  if constexpr (kOfDistance<Rule>)
    return rule.weight(sqdist);
  else
    return sqdist == kInfinity ? kNonFinitePotential : sqdist;
}

// The potential of a token after a pick. stored: the matrix element of the token and the pick; token, pick: their parameters.
// Infinite for the pick itself (the diagonal) and for tokens that were picked before.
template <class Rule>
__device__ __forceinline__ float after_pick(const Rule& rule, float potential, float stored, float token, float pick) {
  if constexpr (kOfDistance<Rule>)
    return Rule::add(potential, stored);
  else
    return stored == kInfinity ? kInfinity : Rule::add(potential, rule.weight(stored, token, pick));
}

// The potential as an unsigned number of the same order. Potentials are at least +0 without kNegative, so their bits are ordered as they
// are. Past the end of an item a garbage weight may turn +inf into a NaN: as an unsigned number a NaN of either sign is above +inf. Rules
// with kNegative keep +inf.
template <class Rule>
__device__ __forceinline__ uint32_t order_of(float potential) {
  return Rule::kNegative ? ordered_bits(potential) : __float_as_uint(potential);
}

// The potential of an order_of.
template <class Rule>
__device__ __forceinline__ float from_order(uint32_t order) {
  return Rule::kNegative ? from_ordered_bits(order) : __uint_as_float(order);
}

// out[i] = numbers[first + at[i]], or `otherwise` where `numbers` is null.
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
