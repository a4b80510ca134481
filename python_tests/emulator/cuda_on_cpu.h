// CUDA C++ on the CPU, for tests of kernels and launchers: C++20 with g++ or clang, no part of CUDA. It defines only what the kernels use,
// and accepts no more than nvcc does.
#pragma once
#include <algorithm>
#include <atomic>
#include <bit>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <string>
#include <type_traits>

#include "engine.h"
#include "numbers.h"

#define __global__
#define __device__
#define __host__
#define __constant__ static const
#define __shared__ static thread_local  // every block runs on one OS thread
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
#define __restrict__ __restrict

#define threadIdx (::emulator::self().index)
#define blockIdx (::emulator::block->index)
constexpr int warpSize = emulator::kWarp;

#define __CUDA_ARCH__ 900  // sm_90, and with the next line sm_90a
#define __CUDA_ARCH_FEAT_SM90_ALL

// ---- host ----

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorMemoryAllocation = 2,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorLaunchOutOfResources = 701,
  cudaErrorCooperativeLaunchTooLarge = 720,
};
inline const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorInvalidValue:
      return "invalid argument";
    case cudaErrorMemoryAllocation:
      return "out of memory";
    case cudaErrorInvalidConfiguration:
      return "invalid configuration argument";
    case cudaErrorLaunchOutOfResources:
      return "too many resources requested for launch";
    case cudaErrorCooperativeLaunchTooLarge:
      return "too many blocks in cooperative launch";
  }
  return "unrecognized error code";
}
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }  // a launch returns all its errors itself

struct CUstream_st;
using cudaStream_t = CUstream_st*;
inline cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t = nullptr) {
  std::memset(to, value, bytes);
  return cudaSuccess;
}

// Exactly sized: AddressSanitizer sees accesses past both ends.
inline cudaError_t cudaMalloc(void** to, size_t bytes) { return posix_memalign(to, 256, bytes) ? cudaErrorMemoryAllocation : cudaSuccess; }
inline cudaError_t cudaFree(void* memory) {
  std::free(memory);
  return cudaSuccess;
}
enum cudaMemcpyKind { cudaMemcpyHostToDevice, cudaMemcpyDeviceToHost, cudaMemcpyDeviceToDevice };
inline cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind) {
  std::memcpy(to, from, bytes);
  return cudaSuccess;
}
enum { cudaStreamNonBlocking = 1 };
inline cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) {
  *stream = nullptr;
  return cudaSuccess;
}
inline cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }

enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount = 16, cudaDevAttrMaxSharedMemoryPerBlockOptin = 97 };
// The device number encodes the settings: cached answers (PlanCache) of one device are not taken for another's.
inline cudaError_t cudaGetDevice(int* device) {
  const auto settings = emulator::Settings::from_environment();
  *device = settings.multiprocessors * 1024 + settings.blocks_per_multiprocessor;
  return cudaSuccess;
}

namespace emulator {

inline std::atomic<int64_t> questions{0};  // number of driver queries about kernels and devices

// Limits of sm_90: threads and blocks, then bytes of shared memory per block, per SM, and reserved per block.
constexpr unsigned kMaxThreads = 1024, kMaxClusterBlocks = 8, kMaxResidentThreads = 2048;
constexpr size_t kMaxShared = 227 * 1024, kSharedPerSm = 228 * 1024, kReservedShared = 1024;

inline int resident_blocks(unsigned threads, size_t shared_bytes) {
  if (threads == 0 || threads > kMaxThreads || shared_bytes > kMaxShared) return 0;
  const size_t by_shared = kSharedPerSm / (shared_bytes + kReservedShared), by_threads = kMaxResidentThreads / threads;
  const size_t configured = static_cast<size_t>(Settings::from_environment().blocks_per_multiprocessor);
  return static_cast<int>(std::min({by_shared, by_threads, configured}));
}

inline cudaError_t launch(dim3 grid, dim3 block, size_t shared_bytes, unsigned cluster, bool cooperative, bool overlap,
                          std::function<void()> body) {
  const uint64_t threads = uint64_t(block.x) * block.y * block.z, blocks = uint64_t(grid.x) * grid.y * grid.z;
  if (threads == 0 || threads > kMaxThreads || block.z > 64 || blocks == 0 || grid.x > 0x7fffffff || grid.y > 65535 || grid.z > 65535 ||
      cluster == 0 || cluster > kMaxClusterBlocks || grid.x % cluster)
    return cudaErrorInvalidConfiguration;
  if (shared_bytes > kMaxShared) return cudaErrorInvalidValue;
  Grid run;
  run.grid = grid;
  run.block = block;
  run.shared_bytes = shared_bytes;
  run.cluster_size = cluster;
  run.overlap = overlap;
  run.body = std::move(body);
  run.settings = Settings::from_environment();
  if (cooperative && blocks > uint64_t(resident_blocks(static_cast<unsigned>(threads), shared_bytes)) * run.settings.multiprocessors)
    return cudaErrorCooperativeLaunchTooLarge;
  run_grid(run, cooperative);
  return cudaSuccess;
}

}  // namespace emulator

inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  ++emulator::questions;
  *value = attribute == cudaDevAttrMultiProcessorCount ? emulator::Settings::from_environment().multiprocessors
                                                       : static_cast<int>(emulator::kMaxShared);
  return cudaSuccess;
}
template <class Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel, int threads, size_t shared_bytes) {
  ++emulator::questions;
  *blocks = emulator::resident_blocks(static_cast<unsigned>(threads), shared_bytes);
  return cudaSuccess;
}
inline cudaError_t cudaDriverGetVersion(int* version) {
  ++emulator::questions;
  *version = 13000;
  return cudaSuccess;
}

enum cudaLaunchAttributeID {
  cudaLaunchAttributeCooperative = 2,
  cudaLaunchAttributeClusterDimension = 4,
  cudaLaunchAttributeProgrammaticStreamSerialization = 6,
};
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  union {
    int cooperative, programmaticStreamSerializationAllowed;
    struct {
      unsigned x, y, z;
    } clusterDim;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
  cudaLaunchAttribute* attrs = nullptr;
  unsigned numAttrs = 0;

  const cudaLaunchAttribute* attribute(cudaLaunchAttributeID id) const {
    const auto found = std::find_if(attrs, attrs + numAttrs, [=](const cudaLaunchAttribute& a) { return a.id == id; });
    return found == attrs + numAttrs ? nullptr : found;
  }
  unsigned cluster() const {
    const cudaLaunchAttribute* found = attribute(cudaLaunchAttributeClusterDimension);
    return found ? found->val.clusterDim.x : 1;
  }
};
template <class... Params, class... Args>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Params...), Args... args) {
  const cudaLaunchAttribute* cooperative = config->attribute(cudaLaunchAttributeCooperative);
  const cudaLaunchAttribute* overlap = config->attribute(cudaLaunchAttributeProgrammaticStreamSerialization);
  return emulator::launch(config->gridDim, config->blockDim, config->dynamicSmemBytes, config->cluster(),
                          cooperative && cooperative->val.cooperative, overlap && overlap->val.programmaticStreamSerializationAllowed,
                          [=] { kernel(args...); });
}
template <class Kernel>
cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, Kernel, const cudaLaunchConfig_t* config) {
  ++emulator::questions;
  const unsigned multiprocessors = static_cast<unsigned>(emulator::Settings::from_environment().multiprocessors);
  *clusters = config->cluster() > emulator::kMaxClusterBlocks ? 0 : static_cast<int>(multiprocessors / config->cluster());
  return cudaSuccess;
}
struct cudaFuncAttributes {
  int ptxVersion, maxThreadsPerBlock;
};
inline cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  ++emulator::questions;
  *attributes = {90, static_cast<int>(emulator::kMaxThreads)};
  return cudaSuccess;
}
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
inline cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int bytes) {
  ++emulator::questions;
  return static_cast<size_t>(bytes) > emulator::kMaxShared ? cudaErrorInvalidValue : cudaSuccess;
}

