// Test of PlanCache (csrc/cuda/plan_cache.h) with many threads. test_cpu_parts.py compiles it with a sanitizer and runs it. Prints
// failures.
#include "cuda/plan_cache.h"

#include <atomic>
#include <cstdio>
#include <thread>
#include <vector>

using sts::DriverQuestion;
using sts::PlanCache;

std::atomic<int> failures{0};

void check(bool good, const char* what) {
  if (!good && ++failures) std::printf("%s\n", what);
}

// 32 questions: bits 0..4 of `number` vary one field each.
DriverQuestion question(int number) {
  static const char kernels[2] = {};
  return {kernels + number % 2, number / 2 % 2, unsigned(number / 4 % 2), size_t(number / 8 % 2), unsigned(number / 16 % 2)};
}

int main() {
  constexpr int kThreads = 8, kQuestions = 32;
  PlanCache cache;
  std::atomic<int> asked[kQuestions] = {}, unknown{0};
  std::atomic<size_t> limit{10};  // the driver's limit: the last value set
  const auto body = [&](int thread) {
    for (int round = 0; round < 200; ++round) {
      const int number = (round + thread * 5) % kQuestions;
      const int answer = cache.answer(question(number), -1, [&](int& out) {
        ++asked[number];
        out = number + 100;
        return true;
      });
      check(answer == number + 100, "the answer to another question");
      const int none = cache.answer({nullptr, 7, 0, 0, 0}, -1, [&](int&) {
        ++unknown;
        return false;
      });
      check(none == -1, "an answer where there is none");
      const size_t bytes = size_t(round * 37 + thread * 11) % 500;
      const int error = cache.raise_limit(&cache, 0, bytes, 10, [&] {
        limit = bytes;
        return 0;
      });
      check(error == 0 && limit >= bytes, "a lower limit overtook a higher one");
    }
  };
  std::vector<std::thread> threads;
  for (int t = 0; t < kThreads; ++t) threads.emplace_back(body, t);
  for (std::thread& thread : threads) thread.join();
  for (const auto& count : asked) check(count >= 1 && count <= kThreads, "a question was asked again");
  check(unknown == kThreads * 200, "a question without an answer was not asked again");

  int sets = 0;
  const auto refuse = [&] { return ++sets, 5; };
  check(cache.raise_limit(&sets, 0, 100, 10, refuse) == 5 && cache.raise_limit(&sets, 0, 100, 10, refuse) == 5 && sets == 2,
        "a limit that was refused counts as set");
  check(cache.raise_limit(&sets, 0, 10, 10, refuse) == 0 && sets == 2, "the limit of every kernel was set");
  check(cache.raise_limit(&cache, 1, 11, 10, refuse) == 5 && sets == 3, "the limit of another device was taken");
  check(&PlanCache::of_process() == &PlanCache::of_process(), "more than one cache");
  return failures != 0;
}
