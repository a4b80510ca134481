// How the CPU kernels use torch's threads.
#pragma once
#include <algorithm>

#include "common/torch_glue.h"
#include "team.h"

namespace sts::cpu {

// Floating-point operations that take some 60 microseconds: for less, waking a thread costs more than it saves.
constexpr int64_t kWakeWork = 6 << 20;

// body(team), once, where `work` is about how many operations its loops cost together.
template <class Body>
void with_team(int64_t work, const Body& body) {
  Team team(std::max<int64_t>(1, std::min<int64_t>(torch::stable::get_num_threads(), work / kWakeWork)));
  if (team.members < 2) return body(team);
  torch::stable::parallel_for(0, team.members, 1, [&](int64_t, int64_t) { team.join(body); });
}

template <class F>
void dispatch(ScalarType type, F&& f) {
  dispatch_floating<torch::headeronly::Half, torch::headeronly::BFloat16>(type, f);
}

}  // namespace sts::cpu
