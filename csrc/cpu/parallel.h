// The CPU kernels on torch's threads.
#pragma once
#include <algorithm>

#include "common/torch_glue.h"
#include "team.h"

namespace sts::cpu {

// Min floating-point operations per thread, about 60 us. Below that, waking a thread costs more than it saves.
constexpr int64_t kMinThreadFlops = 6 << 20;

// Calls body(team) once. `flops`: approximate floating-point operations of all its loops together.
template <class Body>
void with_team(int64_t flops, const Body& body) {
  WorkerTeam team(std::max<int64_t>(1, std::min<int64_t>(torch::stable::get_num_threads(), flops / kMinThreadFlops)));
  if (team.members < 2) return body(team);
  torch::stable::parallel_for(0, team.members, 1, [&](int64_t, int64_t) { team.participate(body); });
}

// Calls run(team, begin, end) for all items: whole items per thread if there are enough items; else the team shares each item.
template <class Run>
void for_items(int64_t items, int64_t item_flops, const Run& run) {
  with_team(items * item_flops, [&](WorkerTeam& team) {
    if (items < team.members) return run(team, int64_t(0), items);
    team.for_rows(items, item_flops, [&](int64_t begin, int64_t end) {
      WorkerTeam alone(1);
      run(alone, begin, end);
    });
  });
}

// dispatch_floating with torch's 16-bit types.
template <class F>
void dispatch(ScalarType type, F&& f) {
  dispatch_floating<torch::headeronly::Half, torch::headeronly::BFloat16>(type, f);
}

}  // namespace sts::cpu
