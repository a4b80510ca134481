// Sanitizer annotations: fiber switches, and exclusion of the emulator's own data from the race check.
#pragma once
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
extern "C" void AnnotateIgnoreReadsBegin(const char*, int);
extern "C" void AnnotateIgnoreReadsEnd(const char*, int);
extern "C" void AnnotateIgnoreWritesBegin(const char*, int);
extern "C" void AnnotateIgnoreWritesEnd(const char*, int);
#define EMULATOR_NO_TSAN __attribute__((no_sanitize("thread")))
#else
#define EMULATOR_NO_TSAN
#endif

namespace emulator {

#if defined(__SANITIZE_THREAD__)
constexpr bool kRaceChecker = true;
#else
constexpr bool kRaceChecker = false;
#endif

// A happens-before edge: everything before release(clock) is visible after a later acquire(clock).
inline void release([[maybe_unused]] void* clock) {
#if defined(__SANITIZE_THREAD__)
  __tsan_release(clock);
#endif
}
inline void acquire([[maybe_unused]] void* clock) {
#if defined(__SANITIZE_THREAD__)
  __tsan_acquire(clock);
#endif
}

// During its lifetime the fiber's memory accesses are not race-checked.
class Unchecked {
 public:
  Unchecked() {
#if defined(__SANITIZE_THREAD__)
    AnnotateIgnoreReadsBegin("", 0);
    AnnotateIgnoreWritesBegin("", 0);
#endif
  }
  ~Unchecked() {
#if defined(__SANITIZE_THREAD__)
    AnnotateIgnoreWritesEnd("", 0);
    AnnotateIgnoreReadsEnd("", 0);
#endif
  }
  Unchecked(const Unchecked&) = delete;
};

}  // namespace emulator
