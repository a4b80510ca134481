// Stacks and the switch between them: a CUDA thread is a fiber, and the fibers of a block share one OS thread.
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

inline thread_local Context* came_from = nullptr;

#if defined(__x86_64__)
// Saves the callee-saved registers on the old stack, and returns on the new one.
__attribute__((naked, noinline)) inline void swap_stacks(void** /*save*/, void* /*load*/) {
  asm volatile(
      "pushq %rbp\n pushq %rbx\n pushq %r12\n pushq %r13\n pushq %r14\n pushq %r15\n"
      "movq %rsp, (%rdi)\n movq %rsi, %rsp\n"
      "popq %r15\n popq %r14\n popq %r13\n popq %r12\n popq %rbx\n popq %rbp\n ret\n");
}
#endif

// To be called first thing on a stack that was switched to.
EMULATOR_NO_TSAN inline void arrived([[maybe_unused]] void* fake_stack) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake_stack, &came_from->stack, &came_from->stack_size);
#endif
}

// `last`: `from` will never be switched to again.
EMULATOR_NO_TSAN inline void switch_context(Context& from, Context& to, [[maybe_unused]] bool last = false) {
  void* fake_stack = nullptr;
  came_from = &from;
#if defined(__SANITIZE_THREAD__)
  __tsan_switch_to_fiber(to.tsan_fiber, 1);  // 1: a switch orders nothing
#endif
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(last ? nullptr : &fake_stack, to.stack, to.stack_size);
#endif
#if defined(__x86_64__)
  swap_stacks(&from.stack_pointer, to.stack_pointer);
#else
  swapcontext(&from.registers, &to.registers);
#endif
  arrived(fake_stack);
}

// The context of the running OS thread, for fibers to switch back to.
inline void adopt_thread([[maybe_unused]] Context& context) {
#if defined(__SANITIZE_THREAD__)
  context.tsan_fiber = __tsan_get_current_fiber();
#endif
}

// Stacks of the fibers of one OS thread, used again from block to block.
class Stacks {
 public:
#if defined(__SANITIZE_ADDRESS__)
  static constexpr size_t kSize = 256 * 1024;
#else
  static constexpr size_t kSize = 64 * 1024;
#endif

  // Makes `context` enter `entry` on stack `index` at the first switch to it.
  void prepare(size_t index, Context& context, void (*entry)()) {
    if (stacks_.size() <= index) stacks_.resize(index + 1);
    auto& stack = stacks_[index];
    if (kRaceChecker || !stack) {  // fresh memory has no past accesses to race with
      stack.reset();
      stack.reset(new char[kSize]);
    }
#if defined(__SANITIZE_ADDRESS__)
    ASAN_UNPOISON_MEMORY_REGION(stack.get(), kSize);
#endif
    context.stack = stack.get();
    context.stack_size = kSize;
    *reinterpret_cast<uint64_t*>(stack.get()) = kCanary;
#if defined(__x86_64__)
    void** top = reinterpret_cast<void**>((reinterpret_cast<uintptr_t>(stack.get()) + kSize) & ~uintptr_t(15));
    *--top = nullptr;
    *--top = reinterpret_cast<void*>(entry);
    for (int callee_saved = 0; callee_saved < 6; ++callee_saved) *--top = nullptr;
    context.stack_pointer = top;
#else
    getcontext(&context.registers);
    context.registers.uc_stack.ss_sp = stack.get();
    context.registers.uc_stack.ss_size = kSize;
    makecontext(&context.registers, entry, 0);
#endif
#if defined(__SANITIZE_THREAD__)
    context.tsan_fiber = __tsan_create_fiber(0);
#endif
  }

  void discard([[maybe_unused]] Context& context) {
#if defined(__SANITIZE_THREAD__)
    __tsan_destroy_fiber(context.tsan_fiber);
#endif
  }

  bool overflowed(size_t index) const { return *reinterpret_cast<const uint64_t*>(stacks_[index].get()) != kCanary; }

 private:
  static constexpr uint64_t kCanary = 0x5afe57ac5afe57acull;
  std::vector<std::unique_ptr<char[]>> stacks_;
};

}  // namespace emulator
