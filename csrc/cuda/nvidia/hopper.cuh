// TMA and wgmma of compute capability 9.0, as far as the kernels use them. The emulator has a file of this name with the same functions.
// These instructions are compiled for sm_90a alone. For other targets a kernel that needs them has no body, and kernel_serves is false.
#pragma once
#include <cuda.h>

#include "device.cuh"

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define STS_HOPPER 1
#else
#define STS_HOPPER 0
#endif

namespace sts {

// ---- host ----

// Launch bounds of a kernel that needs sm_90a. Without a body the bound is 32 threads, which kernel_serves recognises.
constexpr int hopper_threads(int threads) { return STS_HOPPER ? threads : 32; }

// Whether the current device can run `kernel`, declared with hopper_threads(threads).
template <class... Params>
bool kernel_serves(void (*kernel)(Params...), int threads) {
  const DriverQuestion question{address_of(kernel), current_device(), static_cast<unsigned>(threads), 0, 0};
  return ask_driver(question, 0, [&](int& serves) {
    cudaFuncAttributes attributes;
    if (cudaFuncGetAttributes(&attributes, address_of(kernel)) != cudaSuccess) return false;
    serves = attributes.maxThreadsPerBlock >= threads;
    return true;
  });
}

using TensorMap = CUtensorMap;
constexpr int kBoxChannels = 64;  // per row of a box: 128 bytes, the widest swizzle

// Tensor map of 16-bit elements (items, rows, parts, channels), for TMA boxes (1, box_rows, 1, kBoxChannels). pitch: elements from one part
// to the next, a multiple of 8. Elements of a box outside the tensor are read as zero.
inline cudaError_t make_tensor_map(const void* data, int64_t channels, int parts, int64_t rows, int64_t items, int64_t pitch, int box_rows,
                                   TensorMap& map) {
  using Encode = decltype(&cuTensorMapEncodeTiled);
  static const Encode encode = [] {  // looked up at run time: the library also loads without a driver
    void* entry = nullptr;
    cudaDriverEntryPointQueryResult found;
#if CUDART_VERSION >= 12050
    const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000, cudaEnableDefault, &found);
#else
    const cudaError_t error = cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &entry, cudaEnableDefault, &found);
#endif
    return error == cudaSuccess && found == cudaDriverEntryPointSuccess ? reinterpret_cast<Encode>(entry) : nullptr;
  }();
  if (!encode) return cudaErrorSymbolNotFound;
  const cuuint64_t part_bytes = static_cast<cuuint64_t>(pitch) * 2, row_bytes = parts * part_bytes;
  const cuuint64_t sizes[4] = {static_cast<cuuint64_t>(channels), static_cast<cuuint64_t>(parts), static_cast<cuuint64_t>(rows),
                               static_cast<cuuint64_t>(items)};
  const cuuint64_t strides[3] = {part_bytes, row_bytes, static_cast<cuuint64_t>(rows) * row_bytes};
  const cuuint32_t box[4] = {kBoxChannels, 1, static_cast<cuuint32_t>(box_rows), 1}, steps[4] = {1, 1, 1, 1};
  const CUresult result =
      encode(&map, CU_TENSOR_MAP_DATA_TYPE_UINT16, 4, const_cast<void*>(data), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
             CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

// ---- device ----

// setmaxnreg: lowers this warpgroup's registers per thread to kRegisters, or raises them from those that others gave. By all its threads.
template <int kRegisters>
__device__ __forceinline__ void give_registers() {
#if STS_HOPPER
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
#endif
}
template <int kRegisters>
__device__ __forceinline__ void take_registers() {
#if STS_HOPPER
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
#endif
}

// Starts a TMA copy of a box to `shared`, which is 1024-byte aligned. Rows lie 128 bytes apart, and 16-byte vector v of row r is stored at
// v ^ (r % 8), the 128-byte swizzle. `barrier` counts the bytes. By one thread.
__device__ __forceinline__ void copy_box(void* shared, const TensorMap& map, int channel, int part, int row, int item, Mbarrier* barrier) {
#if STS_HOPPER
  asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4, %5}], [%6];" ::"r"(
                   shared_address(shared)),
               "l"(&map), "r"(channel), "r"(part), "r"(row), "r"(item), "r"(shared_address(barrier))
               : "memory");
#endif
}

// The same copy into the blocks 0 .. blocks - 1 of the cluster, with one read of global memory. `shared` and `barrier` are addresses of
// this block; the same offsets of each block are written, and its mbarrier counts the bytes.
__device__ __forceinline__ void multicast_box(void* shared, const TensorMap& map, int channel, int part, int row, int item,
                                              Mbarrier* barrier, int blocks) {
#if STS_HOPPER
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1, {%2, %3, %4, %5}], [%6], "
      "%7;" ::"r"(shared_address(shared)),
      "l"(&map), "r"(channel), "r"(part), "r"(row), "r"(item), "r"(shared_address(barrier)), "h"(static_cast<uint16_t>((1 << blocks) - 1))
      : "memory");
