// What the CPU kernels share above the vector loops: features as float32 rows, and loops over rows spread over threads.
#pragma once
#include <algorithm>
#include <vector>

#include "cpu_math.h"
#include "torch_glue.h"

namespace sts {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

namespace cpu {

// Rows worth a task of their own: below this many elements, threads cost more than they save.
inline int64_t row_grain(int64_t channels) { return std::max<int64_t>(1, (1 << 16) / channels); }

// One item's features as float32 rows: in place where they are float32, else a widened copy that lives until the next `load`.
class FloatRows {
 public:
  explicit FloatRows(const Tensor& features)
      : data_(features.const_data_ptr()),
        type_(features.scalar_type()),
        batch_stride_(features.dim() == 3 ? features.stride(0) : 0),
        row_stride_(features.stride(features.dim() - 2)),
        channels_(features.size(features.dim() - 1)) {}

  // Makes `count` tokens of batch entry b, from `first` on, available as [0, count).
  void load(int64_t b, int64_t first, int64_t count) {
    const int64_t offset = b * batch_stride_ + first * row_stride_;
    dispatch_floating<torch::headeronly::Half, torch::headeronly::BFloat16>(type_, [&](auto* element) {
      using scalar_t = std::remove_pointer_t<decltype(element)>;
      const scalar_t* in = static_cast<const scalar_t*>(data_) + offset;
      if constexpr (std::is_same_v<scalar_t, float>) {
        rows_ = in;
        stride_ = row_stride_;
      } else {
        copy_.resize(count * channels_);
        torch::stable::parallel_for(0, count, row_grain(channels_), [&](int64_t begin, int64_t end) {
          for (int64_t i = begin; i < end; ++i) widen(in + i * row_stride_, copy_.data() + i * channels_, channels_);
        });
        rows_ = copy_.data();
        stride_ = channels_;
      }
    });
  }

  const float* operator[](int64_t i) const { return rows_ + i * stride_; }
  int64_t stride() const { return stride_; }
  int64_t channels() const { return channels_; }

 private:
  const void* data_;
  ScalarType type_;
  int64_t batch_stride_, row_stride_, channels_;
  std::vector<float> copy_;
  const float* rows_ = nullptr;
  int64_t stride_ = 0;
};

}  // namespace cpu
}  // namespace sts