// ---- barriers and fences ----

inline void __syncthreads() { emulator::sync_block(); }
inline int __syncthreads_count(int predicate) {  // three counters by generation: one is read, one counts votes, one is cleared
  {
    const emulator::Unchecked unchecked;
    const uint64_t generation = emulator::block->barrier.generation;
    emulator::block->votes[(generation + 1) % 3] = 0;
    emulator::block->votes[generation % 3] += predicate != 0;
  }
  emulator::sync_block("__syncthreads_count");
  const emulator::Unchecked unchecked;
  return emulator::block->votes[(emulator::block->barrier.generation + 2) % 3];
}
inline int __syncthreads_or(int predicate) { return __syncthreads_count(predicate) != 0; }
inline int __syncthreads_and(int predicate) { return __syncthreads_count(!predicate) == 0; }
inline void __syncwarp(unsigned mask = ~0u) { emulator::exchange(mask, {}, 1, "__syncwarp", true); }

// ThreadSanitizer does not model fences. They share one clock, which may hide a race but reports no false one.
inline char emulator_fence_clock;
inline void __threadfence() {
#if defined(__SANITIZE_THREAD__)
  emulator::acquire(&emulator_fence_clock);
  emulator::release(&emulator_fence_clock);
#else
  __atomic_thread_fence(__ATOMIC_SEQ_CST);
#endif
}
inline void __threadfence_block() { __threadfence(); }
inline void __nanosleep(unsigned) { emulator::spin_pause(); }
[[noreturn]] inline void __trap() { emulator::fail("__trap"); }

// ---- collectives of a warp ----

namespace emulator {

template <class T>
Words pack(T value) {
  static_assert(sizeof(T) <= 8 && std::is_trivially_copyable_v<T>);
  Words words{};
  std::memcpy(&words, &value, sizeof value);
  return words;
}
template <class T>
T unpack(const Words& words) {
  T value;
  std::memcpy(&value, &words, sizeof value);
  return value;
}

inline int lane() { return self().linear % kWarp; }

template <class T>
T shuffle(uint32_t mask, T value, int source, int operation, const char* name) {
  const Words* given = exchange(mask, pack(value), operation, name);
  if (!(mask >> source & 1)) fail(std::string(name) + ": the source lane is not in the mask");
  return unpack<T>(given[source]);
}

template <class T, class Combine>
T reduce(uint32_t mask, T value, int operation, const char* name, Combine combine) {
  const Words* given = exchange(mask, pack(value), operation, name);
  T result = value;
  bool first = true;
  for (int l = 0; l < kWarp; ++l)
    if (mask >> l & 1) {
      const T other = unpack<T>(given[l]);
      result = first ? other : combine(result, other);
      first = false;
    }
  return result;
}

}  // namespace emulator

// Lanes exchange within sections of `width` lanes. A source outside the section is replaced by the lane itself.
template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
  return emulator::shuffle(mask, value, (emulator::lane() & ~(width - 1)) | (source & (width - 1)), 2, "__shfl_sync");
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int flip, int width = 32) {
  const int lane = emulator::lane(), source = lane ^ flip;
  return emulator::shuffle(mask, value, (source & ~(width - 1)) > (lane & ~(width - 1)) ? lane : source, 3, "__shfl_xor_sync");
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  const int lane = emulator::lane(), source = lane - static_cast<int>(delta);
  return emulator::shuffle(mask, value, source < (lane & ~(width - 1)) ? lane : source, 4, "__shfl_up_sync");
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  const int lane = emulator::lane(), source = lane + static_cast<int>(delta);
  return emulator::shuffle(mask, value, source > (lane | (width - 1)) ? lane : source, 5, "__shfl_down_sync");
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
  const emulator::Words* given = emulator::exchange(mask, {predicate != 0}, 6, "__ballot_sync");
  unsigned votes = 0;
  for (int l = 0; l < 32; ++l)
    if (mask >> l & 1) votes |= static_cast<unsigned>(given[l][0]) << l;
  return votes;
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) == mask; }

