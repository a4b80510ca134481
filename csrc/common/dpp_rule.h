// What dpp_select's CPU and CUDA kernels share.
#pragma once

namespace sts {

// Squared distance of a unit row to the span of the picks, below which it counts as 0: unit rows are rounded to float32. Also in
// dpp_select.py.
constexpr double kInSpan = 1e-10;

}  // namespace sts
