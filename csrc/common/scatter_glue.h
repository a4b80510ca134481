// Arguments of scatter_mean, with the checks that its CPU and CUDA kernels share.
#pragma once
#include "torch_glue.h"

namespace sts {

struct ScatterArguments {
  static constexpr const char* op = "scatter_mean";
  Tensor features, assignment;   // assignment: (B, N) int64, the slot of each token, or -1
  std::optional<Tensor> weight;  // (B, N) float32
  int64_t count;                 // slots per item

  ScatterArguments(const Tensor& features_, const Tensor& assignment_, int64_t count_, const std::optional<Tensor>& weight_)
      : features(checked_features(op, features_, 3)),
        assignment(checked_per_token(op, "assignment", assignment_, Accepts::kIndex, ScalarType::Long, features)),
        count(count_) {
    STD_TORCH_CHECK(count >= 1 && count < (int64_t(1) << 31), "sts_kernels::scatter_mean: count must be between 1 and 2^31 - 1, got ",
                    count);
    if (weight_) weight = checked_per_token(op, "weight", *weight_, Accepts::kFloating, ScalarType::Float, features);
  }

  const int64_t* slots() const { return static_cast<const int64_t*>(assignment.const_data_ptr()); }
  const float* weights() const { return weight ? static_cast<const float*>(weight->const_data_ptr()) : nullptr; }

  // Checks the values of `assignment`. `slots` points to them, in host-readable memory.
  void check_values(const int64_t* slots) const {
    for (int64_t i = 0; i < features.size(0) * features.size(1); ++i)
      STD_TORCH_CHECK(slots[i] >= -1 && slots[i] < count, "sts_kernels::scatter_mean: assignment must be between -1 and ", count - 1,
                      ", got ", slots[i]);
  }
};

}  // namespace sts
