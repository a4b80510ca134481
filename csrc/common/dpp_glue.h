// Arguments of dpp_select, with the checks that its CPU and CUDA kernels share.
#pragma once
#include "torch_glue.h"

namespace sts {

struct DppArguments {
  Tensor features, quality;  // quality: (B, N) float32, contiguous
  std::optional<Tensor> num_tokens;
  int64_t k;
  float floor;

  DppArguments(const Tensor& features_, const Tensor& quality_, int64_t k_, double floor_, const std::optional<Tensor>& num_tokens_)
      : features(checked_features("dpp_select", features_, 3)),
        quality(checked_quality(quality_, features)),
        num_tokens(checked_vector("dpp_select", "num_tokens", num_tokens_, features.size(0), features)),
        k(k_),
        floor(static_cast<float>(floor_)) {
    STD_TORCH_CHECK(k >= 1 && k <= features.size(1), "sts_kernels::dpp_select: k must be between 1 and ", features.size(1), ", got ", k);
    STD_TORCH_CHECK(floor_ >= 0 && floor_ <= 1, "sts_kernels::dpp_select: floor must be between 0 and 1, got ", floor_);
  }

  // Checks the values of num_tokens. `counts` points to them, in host-readable memory, or is null.
  void check_values(const int64_t* counts) const {
    for (int64_t b = 0; counts && b < features.size(0); ++b)
      STD_TORCH_CHECK(counts[b] >= 0 && counts[b] <= features.size(1), "sts_kernels::dpp_select: num_tokens[", b,
                      "] must be between 0 and ", features.size(1), ", got ", counts[b]);
  }

 private:
  static Tensor checked_quality(const Tensor& quality, const Tensor& features) {
    const ScalarType type = quality.scalar_type();
    STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Half || type == ScalarType::BFloat16,
                    "sts_kernels::dpp_select: quality must be float32, float16 or bfloat16");
    STD_TORCH_CHECK(quality.dim() == 2 && quality.size(0) == features.size(0) && quality.size(1) == features.size(1),
                    "sts_kernels::dpp_select: quality must have shape (", features.size(0), ", ", features.size(1), ")");
    STD_TORCH_CHECK(quality.is_cuda() == features.is_cuda() && quality.get_device_index() == features.get_device_index(),
                    "sts_kernels::dpp_select: quality must be on the device of features");
    const Tensor wide = type == ScalarType::Float ? quality : torch::stable::to(quality, ScalarType::Float);
    return wide.is_contiguous() ? wide : torch::stable::contiguous(wide);
  }
};

}  // namespace sts
