// Arguments of knn_density, with the checks that its CPU and CUDA kernels share.
#pragma once
#include "torch_glue.h"

namespace sts {

struct KnnArguments {
  static constexpr const char* op = "knn_density";
  Tensor features;
  int64_t k;
  std::optional<Tensor> num_tokens;

  KnnArguments(const Tensor& features_, int64_t k_, const std::optional<Tensor>& num_tokens_)
      : features(checked_features(op, features_, 3)),
        k(k_),
        num_tokens(checked_vector(op, "num_tokens", num_tokens_, features_.size(0), features_)) {
    STD_TORCH_CHECK(k >= 1 && k <= features.size(1), "sts_kernels::knn_density: k must be between 1 and ", features.size(1), ", got ", k);
  }

  // Checks the values of num_tokens. `counts` points to them, in host-readable memory, or is null.
  void check_values(const int64_t* counts) const { check_counts(op, "num_tokens", counts, features.size(0), features.size(1)); }
};

}  // namespace sts
