#pragma once
#include "cuda/token_stats.cuh"
#include "kernel_table.h"

namespace sts {

template <class scalar_t>
int64_t exact_centre_bits(float low, float high) {
  const scalar_t centre = exact_centre<scalar_t>(low, high);
  uint16_t bits;
  memcpy(&bits, &centre, 2);
  return bits;
}

STS_KERNEL(exact_centre_float16, exact_centre_bits<__half>);
STS_KERNEL(exact_centre_bfloat16, exact_centre_bits<__nv_bfloat16>);

}  // namespace sts
