#pragma once
#include "cuda/scatter_mean.cuh"
#include "kernel_table.h"

namespace sts {

STS_KERNEL(scatter_mean_float32, launch_scatter_mean<float>);
STS_KERNEL(scatter_mean_float16, launch_scatter_mean<__half>);
STS_KERNEL(scatter_mean_bfloat16, launch_scatter_mean<__nv_bfloat16>);

}  // namespace sts
