// What dpp_select's CPU and CUDA kernels share.
#pragma once

namespace sts {

// Squared distance of a unit row to the span of the picks, below which it counts as 0: float32 resolves no less. Also in dpp_select.py.
constexpr float kInSpan = 1e-6f;

}  // namespace sts
