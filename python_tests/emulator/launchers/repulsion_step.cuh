#pragma once
#include "cuda/repulsion_step.cuh"
#include "kernel_table.h"

namespace sts {

STS_KERNEL(repulsion_step_float32, launch_repulsion_step<float>);
STS_KERNEL(repulsion_step_float16, launch_repulsion_step<__half>);
STS_KERNEL(repulsion_step_bfloat16, launch_repulsion_step<__nv_bfloat16>);

}  // namespace sts
