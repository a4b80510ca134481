// How the CPU kernels spread rows over torch's threads.
#pragma once
#include <algorithm>

#include "torch_glue.h"

namespace sts::cpu {

// f(begin, end) over parts of [0, rows), where a row costs about `work` floating-point operations. A part is at least some 60
// microseconds of work: waking a thread that sleeps takes nearly as long.
template <class F>
void for_rows(int64_t rows, int64_t work, const F& f) {
  const int64_t grain = std::max<int64_t>(1, (6 << 20) / std::max<int64_t>(1, work));
  if (rows < 2 * grain) return f(int64_t(0), rows);
  torch::stable::parallel_for(0, rows, grain, f);
}

template <class F>
void dispatch(ScalarType type, F&& f) {
  dispatch_floating<torch::headeronly::Half, torch::headeronly::BFloat16>(type, f);
}

}  // namespace sts::cpu