#endif
}

// Orders register writes before wgmma: required before the first product, and after accumulators were written by other instructions.
__device__ __forceinline__ void wgmma_fence() {
#if STS_HOPPER
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
}

// Closes the current group of products.
__device__ __forceinline__ void wgmma_commit() {
#if STS_HOPPER
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#endif
}

// Waits until at most the `Pending` latest groups are in flight. A group's matrices must not be touched before. To read accumulators, call
// wgmma_finish.
template <int Pending>
__device__ __forceinline__ void wgmma_wait() {
#if STS_HOPPER
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(Pending) : "memory");
#endif
}

// Waits for all groups; then d, the accumulators, may be read. They are registers, and not operands of the wait: without the empty asm
// the compiler could move reads of d before it.
template <int kSums>
__device__ __forceinline__ void wgmma_finish(float (&d)[kSums]) {
  wgmma_wait<0>();
#if STS_HOPPER
#pragma unroll
  for (int s = 0; s < kSums; ++s) asm volatile("" : "+f"(d[s]));
#endif
}

#if STS_HOPPER
// Descriptor of a matrix as copy_box stores it. bits 0..13 address / 16 | 16..29 leading offset (unused: 1) | 32..45 stride of 8 rows,
// 1024 / 16 | 62..63 layout: 1, the 128-byte swizzle.
__device__ __forceinline__ uint64_t matrix_descriptor(const void* shared) {
  return static_cast<uint64_t>((shared_address(shared) & 0x3ffff) >> 4) | uint64_t(1) << 16 | uint64_t(1024 >> 4) << 32 | uint64_t(1) << 62;
}

#define STS_FOUR(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define STS_SIXTEEN(d, i) STS_FOUR(d, i), STS_FOUR(d, i + 4), STS_FOUR(d, i + 8), STS_FOUR(d, i + 12)
#define STS_WGMMA_64(type)                                                                                                    \
  asm volatile(                                                                                                               \
      "{\n\t.reg .pred add;\n\tsetp.ne.b32 add, %34, 0;\n\t"                                                                  \
      "wgmma.mma_async.sync.aligned.m64n64k16.f32." type "." type                                                             \
      " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, " \
      "%25, %26, %27, %28, %29, %30, %31}, %32, %33, add, 1, 1, 0, 0;\n\t}"                                                   \
      : STS_SIXTEEN(d, 0), STS_SIXTEEN(d, 16)                                                                                 \
      : "l"(a), "l"(b), "r"(add))
#define STS_WGMMA_128(type)                                                                                                   \
  asm volatile(                                                                                                               \
      "{\n\t.reg .pred add;\n\tsetp.ne.b32 add, %66, 0;\n\t"                                                                  \
      "wgmma.mma_async.sync.aligned.m64n128k16.f32." type "." type                                                            \
      " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, " \
      "%25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "   \
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, %64, %65, add, 1, 1, 0, 0;\n\t}"      \
      : STS_SIXTEEN(d, 0), STS_SIXTEEN(d, 16), STS_SIXTEEN(d, 32), STS_SIXTEEN(d, 48)                                         \
      : "l"(a), "l"(b), "r"(add))
__device__ __forceinline__ void wgmma_of(float (&d)[32], uint64_t a, uint64_t b, int add, __half) { STS_WGMMA_64("f16"); }
__device__ __forceinline__ void wgmma_of(float (&d)[32], uint64_t a, uint64_t b, int add, __nv_bfloat16) { STS_WGMMA_64("bf16"); }
__device__ __forceinline__ void wgmma_of(float (&d)[64], uint64_t a, uint64_t b, int add, __half) { STS_WGMMA_128("f16"); }
__device__ __forceinline__ void wgmma_of(float (&d)[64], uint64_t a, uint64_t b, int add, __nv_bfloat16) { STS_WGMMA_128("bf16"); }
#undef STS_WGMMA_64
#undef STS_WGMMA_128
#undef STS_SIXTEEN
#undef STS_FOUR
#endif

// Starts d = a b^T, or d += a b^T if `add`, by a warpgroup with float32 accumulators: 64 rows of a, 2 kSums rows of b, and the channels
// [16 k, 16 k + 16), of __half or __nv_bfloat16. a, b: as copy_box stores them.
// Accumulator layout: d[4 n + 2 h + e] is of row 16 warp + 8 h + lane / 4 and column 8 n + 2 (lane % 4) + e.
template <class T, int kSums>
__device__ __forceinline__ void wgmma(float (&d)[kSums], const T* a, const T* b, int k, bool add) {
#if STS_HOPPER
  wgmma_of(d, matrix_descriptor(a) + k * 2, matrix_descriptor(b) + k * 2, add, T());
#endif
}

}  // namespace sts
