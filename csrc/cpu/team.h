// A team of threads that runs the parallel loops of one CPU kernel.
#pragma once
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <thread>
#include <utility>

#include "common/items.h"

namespace sts::cpu {

// Min floating-point operations per task, about 5 us. A long loop is cut into about 16 larger tasks per member: a thread prefetches the
// rows that follow, and in a large task it uses most of them itself.
constexpr int64_t kMinTaskFlops = 1 << 19;

// Threads spin between loops: a selection runs a loop every few tens of microseconds, and waking a sleeping thread takes longer.
// Threads that participate take tasks dynamically. No loop waits for a thread that is not there, so one thread is enough.
class WorkerTeam {
 public:
  explicit WorkerTeam(int64_t members) : members(members) {}
  const int64_t members;  // threads expected to participate; sizes the tasks

  // Every thread calls this once, with the same body. The first thread (the leader) runs body(team); the others run tasks of its loops
  // until the body returns or throws.
  template <class Body>
  void participate(const Body& body) {
    if (!has_leader_.exchange(true)) {
      struct End {
        std::atomic<bool>& over;
        ~End() { over.store(true, std::memory_order_relaxed); }
      } end{body_done_};
      return body(*this);
    }
    for (int spins = 0; !body_done_.load(std::memory_order_relaxed);) {
      if (run_task()) {
        spins = 0;
      } else {
        spin_wait(spins);
      }
    }
  }

  // Calls f(begin, end) on tasks that cover [0, rows), and returns when all are done. `flops`: floating-point operations per row.
  // Only the body may call it. If f throws, the other tasks still run, and then one of the exceptions is rethrown.
  template <class F>
  void for_rows(int64_t rows, int64_t flops, const F& f) {
    const int64_t task_rows = std::max({int64_t(1), kMinTaskFlops / std::max<int64_t>(1, flops), rows / (16 * members)});
    const int64_t tasks = ceil_div(rows, task_rows);
    if (members < 2 || tasks < 2) return f(int64_t(0), rows);
    loop_ = {[](const void* function, int64_t begin, int64_t end) { (*static_cast<const F*>(function))(begin, end); }, &f, rows, task_rows,
             tasks};
    unfinished_tasks_.store(tasks, std::memory_order_relaxed);
    waiting_tasks_.store(tasks, std::memory_order_release);
    while (run_task()) {
    }
    for (int spins = 0; unfinished_tasks_.load(std::memory_order_acquire) > 0;) spin_wait(spins);
    if (has_error_.exchange(false)) std::rethrow_exception(std::exchange(error_, nullptr));
  }

 private:
  // Runs the next task of the current loop; false if none is left.
  // Invariant: for_rows replaces loop_ only after all of its tasks have finished. So loop_ may be read once a task is taken: the acquire
  // here pairs with the release of waiting_tasks_ in for_rows.
  bool run_task() {
    int64_t waiting = waiting_tasks_.load(std::memory_order_relaxed);
    do {
      if (waiting == 0) return false;
    } while (!waiting_tasks_.compare_exchange_weak(waiting, waiting - 1, std::memory_order_acquire, std::memory_order_relaxed));
    const int64_t begin = (loop_.tasks - waiting) * loop_.task_rows;
    try {
      loop_.run(loop_.function, begin, std::min(begin + loop_.task_rows, loop_.rows));
    } catch (...) {
      if (!has_error_.exchange(true)) error_ = std::current_exception();
    }
    unfinished_tasks_.fetch_sub(1, std::memory_order_release);
    return true;
  }

  // Pauses for the first 1000 calls, some tens of microseconds; after that yields the CPU to other threads.
  static void spin_wait(int& spins) {
    if (++spins > 1000) return std::this_thread::yield();
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
  }

  struct Loop {
    void (*run)(const void* function, int64_t begin, int64_t end);
    const void* function;
    int64_t rows, task_rows, tasks;
  } loop_{};
  std::exception_ptr error_;
  std::atomic<bool> has_leader_{false}, body_done_{false}, has_error_{false};
  // Cache lines of their own: no false sharing.
  alignas(64) std::atomic<int64_t> waiting_tasks_{0};
  alignas(64) std::atomic<int64_t> unfinished_tasks_{0};
};

}  // namespace sts::cpu