#define EMULATOR_REDUCE(T)                                                                                                 \
  inline T __reduce_min_sync(unsigned mask, T value) {                                                                     \
    return emulator::reduce(mask, value, 7, "__reduce_min_sync", [](T a, T b) { return std::min(a, b); });                 \
  }                                                                                                                        \
  inline T __reduce_max_sync(unsigned mask, T value) {                                                                     \
    return emulator::reduce(mask, value, 8, "__reduce_max_sync", [](T a, T b) { return std::max(a, b); });                 \
  }                                                                                                                        \
  inline T __reduce_add_sync(unsigned mask, T value) {                                                                     \
    return emulator::reduce(mask, value, 9, "__reduce_add_sync",                                                           \
                            [](T a, T b) { return static_cast<T>(static_cast<unsigned>(a) + static_cast<unsigned>(b)); }); \
  }
EMULATOR_REDUCE(unsigned)
EMULATOR_REDUCE(int)
#undef EMULATOR_REDUCE

// ---- memory ----

namespace emulator {

// Atomics are relaxed, as on the GPU: the race checker reports code that relies on their order without fence, release or acquire.
template <class T, class Update>
T atomic_update(T* address, Update update) {
  T old;
  __atomic_load(address, &old, __ATOMIC_RELAXED);
  for (;;) {
    T wanted = update(old);
    if (__atomic_compare_exchange(address, &old, &wanted, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) return old;
  }
}

template <class T>
void check_aligned(const T* address, const char* what) {
  check_awaited(what);
  if (reinterpret_cast<uintptr_t>(address) % alignof(T)) fail(std::string(what) + ": misaligned address");
}

}  // namespace emulator

#define EMULATOR_ATOMICS(T)                                                     \
  inline T atomicMin(T* p, T v) {                                               \
    return emulator::atomic_update(p, [v](T old) { return std::min(old, v); }); \
  }                                                                             \
  inline T atomicMax(T* p, T v) {                                               \
    return emulator::atomic_update(p, [v](T old) { return std::max(old, v); }); \
  }
EMULATOR_ATOMICS(int)
EMULATOR_ATOMICS(unsigned)
EMULATOR_ATOMICS(long long)
EMULATOR_ATOMICS(unsigned long long)
#undef EMULATOR_ATOMICS
#define EMULATOR_ATOMICS(T)                                                            \
  inline T atomicAdd(T* p, T v) {                                                      \
    return emulator::atomic_update(p, [v](T old) { return static_cast<T>(old + v); }); \
  }
EMULATOR_ATOMICS(unsigned)
EMULATOR_ATOMICS(unsigned long long)
EMULATOR_ATOMICS(float)
EMULATOR_ATOMICS(double)
#undef EMULATOR_ATOMICS
inline int atomicAdd(int* p, int v) { return static_cast<int>(atomicAdd(reinterpret_cast<unsigned*>(p), static_cast<unsigned>(v))); }
#define EMULATOR_ATOMICS(T)                                                              \
  inline T atomicExch(T* p, T v) {                                                       \
    return emulator::atomic_update(p, [v](T) { return v; });                             \
  }                                                                                      \
  inline T atomicCAS(T* p, T expected, T v) {                                            \
    return emulator::atomic_update(p, [=](T old) { return old == expected ? v : old; }); \
  }
EMULATOR_ATOMICS(int)
EMULATOR_ATOMICS(unsigned)
EMULATOR_ATOMICS(unsigned long long)
#undef EMULATOR_ATOMICS
#define EMULATOR_ATOMICS(T)                                            \
  inline T atomicOr(T* p, T v) {                                       \
    return emulator::atomic_update(p, [v](T old) { return old | v; }); \
  }                                                                    \
  inline T atomicAnd(T* p, T v) {                                      \
    return emulator::atomic_update(p, [v](T old) { return old & v; }); \
  }
EMULATOR_ATOMICS(int)
EMULATOR_ATOMICS(unsigned)
EMULATOR_ATOMICS(unsigned long long)
#undef EMULATOR_ATOMICS

template <class T>
T __ldg(const T* address) {
  emulator::check_aligned(address, "__ldg");
  return *address;
}
template <class T>
T __ldcg(const T* address) {
  emulator::check_aligned(address, "__ldcg");
  return *address;
}
template <class T>
T __ldcs(const T* address) {
  emulator::check_aligned(address, "__ldcs");
  return *address;
}
template <class T>
void __stcg(T* address, T value) {
  emulator::check_aligned(address, "__stcg");
  *address = value;
}
template <class T>
void __stcs(T* address, T value) {
  emulator::check_aligned(address, "__stcs");
  *address = value;
}

// ---- arithmetic ----

inline unsigned __float_as_uint(float value) { return std::bit_cast<unsigned>(value); }
inline float __uint_as_float(unsigned bits) { return std::bit_cast<float>(bits); }
inline int __float_as_int(float value) { return std::bit_cast<int>(value); }
inline float __int_as_float(int bits) { return std::bit_cast<float>(bits); }
// The bytes of b:a, numbered from 0, that the four nibbles of `selector` name.
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
  const uint64_t bytes = uint64_t(b) << 32 | a;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) result |= unsigned(bytes >> (selector >> 4 * i & 7) * 8 & 255) << 8 * i;
  return result;
}
inline int __popc(unsigned value) { return std::popcount(value); }
inline int __popcll(unsigned long long value) { return std::popcount(value); }
inline int __ffs(int value) { return value ? std::countr_zero(static_cast<unsigned>(value)) + 1 : 0; }
inline int __ffsll(long long value) { return value ? std::countr_zero(static_cast<unsigned long long>(value)) + 1 : 0; }
inline int __clz(int value) { return std::countl_zero(static_cast<unsigned>(value)); }
inline int __clzll(long long value) { return std::countl_zero(static_cast<unsigned long long>(value)); }

