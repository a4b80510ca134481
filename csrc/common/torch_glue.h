// Between torch's stable C ABI and the kernels: argument checks, layouts, dtypes. These checks protect memory; the Python checks come first
// and explain errors to users.
#pragma once
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <numeric>
#include <optional>
#include <string>
#include <utility>

#include "items.h"

// The ops are torch.ops.<STS_NAMESPACE>.*. Copies of the package with different namespaces can be loaded into one process.
#ifndef STS_NAMESPACE
#define STS_NAMESPACE sts_kernels
#endif

namespace sts {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Element types that an argument may have.
enum class Accepts { kFloating, kIndex, kNumber };

inline void check_type(const char* op, const char* name, const Tensor& value, Accepts accepts) {
  const ScalarType type = value.scalar_type();
  const bool floating = type == ScalarType::Float || type == ScalarType::Half || type == ScalarType::BFloat16;
  const bool index = type == ScalarType::Long || type == ScalarType::Int;
  const bool accepted = accepts == Accepts::kFloating ? floating
                        : accepts == Accepts::kIndex  ? index
                                                      : floating || index || type == ScalarType::Double;
  STD_TORCH_CHECK(accepted, "sts_kernels::", op, ": ", name, " must be ",
                  accepts == Accepts::kFloating ? "float32, float16 or bfloat16"
                  : accepts == Accepts::kIndex  ? "int64 or int32"
                                                : "an integer or floating-point tensor");
}

inline bool same_device(const Tensor& a, const Tensor& b) {
  return a.is_cuda() == b.is_cuda() && a.get_device_index() == b.get_device_index();
}

inline void check_device(const char* op, const char* name, const Tensor& value, const Tensor& features) {
  STD_TORCH_CHECK(same_device(value, features), "sts_kernels::", op, ": ", name, " must be on the device of features");
}

// `value` contiguous and as `type`; copied only if needed.
inline Tensor contiguous_as(const Tensor& value, ScalarType type) {
  const Tensor converted = value.scalar_type() == type ? value : torch::stable::to(value, type);
  return converted.is_contiguous() ? converted : torch::stable::contiguous(converted);
}

// Features (B, N, C), dim = 3, or packed (T, C), dim = 2, where T may be 0. Returned with contiguous channels; copied only if they are not
// contiguous.
inline Tensor checked_features(const char* op, const Tensor& features, int64_t dim) {
  STD_TORCH_CHECK(features.dim() == dim, "sts_kernels::", op, ": features must have ", dim, " dimensions, got ", features.dim());
  check_type(op, "features", features, Accepts::kFloating);
  STD_TORCH_CHECK((dim == 2 || features.size(dim - 2) > 0) && features.size(dim - 1) > 0, "sts_kernels::", op,
                  ": features must have at least one ", dim == 2 ? "channel" : "token and one channel");
  STD_TORCH_CHECK(features.size(dim - 1) < (1 << 30) && features.size(dim - 2) < (int64_t(1) << 31) - 1, "sts_kernels::", op,
                  ": features must have fewer than 2^30 channels and 2^31 tokens");
  return features.stride(dim - 1) == 1 || features.size(dim - 1) == 1 ? features : torch::stable::contiguous(features);
}

// The bounds are those of _checks.py. 1 / eps <= 1e30 is below half an ulp of FLT_MAX, so kNonFinitePotential + weight does not change.
inline float checked_eps(const char* op, double eps) {
  STD_TORCH_CHECK(eps >= 1e-30 && eps <= 1e30, "sts_kernels::", op, ": eps must be between 1e-30 and 1e30, got ", eps);
  return static_cast<float>(eps);
}

// An int32 or int64 vector of the given length on the device of `features`. Returned contiguous; copied only if strided.
inline Tensor checked_integers(const char* op, const char* name, const Tensor& value, int64_t length, const Tensor& features) {
  check_type(op, name, value, Accepts::kIndex);
  STD_TORCH_CHECK(value.dim() == 1 && value.size(0) == length, "sts_kernels::", op, ": ", name, " must have shape (", length, ",)");
  check_device(op, name, value, features);
  return contiguous_as(value, value.scalar_type());
}

inline Integers integers_of(const std::optional<Tensor>& value) {
  if (!value) return nullptr;
  return {value->const_data_ptr(), value->scalar_type() == ScalarType::Int};
}

// As checked_integers, but returned as int64: copied also if int32.
inline Tensor checked_vector(const char* op, const char* name, const Tensor& value, int64_t length, const Tensor& features) {
  return contiguous_as(checked_integers(op, name, value, length, features), ScalarType::Long);
}

inline std::optional<Tensor> checked_vector(const char* op, const char* name, const std::optional<Tensor>& value, int64_t length,
                                            const Tensor& features) {
  if (!value) return std::nullopt;
  return checked_vector(op, name, *value, length, features);
}

inline const int64_t* data_or_null(const std::optional<Tensor>& value) {
  return value ? static_cast<const int64_t*>(value->const_data_ptr()) : nullptr;
}

template <class scalar_t>
Rows<scalar_t> rows_of(const Tensor& features) {
  const int64_t dim = features.dim();
  return {static_cast<const scalar_t*>(features.const_data_ptr()), dim == 3 ? features.stride(0) : 0, features.stride(dim - 2),
          static_cast<int>(features.size(dim - 1))};
}

// A new contiguous tensor on the device of `like`, straight from the allocator. torch::stable::new_empty goes through the dispatcher,
// which takes longer than the rest of a small call.
inline Tensor new_tensor(const Tensor& like, std::initializer_list<int64_t> sizes, int32_t dtype) {
  int64_t strides[4], step = 1;
  for (int i = static_cast<int>(sizes.size()) - 1; i >= 0; --i) {
    strides[i] = step;
    step *= sizes.begin()[i] > 1 ? sizes.begin()[i] : 1;
  }
  int32_t device_type = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.begin(), strides, dtype, device_type,
                                                  like.get_device_index(), &handle));
  return Tensor(handle);
}
inline Tensor new_floats(const Tensor& like, std::initializer_list<int64_t> sizes) {
  return new_tensor(like, sizes, aoti_torch_dtype_float32());
}
inline Tensor new_indices(const Tensor& like, std::initializer_list<int64_t> sizes) {
  return new_tensor(like, sizes, aoti_torch_dtype_int64());
}

