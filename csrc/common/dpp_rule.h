// A constant that dpp_select's CPU and CUDA kernels share.
#pragma once

namespace sts {

// Squared distances of a unit row to the span of the picks count as 0 below this: unit rows are rounded to float32. Also in
// dpp_select.py.
constexpr double kInSpan = 1e-10;

}  // namespace sts