template <class A, class B>
constexpr std::common_type_t<A, B> min(A a, B b) {
  return b < a ? b : a;
}
template <class A, class B>
constexpr std::common_type_t<A, B> max(A a, B b) {
  return a < b ? b : a;
}

inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __frcp_rn(float a) { return 1 / a; }
inline float __fmaf_rn(float a, float b, float c) { return std::fmaf(a, b, c); }
inline float __saturatef(float a) { return a >= 1 ? 1 : a > 0 ? a : 0; }  // a NaN becomes 0
inline float __fdividef(float a, float b) { return a / b; }
inline float __expf(float a) { return std::exp(a); }
inline float rsqrtf(float a) { return 1 / std::sqrt(a); }

// ---- clusters ----

namespace cooperative_groups {

struct cluster_group {
  unsigned block_rank() const { return emulator::block->rank; }
  unsigned num_blocks() const { return emulator::block->grid->cluster_size; }
  void sync() const { emulator::sync_cluster(); }

  // Address of the same variable in the shared memory of block `rank`.
  template <class T>
  T* map_shared_rank(T* address, int rank) const {
    const emulator::Unchecked unchecked;
    const emulator::Block& block = *emulator::block;
    if (rank < 0 || rank >= static_cast<int>(block.grid->cluster_size)) emulator::fail("map_shared_rank: no such rank");
    const auto byte = reinterpret_cast<char*>(const_cast<std::remove_const_t<T>*>(address));
    const emulator::Cluster& cluster = *block.cluster;
    const bool dynamic = byte >= block.dynamic && byte < block.dynamic + block.grid->shared_bytes;
    const auto& bases = dynamic ? cluster.dynamics : cluster.statics;
    if (!bases[static_cast<size_t>(rank)]) emulator::fail("map_shared_rank: that block has not started");
    if (cluster.blocks[static_cast<size_t>(rank)]->has_ended.load(std::memory_order_relaxed))
      emulator::fail("map_shared_rank: that block has ended");
    return reinterpret_cast<T*>(bases[static_cast<size_t>(rank)] + (byte - bases[block.rank]));
  }
};
inline cluster_group this_cluster() { return {}; }

}  // namespace cooperative_groups
