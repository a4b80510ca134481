// Arguments of nearest, with the checks that its CPU and CUDA kernels share.
#pragma once
#include <string>

#include "torch_glue.h"

namespace sts {

// Whether both are one view of the same memory.
inline bool same_view(const Tensor& a, const Tensor& b) {
  if (a.const_data_ptr() != b.const_data_ptr() || a.scalar_type() != b.scalar_type() || a.dim() != b.dim()) return false;
  for (int64_t d = 0; d < a.dim(); ++d)
    if (a.size(d) != b.size(d) || a.stride(d) != b.stride(d)) return false;
  return true;
}

struct NearestArguments {
  static constexpr const char* op = "nearest";
  bool same;  // query and key are one view of the same memory
  Tensor query, key;
  bool cosine, exclude_self;
  std::optional<Tensor> query_rank, key_rank, num_keys;  // query_rank (B, Q), key_rank (B, K): float64

  NearestArguments(const Tensor& query_, const Tensor& key_, const std::string& metric, const std::optional<Tensor>& query_rank_,
                   const std::optional<Tensor>& key_rank_, bool exclude_self_, const std::optional<Tensor>& num_keys_)
      : same(same_view(query_, key_)),
        query(checked_features(op, query_, 3)),
        key(same ? query : checked_features(op, key_, 3)),  // one copy of both, if one is made
        cosine(metric == "cosine"),
        exclude_self(exclude_self_) {
    STD_TORCH_CHECK(
        key.scalar_type() == query.scalar_type() && key.size(0) == query.size(0) && key.size(2) == query.size(2) && same_device(key, query),
        "sts_kernels::nearest: key must have the dtype, batch, channels and device of query");
    STD_TORCH_CHECK(cosine || metric == "euclidean", "sts_kernels::nearest: metric must be cosine or euclidean, got ", metric.c_str());
    STD_TORCH_CHECK(query_rank_.has_value() == key_rank_.has_value(), "sts_kernels::nearest: query_rank and key_rank come together");
    if (query_rank_) {
      query_rank = checked_per_token(op, "query_rank", *query_rank_, Accepts::kNumber, ScalarType::Double, query);
      key_rank = checked_per_token(op, "key_rank", *key_rank_, Accepts::kNumber, ScalarType::Double, key);
    }
    num_keys = checked_vector(op, "num_keys", num_keys_, query.size(0), query);
  }

  const double* query_ranks() const { return query_rank ? static_cast<const double*>(query_rank->const_data_ptr()) : nullptr; }
  const double* key_ranks() const { return key_rank ? static_cast<const double*>(key_rank->const_data_ptr()) : nullptr; }

  // Checks the values of num_keys. `counts` points to them, in host-readable memory, or is null.
  void check_values(const int64_t* counts) const { check_counts(op, "num_keys", counts, key.size(0), key.size(1)); }
};

}  // namespace sts
