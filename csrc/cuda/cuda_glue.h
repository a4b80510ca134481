// Torch for the .cu files: current stream, device guard, launch errors, scratch memory.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <vector>

#include "common/torch_glue.h"
#include "scratch.h"

// Defined in libtorch_cuda.so alone. Weak, so that this library also loads into a torch without CUDA.
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** ret_stream);
#pragma weak aoti_torch_get_current_cuda_stream

namespace sts {

// Makes the features' device current, for torch and for the CUDA runtime that is linked into this library. stream(): torch's stream on it.
class CudaScope {
 public:
  explicit CudaScope(const Tensor& features) : guard_(features.get_device_index()) {
    check(cudaSetDevice(features.get_device_index()), "cudaSetDevice");
    STD_TORCH_CHECK(&aoti_torch_get_current_cuda_stream != nullptr, "sts_kernels: this torch has no CUDA");
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(features.get_device_index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }
  cudaStream_t stream() const { return stream_; }

  // The values of an int32 or int64 tensor, after a synchronisation.
  std::vector<int64_t> host_copy(const Tensor& value) const {
    const auto copy = [&](auto values) {
      check(cudaStreamSynchronize(stream_), "STS_KERNELS_CHECK");
      check(cudaMemcpy(values.data(), value.const_data_ptr(), values.size() * sizeof values[0], cudaMemcpyDeviceToHost),
            "STS_KERNELS_CHECK");
      return std::vector<int64_t>(values.begin(), values.end());
    };
    const int64_t count = value.numel();
    return value.scalar_type() == ScalarType::Int ? copy(std::vector<int32_t>(count)) : copy(std::vector<int64_t>(count));
  }

  static void check(cudaError_t error, const char* what) {
    STD_TORCH_CHECK(error == cudaSuccess, "sts_kernels::", what, ": CUDA error: ", cudaGetErrorString(error));
  }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_ = nullptr;
};

// The scratch memory of a launch (scratch.h), from torch's allocator.
class ScratchMemory {
 public:
  template <class Layout>
  ScratchMemory(const Tensor& like, const Layout& layout)
      : tensor_(new_tensor(like, {scratch_bytes(layout)}, aoti_torch_dtype_uint8())),
        arrays_(tensor_.mutable_data_ptr(), tensor_.numel()) {}
  void* operator()(int64_t bytes) { return arrays_(bytes); }

 private:
  Tensor tensor_;
  ScratchArrays arrays_;
};

template <class F>
void dispatch_cuda(ScalarType type, F&& f) {
  dispatch_floating<__half, __nv_bfloat16>(type, f);
}

// STS_KERNELS_CHECK=1: ops check the values of index tensors (CudaScope::host_copy), which costs a synchronisation.
inline bool check_values_on_device() {
  const char* value = std::getenv("STS_KERNELS_CHECK");
  return value && std::strcmp(value, "1") == 0;
}

}  // namespace sts
