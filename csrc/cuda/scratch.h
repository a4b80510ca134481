// The scratch memory of a launch: one allocation for all its arrays, each aligned to 256 bytes.
//
// What: a layout is a function layout(allocate) that requests every array by allocate(bytes). It is called twice: scratch_bytes measures
//   it, then it gets the arrays of ScratchArrays. Both calls must request the same arrays, in the same order.
#pragma once
#include <cstdint>
#include <stdexcept>

namespace sts {

// Bytes that an array takes.
inline int64_t scratch_array_bytes(int64_t bytes) { return (bytes + 255) / 256 * 256; }

// Bytes of all arrays. While a layout is measured, arrays have an address that is not null and must not be used: a layout that tests its
// arrays requests the same ones as later.
template <class Layout>
int64_t scratch_bytes(const Layout& layout) {
  static char unused;
  int64_t total = 0;
  layout([&](int64_t bytes) -> void* {
    total += scratch_array_bytes(bytes);
    return &unused;
  });
  return total;
}

// Hands out the arrays of a layout, from memory of scratch_bytes(layout).
class ScratchArrays {
 public:
  ScratchArrays(void* memory, int64_t bytes) : next_(static_cast<char*>(memory)), left_(bytes) {}
  void* operator()(int64_t bytes) {
    left_ -= scratch_array_bytes(bytes);
    if (left_ < 0) throw std::logic_error("sts_kernels: a launch requests more scratch memory than it measured");
    char* const array = next_;
    next_ += scratch_array_bytes(bytes);
    return array;
  }

 private:
  char* next_;
  int64_t left_;
};

// array = `count` elements from allocate(bytes); null if count is 0.
template <class T, class Allocate>
void take_array(T*& array, int64_t count, Allocate&& allocate) {
  array = count ? static_cast<T*>(allocate(count * static_cast<int64_t>(sizeof(T)))) : nullptr;
}

}  // namespace sts
