// Test of WorkerTeam (csrc/cpu/team.h). test_cpu_parts.py compiles it with a sanitizer and runs it. Prints failures.
#include "cpu/team.h"

#include <cstdio>
#include <stdexcept>
#include <vector>

using sts::cpu::kMinTaskFlops;
using sts::cpu::WorkerTeam;

int failures = 0;

void check(bool good, const char* what) {
  if (!good && ++failures) std::printf("%s\n", what);
}

// Runs short loops one after another; each reads what the previous loop wrote. Every row must run exactly once, on any thread.
void body(WorkerTeam& team, int* entered) {
  ++*entered;
  std::vector<int64_t> rows(1000);
  for (int round = 1; round <= 200; ++round) {
    const int64_t count = round * 37 % 1000, flops = kMinTaskFlops / (1 + round % 50);
    team.for_rows(count, flops, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) ++rows[i];
    });
    for (int64_t i = 0; i < 1000; ++i) check(rows[i] == (i < count), "a row was run twice, or not at all");
    team.for_rows(count, kMinTaskFlops, [&](int64_t begin, int64_t end) { std::fill(rows.begin() + begin, rows.begin() + end, 0); });
  }
  for (int round = 0; round < 20; ++round) {
    bool thrown = false;
    try {
      team.for_rows(100, kMinTaskFlops, [&](int64_t begin, int64_t end) {
        if (begin <= 5 * round && 5 * round < end) throw std::runtime_error("on purpose");
      });
    } catch (const std::runtime_error&) {
      thrown = true;
    }
    check(thrown, "an exception was lost");
    std::atomic<int64_t> sum{0};
    team.for_rows(100, kMinTaskFlops, [&](int64_t begin, int64_t end) { sum += end - begin; });
    check(sum == 100, "a loop after an exception was cut short");
  }
}

int main() {
  for (int threads : {1, 2, 3, 8}) {
    for (int leader_first = 0; leader_first < 2; ++leader_first) {  // 1: the leader may finish before the others participate
      WorkerTeam team(threads);
      int entered = 0;
      std::vector<std::thread> others;
      const auto participate = [&] { team.participate([&](WorkerTeam& t) { body(t, &entered); }); };
      if (leader_first) participate();
      for (int t = 1; t < threads; ++t) others.emplace_back(participate);
      if (!leader_first) participate();
      for (std::thread& other : others) other.join();
      check(entered == 1, "the body did not run once");
    }
  }
  return failures != 0;
}
