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
        quality(checked_per_token("dpp_select", "quality", quality_, Accepts::kFloating, ScalarType::Float, features)),
        num_tokens(checked_vector("dpp_select", "num_tokens", num_tokens_, features.size(0), features)),
        k(k_),
        floor(static_cast<float>(floor_)) {
    STD_TORCH_CHECK(k >= 1 && k <= features.size(1), "sts_kernels::dpp_select: k must be between 1 and ", features.size(1), ", got ", k);
    STD_TORCH_CHECK(floor_ >= 0 && floor_ <= 1, "sts_kernels::dpp_select: floor must be between 0 and 1, got ", floor_);
  }

  // Checks the values of num_tokens. `counts` points to them, in host-readable memory, or is null.
  void check_values(const int64_t* counts) const { check_counts("dpp_select", "num_tokens", counts, features.size(0), features.size(1)); }
};

}  // namespace sts
