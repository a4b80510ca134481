// Fibers and the switch between them: a CUDA thread runs on a fiber, and the fibers of a block share one OS thread.
#pragma once
#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>
#if !defined(__x86_64__)
#include <ucontext.h>
#endif
#include "sanitizers.h"

namespace emulator {

struct Context {
#if defined(__x86_64__)
  void* stack_pointer = nullptr;
#else
  ucontext_t registers;
#endif
  void* tsan_fiber = nullptr;
  const void* stack = nullptr;
  size_t stack_size = 0;
};

inline thread_local Context* previous_context = nullptr;

#if defined(__x86_64__)
// Saves the callee-saved registers on the old stack, and returns on the new one.
__attribute__((naked, noinline)) inline void swap_stacks(void** /*save*/, void* /*load*/) {
  asm volatile(
      "pushq %rbp\n pushq %rbx\n pushq %r12\n pushq %r13\n pushq %r14\n pushq %r15\n"
      "movq %rsp, (%rdi)\n movq %rsi, %rsp\n"
      "popq %r15\n popq %r14\n popq %r13\n popq %r12\n popq %rbx\n popq %rbp\n ret\n");
}
#endif

// The first call on a stack that was switched to. Neither this nor the callers of switch_context are inlined: a fiber may continue on
// another OS thread, so no address of a thread-local variable may be kept across the switch.
EMULATOR_NO_TSAN __attribute__((noinline)) inline void finish_switch([[maybe_unused]] void* fake_stack) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake_stack, &previous_context->stack, &previous_context->stack_size);
#endif
}

EMULATOR_NO_TSAN inline void switch_context(Context& from, Context& to) {
  void* fake_stack = nullptr;
  previous_context = &from;
#if defined(__SANITIZE_THREAD__)
  __tsan_switch_to_fiber(to.tsan_fiber, 1);  // 1: a switch orders nothing
#endif
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&fake_stack, to.stack, to.stack_size);
#endif
#if defined(__x86_64__)
  swap_stacks(&from.stack_pointer, to.stack_pointer);
#else
  swapcontext(&from.registers, &to.registers);
#endif
  finish_switch(fake_stack);
}

// The context of the running OS thread, for fibers to switch back to.
inline void adopt_thread([[maybe_unused]] Context& context) {
#if defined(__SANITIZE_THREAD__)
  context.tsan_fiber = __tsan_get_current_fiber();
#endif
}

// A context with a stack of its own. `entry` never returns.
class Fiber {
 public:
#if defined(__SANITIZE_ADDRESS__)
  static constexpr size_t kStack = 256 * 1024;
#else
  static constexpr size_t kStack = 64 * 1024;
#endif

  explicit Fiber(void (*entry)()) : stack_(new char[kStack]) {
    *reinterpret_cast<uint64_t*>(stack_.get()) = kCanary;
    context.stack = stack_.get();
    context.stack_size = kStack;
#if defined(__x86_64__)
    void** top = reinterpret_cast<void**>((reinterpret_cast<uintptr_t>(stack_.get()) + kStack) & ~uintptr_t(15));
    *--top = nullptr;
    *--top = reinterpret_cast<void*>(entry);
    for (int callee_saved = 0; callee_saved < 6; ++callee_saved) *--top = nullptr;
    context.stack_pointer = top;
#else
    getcontext(&context.registers);
    context.registers.uc_stack.ss_sp = stack_.get();
    context.registers.uc_stack.ss_size = kStack;
    makecontext(&context.registers, entry, 0);
#endif
#if defined(__SANITIZE_THREAD__)
    context.tsan_fiber = __tsan_create_fiber(0);
#endif
  }

  bool overflowed() const { return *reinterpret_cast<const uint64_t*>(stack_.get()) != kCanary; }

  Context context;

 private:
  static constexpr uint64_t kCanary = 0x5afe57ac5afe57acull;
  std::unique_ptr<char[]> stack_;
};
using Fibers = std::vector<std::unique_ptr<Fiber>>;

}  // namespace emulator