// Whether two elements of a matrix share an address: `a` rows down and `b` columns left meet where a * row = b * column (strides).
inline bool overlaps_itself(const Tensor& matrix) {
  const int64_t row = matrix.stride(0), column = matrix.stride(1), step = std::max<int64_t>(std::gcd(row, column), 1);
  return matrix.numel() > 1 && column / step < matrix.size(0) && row / step < matrix.size(1);
}

// Calls f with a null pointer of the element type: float, half_t or bfloat16_t. CPU and CUDA code have different 16-bit types.
template <class half_t, class bfloat16_t, class F>
void dispatch_floating(ScalarType type, F&& f) {
  switch (type) {
    case ScalarType::Float:
      return f(static_cast<float*>(nullptr));
    case ScalarType::Half:
      return f(static_cast<half_t*>(nullptr));
    case ScalarType::BFloat16:
      return f(static_cast<bfloat16_t*>(nullptr));
    default:
      STD_TORCH_CHECK(false, "sts_kernels: features must be float32, float16 or bfloat16");
  }
}

// One number per token: `value` must have the shape of `features` without its channels. Returned contiguous and as `type`; copied only if
// needed.
inline Tensor checked_per_token(const char* op, const char* name, const Tensor& value, Accepts accepts, ScalarType type,
                                const Tensor& features) {
  check_type(op, name, value, accepts);
  STD_TORCH_CHECK(value.dim() == features.dim() - 1, "sts_kernels::", op, ": ", name, " must have ", features.dim() - 1,
                  " dimensions, got ", value.dim());
  for (int64_t d = 0; d < value.dim(); ++d)
    STD_TORCH_CHECK(value.size(d) == features.size(d), "sts_kernels::", op, ": ", name, " must have a number for each token: size ",
                    features.size(d), " in dimension ", d, ", got ", value.size(d));
  check_device(op, name, value, features);
  return contiguous_as(value, type);
}

