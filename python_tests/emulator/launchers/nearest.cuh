#pragma once
#include "cuda/nearest.cuh"
#include "kernel_table.h"

namespace sts {

STS_KERNEL(nearest_float32, launch_nearest<float>);
STS_KERNEL(nearest_float16, launch_nearest<__half>);
STS_KERNEL(nearest_bfloat16, launch_nearest<__nv_bfloat16>);

}  // namespace sts
