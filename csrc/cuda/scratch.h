// Scratch memory of a launch, from torch's allocator.
#pragma once
#include "common/torch_glue.h"

namespace sts {

// One allocation for all arrays of a launch, each aligned to 256 bytes. The constructor calls layout(allocate) with an `allocate` that only
// measures. Then operator() hands out the arrays; they must be requested in the same order.
class ScratchMemory {
 public:
  template <class Layout>
  ScratchMemory(const Tensor& like, const Layout& layout) : tensor_(new_tensor(like, {measure(layout)}, aoti_torch_dtype_uint8())) {
    next_ = static_cast<char*>(tensor_.mutable_data_ptr());
  }
  void* operator()(int64_t bytes) {
    char* part = next_;
    next_ += padded(bytes);
    return part;
  }

 private:
  static int64_t padded(int64_t bytes) { return ceil_div(bytes, 256) * 256; }
  template <class Layout>
  static int64_t measure(const Layout& layout) {
    int64_t total = 0;
    layout([&](int64_t bytes) -> void* {
      total += padded(bytes);
      return nullptr;
    });
    return total;
  }

  Tensor tensor_;
  char* next_ = nullptr;
};

}  // namespace sts