// Checks the values of a vector of counts, one per item. counts: in host-readable memory, or null.
inline void check_counts(const char* op, const char* name, const int64_t* counts, int64_t items, int64_t most) {
  for (int64_t b = 0; counts && b < items; ++b)
    STD_TORCH_CHECK(counts[b] >= 0 && counts[b] <= most, "sts_kernels::", op, ": ", name, "[", b, "] must be between 0 and ", most,
                    ", got ", counts[b]);
}

// Arguments of a selection op except its rule, with the checks that the CPU and CUDA kernels share. Owns the memory that `items` points to.
struct Selection {
  const char* op;
  Tensor features;
  std::optional<Tensor> anchor, num_tokens, cu_seqlens, cu_budgets, start, parameter;
  Items items{};
  bool cosine = false;  // distances of unit rows (UnitRows); a zero row has squared distance 2 to every row

  static Selection padded(const char* op, const Tensor& features, int64_t k, const std::optional<Tensor>& anchor,
                          const std::optional<Tensor>& num_tokens) {
    Selection s(op, features, 3);
    const int64_t batch = s.features.size(0), tokens = s.features.size(1);
    STD_TORCH_CHECK(k >= 1 && k <= tokens, "sts_kernels::", op, ": k must be between 1 and ", tokens, ", got ", k);
    s.anchor = checked_vector(op, "anchor", anchor, batch, features);
    s.num_tokens = checked_vector(op, "num_tokens", num_tokens, batch, features);
    s.items = {batch, tokens, k, data_or_null(s.num_tokens), nullptr, nullptr, data_or_null(s.anchor)};
    return s;
  }

  static Selection packed(const char* op, const Tensor& features, const Tensor& cu_seqlens, const Tensor& cu_budgets, int64_t total_k,
                          const std::optional<Tensor>& anchor, const std::optional<int64_t>& max_seqlen) {
    Selection s(op, features, 2);
    STD_TORCH_CHECK(cu_seqlens.dim() == 1 && cu_seqlens.size(0) >= 1, "sts_kernels::", op, ": cu_seqlens must have shape (B+1,)");
    const int64_t batch = cu_seqlens.size(0) - 1, tokens = s.features.size(0);
    STD_TORCH_CHECK(total_k >= 0 && total_k <= tokens, "sts_kernels::", op, ": total_k must be between 0 and ", tokens, ", got ", total_k);
    const int64_t least = tokens > 0 ? 1 : 0;
    STD_TORCH_CHECK(!max_seqlen || *max_seqlen >= least, "sts_kernels::", op, ": max_seqlen must be at least ", least, ", got ",
                    max_seqlen.value_or(0));
    s.cu_seqlens = checked_integers(op, "cu_seqlens", cu_seqlens, batch + 1, features);
    s.cu_budgets = checked_integers(op, "cu_budgets", cu_budgets, batch + 1, features);
    s.anchor = checked_vector(op, "anchor", anchor, batch, features);
    s.items = {batch, tokens, total_k, nullptr, integers_of(s.cu_seqlens), integers_of(s.cu_budgets), data_or_null(s.anchor)};
    s.items.max_seqlen = max_seqlen.value_or(s.items.max_seqlen);
    return s;
  }

  // Adds the arguments of rule `Farthest`.
  Selection&& with_farthest(const std::optional<Tensor>& quality, const std::optional<Tensor>& sqdist, const std::string& metric) && {
    STD_TORCH_CHECK(metric == "euclidean" || metric == "cosine", "sts_kernels::", op, ": metric must be euclidean or cosine, got ", metric);
    cosine = metric == "cosine";
    if (sqdist) set_start("start", *sqdist, Accepts::kFloating);
    if (quality) set_parameter("quality", *quality);
    return std::move(*this);
  }

  // Adds the arguments of rule `Suppress`.
  Selection&& with_suppress(const Tensor& rank, const Tensor& tau) && {
    cosine = true;
    set_start("rank", rank, Accepts::kIndex);
    set_parameter("tau", tau);
    return std::move(*this);
  }

  Tensor new_output() const {
    if (items.packed()) return new_indices(features, {items.picks});
    return new_indices(features, {items.count, items.picks});
  }

