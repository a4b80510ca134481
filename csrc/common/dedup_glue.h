// Arguments of dedup_select, with the checks that its CPU and CUDA kernels share.
#pragma once
#include "torch_glue.h"

namespace sts {

struct DedupArguments {
  static constexpr int64_t kMaxListed = 8192;  // max tokens per item: their float32 distance matrix is 256 MiB. Also in dedup_select.py.

  Tensor features, order;  // order: (B, R) int64, contiguous
  int64_t keep, step;

  DedupArguments(const Tensor& features_, const Tensor& order_, int64_t keep_, int64_t step_)
      : features(checked_features("dedup_select", features_, 3)), order(checked_order(order_, features)), keep(keep_), step(step_) {
    STD_TORCH_CHECK(keep >= 1 && keep <= order.size(1), "sts_kernels::dedup_select: keep must be between 1 and ", order.size(1), ", got ",
                    keep);
    STD_TORCH_CHECK(step >= 1, "sts_kernels::dedup_select: step must be at least 1, got ", step);
  }

  // Checks the values of `order`. `listed` points to them, in host-readable memory.
  void check_values(const int64_t* listed) const {
    const int64_t length = order.size(1), tokens = features.size(1);
    for (int64_t i = 0; i < order.size(0) * length; ++i)
      STD_TORCH_CHECK(listed[i] >= -1 && listed[i] < tokens, "sts_kernels::dedup_select: order[", i / length, ", ", i % length,
                      "] must be between -1 and ", tokens - 1, ", got ", listed[i]);
  }

 private:
  static Tensor checked_order(const Tensor& order, const Tensor& features) {
    check_type("dedup_select", "order", order, Accepts::kIndex);
    STD_TORCH_CHECK(order.dim() == 2 && order.size(0) == features.size(0), "sts_kernels::dedup_select: order must have shape (",
                    features.size(0), ", R)");
    STD_TORCH_CHECK(order.size(1) >= 1 && order.size(1) <= kMaxListed, "sts_kernels::dedup_select: order must list 1 to ", kMaxListed,
                    " tokens an item, got ", order.size(1));
    check_device("dedup_select", "order", order, features);
    return contiguous_as(order, ScalarType::Long);
  }
};

}  // namespace sts
