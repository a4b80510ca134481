#pragma once
#include "cuda/knn_density.cuh"
#include "kernel_table.h"

namespace sts {

STS_KERNEL(knn_density_float32, launch_knn_density<float>);
STS_KERNEL(knn_density_float16, launch_knn_density<__half>);
STS_KERNEL(knn_density_bfloat16, launch_knn_density<__nv_bfloat16>);

}  // namespace sts
