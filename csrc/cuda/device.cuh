// Launches, element types, and barriers between blocks. Kernels include this header, and hopper.cuh if they need it, but no header of CUDA
// directly.
#pragma once
#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "plan_cache.h"
#include "ptx.cuh"
#include "scratch.h"

namespace sts {

// ---- host: launching ----

struct Launch {
  dim3 grid, block;
  size_t shared_bytes = 0;   // dynamic shared memory
  unsigned cluster = 1;      // blocks per cluster, along x
  bool cooperative = false;  // all blocks are resident at once, or the launch fails
  cudaStream_t stream = nullptr;
  // Programmatic dependent launch, if the device has it: blocks may start before the previous launch ends. The kernel must begin with
  // await_predecessor.
  bool overlap = false;
};

// Blocks along y or z of a grid, whose limit is 65535; the kernel strides over the rest.
inline unsigned grid_extent(int64_t blocks) { return static_cast<unsigned>(blocks < 65535 ? blocks : 65535); }

template <class... Params>
const void* address_of(void (*kernel)(Params...)) {
  return reinterpret_cast<const void*>(kernel);
}

// The current device, or -1.
inline int current_device() {
  int device = -1;
  return cudaGetDevice(&device) == cudaSuccess ? device : -1;
}

// The cached answer to a driver query, or that of ask(answer), which returns whether the driver answered. If it did not, the result is
// `unknown`, nothing is cached, and the error is cleared: the next launch must not report it.
template <class Ask>
int ask_driver(const DriverQuestion& question, int unknown, const Ask& ask) {
  return PlanCache::of_process().answer(question, unknown, [&](int& answer) {
    const bool answered = ask(answer);
    if (!answered) cudaGetLastError();
    return answered;
  });
}

// Raises the kernel's limit of dynamic shared memory to `bytes`, if it is lower.
template <class... Params>
cudaError_t allow_shared(void (*kernel)(Params...), size_t bytes) {
  // Bytes that every kernel may use, static ones included. No kernel with static bytes asks for nearly as many.
  constexpr size_t kDefaultLimit = 48 * 1024;
  return PlanCache::of_process().raise_limit(address_of(kernel), current_device(), bytes, kDefaultLimit, [&] {
    return cudaFuncSetAttribute(address_of(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
  });
}

// A Launch in the runtime's types.
struct RuntimeLaunch {
  cudaLaunchAttribute attributes[3];
  cudaLaunchConfig_t config{};

  explicit RuntimeLaunch(const Launch& shape, bool overlap = false) {
    config.gridDim = shape.grid;
    config.blockDim = shape.block;
    config.dynamicSmemBytes = shape.shared_bytes;
    config.stream = shape.stream;
    config.attrs = attributes;
    if (shape.cluster > 1) {
      cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
      attribute.id = cudaLaunchAttributeClusterDimension;
      attribute.val.clusterDim.x = shape.cluster;
      attribute.val.clusterDim.y = 1;
      attribute.val.clusterDim.z = 1;
    }
    if (shape.cooperative) {
      cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
      attribute.id = cudaLaunchAttributeCooperative;
      attribute.val.cooperative = 1;
    }
    if (overlap) {
      cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
      attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
      attribute.val.programmaticStreamSerializationAllowed = 1;
    }
  }
  RuntimeLaunch(const RuntimeLaunch&) = delete;  // config points to attributes
};

// Whether launches of `kernel` may overlap on the current device: its code is for sm_90 or later, where await_predecessor waits, and the
// driver can capture such launches into a graph.
template <class... Params>
bool may_overlap(void (*kernel)(Params...)) {
  return ask_driver({address_of(kernel), current_device(), 0, 0, 0}, 0, [&](int& may) {
    constexpr int kFirstDriver = 12030;  // CUDA 12.3
    cudaFuncAttributes attributes;
    int driver = 0;
    if (cudaFuncGetAttributes(&attributes, address_of(kernel)) != cudaSuccess || cudaDriverGetVersion(&driver) != cudaSuccess) return false;
    may = attributes.ptxVersion >= 90 && driver >= kFirstDriver;
    return true;
  });
}

template <class... Params, class... Args>
cudaError_t launch(void (*kernel)(Params...), const Launch& shape, Args... args) {
  if (const cudaError_t error = allow_shared(kernel, shape.shared_bytes); error != cudaSuccess) return error;
  const RuntimeLaunch runtime(shape, shape.overlap && may_overlap(kernel));
  return cudaLaunchKernelEx(&runtime.config, kernel, static_cast<Params>(args)...);
}

// SMs of the current device; 1 if unknown.
inline int device_sm_count() {
  const int device = current_device();
  return ask_driver({nullptr, device, 0, 0, 0}, 1, [&](int& count) {
    return cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device) == cudaSuccess && count > 0;
  });
}

// Max dynamic shared memory per block on the current device, in bytes; 48 KB if unknown.
inline int max_shared_bytes() {
  const int device = current_device();
  return ask_driver({nullptr, device, 0, 1, 0}, 48 * 1024, [&](int& bytes) {
    return cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) == cudaSuccess && bytes > 0;
  });
}

// Blocks of `kernel` that can be resident at once on all SMs of the current device; 0 if it cannot run.
template <class... Params>
int max_resident_blocks(void (*kernel)(Params...), int threads, size_t shared_bytes) {
  const DriverQuestion question{address_of(kernel), current_device(), static_cast<unsigned>(threads), shared_bytes, 1};
  const int per_sm = ask_driver(question, 0, [&](int& blocks) {
    return allow_shared(kernel, shared_bytes) == cudaSuccess &&
           cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, threads, shared_bytes) == cudaSuccess;
  });
  return per_sm * device_sm_count();
}

