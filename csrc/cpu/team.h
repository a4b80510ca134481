// Threads that run the loops of one kernel together.
#pragma once
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <thread>
#include <utility>

#include "common/items.h"

namespace sts::cpu {

// What a thread takes of a loop at a time, at the least: floating-point operations of some 5 microseconds. Of a long loop it takes
// more, so that rows fetched ahead are mostly its own.
constexpr int64_t kPartWork = 1 << 19;

// Between loops the threads stay awake, for a selection has a loop every few tens of microseconds and a sleeping thread takes
// longer than that to wake. Nothing waits for a thread that has not come: whoever is there takes the parts, so a team works with
// any number of threads, one included.
class Team {
 public:
  explicit Team(int64_t members) : members(members) {}
  const int64_t members;

  // What each thread calls, once, with the same body: the first to come runs it, the others help with its loops until it is over.
  template <class Body>
  void join(const Body& body) {
    if (!led_.exchange(true)) {
      struct End {
        std::atomic<bool>& over;
        ~End() { over.store(true, std::memory_order_relaxed); }
      } end{over_};
      return body(*this);
    }
    for (int turns = 0; !over_.load(std::memory_order_relaxed);) {
      if (run_part()) {
        turns = 0;
      } else {
        wait(turns);
      }
    }
  }

  // f(begin, end) over parts of [0, rows), where a row costs about `work` operations; returns when all are done. For
  // the body to call. What f throws, it throws, after the other parts.
  template <class F>
  void for_rows(int64_t rows, int64_t work, const F& f) {
    const int64_t part = std::max({int64_t(1), kPartWork / std::max<int64_t>(1, work), rows / (16 * members)});
    const int64_t parts = ceil_div(rows, part);
    if (members < 2 || parts < 2) return f(int64_t(0), rows);
    loop_ = {[](const void* function, int64_t begin, int64_t end) { (*static_cast<const F*>(function))(begin, end); }, &f, rows, part,
             parts};
    unfinished_.store(parts, std::memory_order_relaxed);
    left_.store(parts, std::memory_order_release);
    while (run_part()) {
    }
    for (int turns = 0; unfinished_.load(std::memory_order_acquire) > 0;) wait(turns);
    if (failed_.exchange(false)) std::rethrow_exception(std::exchange(error_, nullptr));
  }

 private:
  // Takes the next part of the present loop; false if none is left. What it reads of the loop it reads after it
  // has taken a part, and a loop is not replaced before its parts are finished.
  bool run_part() {
    int64_t left = left_.load(std::memory_order_relaxed);
    do {
      if (left == 0) return false;
    } while (!left_.compare_exchange_weak(left, left - 1, std::memory_order_acquire, std::memory_order_relaxed));
    const int64_t begin = (loop_.parts - left) * loop_.part;
    try {
      loop_.run(loop_.function, begin, std::min(begin + loop_.part, loop_.rows));
    } catch (...) {
      if (!failed_.exchange(true)) error_ = std::current_exception();
    }
    unfinished_.fetch_sub(1, std::memory_order_release);
    return true;
  }

  // Some tens of microseconds of spinning, then others may have the processor.
  static void wait(int& turns) {
    if (++turns > 1000) return std::this_thread::yield();
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
  }

  struct Loop {
    void (*run)(const void* function, int64_t begin, int64_t end);
    const void* function;
    int64_t rows, part, parts;
  } loop_{};
  std::exception_ptr error_;
  std::atomic<bool> led_{false}, over_{false}, failed_{false};
  alignas(64) std::atomic<int64_t> left_{0};
  alignas(64) std::atomic<int64_t> unfinished_{0};
};

}  // namespace sts::cpu