  // Checks the values of the index vectors, which must be in host-readable memory.
  static void check_values(const char* op, const Items& items) {
    if (items.packed()) {
      STD_TORCH_CHECK(items.cu_seqlens[0] == 0 && items.cu_seqlens[items.count] == items.tokens, "sts_kernels::", op,
                      ": cu_seqlens must rise from 0 to ", items.tokens);
      STD_TORCH_CHECK(items.cu_budgets[0] == 0 && items.cu_budgets[items.count] == items.picks, "sts_kernels::", op,
                      ": cu_budgets must rise from 0 to ", items.picks);
    }
    check_counts(op, "num_tokens", items.num_tokens, items.count, items.tokens);
    for (int64_t b = 0; b < items.count; ++b) {
      int64_t count = items.num_tokens ? items.num_tokens[b] : items.tokens;
      if (items.packed()) {
        const int64_t begin = items.cu_seqlens[b], end = items.cu_seqlens[b + 1], budget = items.cu_budgets[b + 1] - items.cu_budgets[b];
        STD_TORCH_CHECK(begin <= end && end <= items.tokens, "sts_kernels::", op, ": cu_seqlens must rise from 0 to ", items.tokens,
                        ", got ", end, " after ", begin);
        count = end - begin;
        STD_TORCH_CHECK(budget >= 0 && budget <= count, "sts_kernels::", op, ": item ", b, " has ", count, " tokens and a budget of ",
                        budget);
        STD_TORCH_CHECK(count <= items.max_seqlen, "sts_kernels::", op, ": item ", b, " has ", count, " tokens, and max_seqlen is ",
                        items.max_seqlen);
      }
      STD_TORCH_CHECK(items[b].valid, "sts_kernels::", op, ": anchor[", b, "] must be between 0 and ", count - 1, ", got ",
                      items.anchor ? items.anchor[b] : -1);
    }
  }

 private:
  Selection(const char* op, const Tensor& features, int64_t dim) : op(op), features(checked_features(op, features, dim)) {}
  void set_start(const char* name, const Tensor& value, Accepts accepts) {
    start = checked_per_token(op, name, value, accepts, ScalarType::Float, features);
    items.start = static_cast<const float*>(start->const_data_ptr());
  }
  void set_parameter(const char* name, const Tensor& value) {
    parameter = checked_per_token(op, name, value, Accepts::kFloating, ScalarType::Float, features);
    items.parameter = static_cast<const float*>(parameter->const_data_ptr());
  }
};

// STS_KERNELS_LOOKAHEAD: max picks drafted together (cluster and streaming kernels, CPU), clamped to max_lookahead. 1: no drafts, the plain
// loop. 0: the variable is not set. Invariant: the picks are the same for every value.
inline int asked_lookahead(int max_lookahead) {
  const char* value = std::getenv("STS_KERNELS_LOOKAHEAD");
  const int asked = value ? std::atoi(value) : 0;
  return asked >= 1 ? std::min(asked, max_lookahead) : 0;
}

// Arguments of repulsion_step_, with the checks that its CPU and CUDA kernels share.
struct StepArguments {
  Tensor features, picked;
  Repulsion rule;

  StepArguments(const Tensor& potential, const Tensor& features_, const Tensor& picked_, double eps)
      : features(checked_features("repulsion_step_", features_, 3)),
        picked(checked_vector("repulsion_step_", "picked", picked_, features_.size(0), features_)),
        rule{checked_eps("repulsion_step_", eps)} {
    STD_TORCH_CHECK(potential.scalar_type() == ScalarType::Float && potential.dim() == 2 && potential.size(0) == features.size(0) &&
                        potential.size(1) == features.size(1),
                    "sts_kernels::repulsion_step_: potential must be float32 of shape (", features.size(0), ", ", features.size(1), ")");
    STD_TORCH_CHECK(!overlaps_itself(potential), "sts_kernels::repulsion_step_: potential must have memory of its own for every element");
    check_device("repulsion_step_", "potential", potential, features);
  }

  // Checks the values of `picked`. `picks` points to them, in host-readable memory.
  static void check_values(const int64_t* picks, int64_t batch, int64_t tokens) {
    for (int64_t b = 0; b < batch; ++b)
      STD_TORCH_CHECK(picks[b] >= -1 && picks[b] < tokens, "sts_kernels::repulsion_step_: picked[", b, "] must be between -1 and ",
                      tokens - 1, ", got ", picks[b]);
  }
};

}  // namespace sts