// Clusters of this launch of `kernel` that can be resident at once on the current device; 0 unless its code is for sm_90 or later. May be
// less than SMs / cluster size, because a cluster stays within a GPC.
template <class... Params>
int max_resident_clusters(void (*kernel)(Params...), const Launch& shape) {
  const DriverQuestion question{address_of(kernel), current_device(), shape.block.x, shape.shared_bytes, shape.cluster};
  return ask_driver(question, 0, [&](int& resident) {
    const RuntimeLaunch runtime(shape);
    cudaFuncAttributes attributes;
    resident = 0;
    if (cudaFuncGetAttributes(&attributes, address_of(kernel)) != cudaSuccess) return false;
    if (attributes.ptxVersion < 90) return true;
    return allow_shared(kernel, shape.shared_bytes) == cudaSuccess &&
           cudaOccupancyMaxActiveClusters(&resident, kernel, &runtime.config) == cudaSuccess;
  });
}

// ---- device: elements ----

__host__ __device__ __forceinline__ float to_float(float value) { return value; }
__host__ __device__ __forceinline__ float to_float(__half value) { return __half2float(value); }
__host__ __device__ __forceinline__ float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }
__host__ __device__ __forceinline__ void from_float(float value, float& element) { element = value; }
__host__ __device__ __forceinline__ void from_float(float value, __half& element) { element = __float2half_rn(value); }
__host__ __device__ __forceinline__ void from_float(float value, __nv_bfloat16& element) { element = __float2bfloat16_rn(value); }

// The elements of type T in a word of 32 bits.
template <class T>
using word_t = std::conditional_t<sizeof(T) == 4, float, std::conditional_t<std::is_same_v<T, __half>, __half2, __nv_bfloat162>>;

template <class T>
__device__ __forceinline__ word_t<T> as_elements(uint32_t word) {
  word_t<T> elements;
  memcpy(&elements, &word, 4);
  return elements;
}
template <class Elements>
__device__ __forceinline__ uint32_t as_word(Elements elements) {
  uint32_t word;
  memcpy(&word, &elements, 4);
  return word;
}

// a - b of two packed 16-bit elements of type T (the tag).
template <class T>
__device__ __forceinline__ uint32_t subtract_pairs(uint32_t a, uint32_t b, T) {
  return as_word(__hsub2(as_elements<T>(a), as_elements<T>(b)));
}

// The lower and the higher of each element of two words of type T (the tag). Not for NaN.
template <class T>
__device__ __forceinline__ uint32_t lower_elements(uint32_t a, uint32_t b, T) {
  if constexpr (sizeof(T) == 4)
    return as_word(fminf(as_elements<T>(a), as_elements<T>(b)));
  else
    return as_word(__hmin2(as_elements<T>(a), as_elements<T>(b)));
}
template <class T>
__device__ __forceinline__ uint32_t higher_elements(uint32_t a, uint32_t b, T) {
  if constexpr (sizeof(T) == 4)
    return as_word(fmaxf(as_elements<T>(a), as_elements<T>(b)));
  else
    return as_word(__hmax2(as_elements<T>(a), as_elements<T>(b)));
}

// ---- device: barriers between blocks ----

// Barrier of `blocks` co-resident blocks, called by all their threads. Writes before it are visible to ordinary loads of all blocks after
// it, but not to __ldg, whose cache may be stale.
// Invariant: the counter is 0 before the launch and is only added to, modulo 2^32. So it serves any number of barriers, and the difference
// of counter and target is compared.
class GroupBarrier {
 public:
  __device__ GroupBarrier(unsigned* counter, unsigned blocks) : counter_(counter), blocks_(blocks) {}

  __device__ void sync() {
    target_ += blocks_;
    __syncthreads();
    if (threadIdx.x == 0 && threadIdx.y == 0 && threadIdx.z == 0) {
      add_release(counter_, 1);  // release is cumulative: it also publishes what other threads wrote before __syncthreads
      while (static_cast<int>(load_acquire(counter_) - target_) < 0) spin_pause();
    }
    __syncthreads();
  }

 private:
  unsigned* counter_;
  unsigned blocks_;
  unsigned target_ = 0;
};

}  // namespace sts
