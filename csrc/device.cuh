// What kernels and their launchers are written with. nvcc compiles them for the GPU; with STS_EMULATE the same source
// runs on the CPU (python_tests/emulator/cuda_on_cpu.h). Kernels include this header and nothing of CUDA's.
#pragma once
#ifdef STS_EMULATE
#include "cuda_on_cpu.h"
#else
#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#endif
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "plan_cache.h"

// STS_KERNEL(name, launcher), at the end of a .cuh, offers a launcher to the tests under `name`. The product ignores it.
#ifdef STS_KERNEL_TABLE
#include "kernel_table.h"
#else
#define STS_KERNEL(name, ...) static_assert(true, "")
#endif

// Declares `type* name`, the dynamic shared memory of the launch, 16-byte aligned.
#ifdef STS_EMULATE
#define STS_DYNAMIC_SHARED(type, name) type* const name = static_cast<type*>(::emulator::dynamic_shared())
#else
#define STS_DYNAMIC_SHARED(type, name)                           \
  extern __shared__ __align__(16) unsigned char name##_bytes_[]; \
  type* const name = reinterpret_cast<type*>(name##_bytes_)
#endif

namespace sts {

// ---- host: launching ----

struct Launch {
  dim3 grid, block;
  size_t shared_bytes = 0;   // dynamic
  unsigned cluster = 1;      // blocks per cluster, along x
  bool cooperative = false;  // all blocks resident at once; the launch fails where they do not fit
  cudaStream_t stream = nullptr;
  bool overlap = false;  // blocks may start before the launch ahead ends, where the device can: the kernel begins with await_predecessor
};

template <class... Params>
const void* address_of(void (*kernel)(Params...)) {
  return reinterpret_cast<const void*>(kernel);
}

// The current device, or -1.
inline int current_device() {
  int device = -1;
  return cudaGetDevice(&device) == cudaSuccess ? device : -1;
}

// Raises the limit of dynamic shared memory where `bytes` is above it.
template <class... Params>
cudaError_t allow_shared(void (*kernel)(Params...), size_t bytes) {
  constexpr size_t kPreset = 48 * 1024;  // every kernel may use it
  return PlanCache::of_process().raise_limit(address_of(kernel), current_device(), bytes, kPreset, [&] {
    return cudaFuncSetAttribute(address_of(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
  });
}

#ifndef STS_EMULATE
// A launch as the runtime wants it described.
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
#endif

// Whether launches of `kernel` may overlap on the current device: its code was compiled for sm_90, so that it waits, and the driver can
// capture such launches into a graph.
template <class... Params>
bool may_overlap(void (*kernel)(Params...)) {
#ifdef STS_EMULATE
  return true;
#else
  return PlanCache::of_process().answer({address_of(kernel), current_device(), 0, 0, 0}, 0, [&](int& may) {
    constexpr int kGraphsFrom = 12030;
    cudaFuncAttributes attributes;
    int driver = 0;
    if (cudaFuncGetAttributes(&attributes, address_of(kernel)) != cudaSuccess || cudaDriverGetVersion(&driver) != cudaSuccess) return false;
    may = attributes.ptxVersion >= 90 && driver >= kGraphsFrom;
    return true;
  });
#endif
}

template <class... Params, class... Args>
cudaError_t launch(void (*kernel)(Params...), const Launch& shape, Args... args) {
  if (const cudaError_t error = allow_shared(kernel, shape.shared_bytes); error != cudaSuccess) return error;
#ifdef STS_EMULATE
  return emulator::launch(shape.grid, shape.block, shape.shared_bytes, shape.cluster, shape.cooperative, shape.overlap,
                          [=] { kernel(static_cast<Params>(args)...); });
#else
  const RuntimeLaunch runtime(shape, shape.overlap && may_overlap(kernel));
  return cudaLaunchKernelEx(&runtime.config, kernel, static_cast<Params>(args)...);
#endif
}

// SMs of the current device, at least 1.
inline int device_sm_count() {
  const int device = current_device();
  return PlanCache::of_process().answer({nullptr, device, 0, 0, 0}, 1, [&](int& count) {
    return cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device) == cudaSuccess && count > 0;
  });
}

// Blocks of `kernel` that are resident at once on the whole current device; 0 where it cannot run.
template <class... Params>
int max_resident_blocks(void (*kernel)(Params...), int threads, size_t shared_bytes) {
  const DriverQuestion question{address_of(kernel), current_device(), static_cast<unsigned>(threads), shared_bytes, 1};
  const int per_sm = PlanCache::of_process().answer(question, 0, [&](int& blocks) {
    return allow_shared(kernel, shared_bytes) == cudaSuccess &&
           cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, threads, shared_bytes) == cudaSuccess;
  });
  return per_sm * device_sm_count();
}

// Whether the current device can run a launch of `kernel` in clusters, and its code was compiled for devices that can.
template <class... Params>
bool clusters_fit(void (*kernel)(Params...), const Launch& shape) {
  const DriverQuestion question{address_of(kernel), current_device(), shape.block.x, shape.shared_bytes, shape.cluster};
  const int fit = PlanCache::of_process().answer(question, 0, [&](int& fit) {
#ifdef STS_EMULATE
    fit = emulator::clusters_fit(shape.cluster);
    return true;
#else
    const RuntimeLaunch runtime(shape);
    cudaFuncAttributes attributes;
    int resident = 0;
    bool answered = cudaFuncGetAttributes(&attributes, address_of(kernel)) == cudaSuccess;
    if (answered && attributes.ptxVersion >= 90)
      answered = allow_shared(kernel, shape.shared_bytes) == cudaSuccess &&
                 cudaOccupancyMaxActiveClusters(&resident, kernel, &runtime.config) == cudaSuccess;
    if (!answered) cudaGetLastError();  // a refusal is an answer here
    fit = resident > 0;
    return answered;
#endif
  });
  return fit != 0;
}

// ---- device: elements ----

__host__ __device__ __forceinline__ float to_float(float value) { return value; }
__host__ __device__ __forceinline__ float to_float(__half value) { return __half2float(value); }
__host__ __device__ __forceinline__ float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }
__host__ __device__ __forceinline__ void from_float(float value, float& element) { element = value; }
__host__ __device__ __forceinline__ void from_float(float value, __half& element) { element = __float2half_rn(value); }
__host__ __device__ __forceinline__ void from_float(float value, __nv_bfloat16& element) { element = __float2bfloat16_rn(value); }

// a - b of two elements in a word.
#ifdef STS_EMULATE
template <class T>
inline uint32_t subtract_pairs(uint32_t a, uint32_t b, T) {
  T x[2], y[2];
  memcpy(x, &a, 4), memcpy(y, &b, 4);
  for (int i = 0; i < 2; ++i) from_float(to_float(x[i]) - to_float(y[i]), x[i]);
  memcpy(&a, x, 4);
  return a;
}
#else
template <class T>
__device__ __forceinline__ uint32_t subtract_pairs(uint32_t a, uint32_t b, T) {
  std::conditional_t<std::is_same_v<T, __half>, __half2, __nv_bfloat162> x, y;
  memcpy(&x, &a, 4), memcpy(&y, &b, 4);
  x = __hsub2(x, y);
  memcpy(&a, &x, 4);
  return a;
}
#endif

// ---- device: launches that overlap (sm_90) ----

// The first statement of a kernel that Launch::overlap is for. Waits until the launch ahead on the stream has ended, and its writes are
// visible; and lets the blocks of the launch behind start, which then wait here.
__device__ __forceinline__ void await_predecessor() {
#ifdef STS_EMULATE
  emulator::await_predecessor();
#elif __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;\n\tgriddepcontrol.wait;" ::: "memory");
#endif
}

// ---- device: barriers between blocks ----

__device__ __forceinline__ unsigned load_acquire(const unsigned* address) {
#ifdef STS_EMULATE
  return emulator::load_acquire(address);
#else
  unsigned value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(address) : "memory");
  return value;
#endif
}

// Does not wait for the old value.
__device__ __forceinline__ void add_release(unsigned* address, unsigned value) {
#ifdef STS_EMULATE
  emulator::add_release(address, value);
#else
  asm volatile("red.add.release.gpu.global.u32 [%0], %1;" ::"l"(address), "r"(value) : "memory");
#endif
}

// To be called in every turn of a loop that waits for another block. Nothing on a GPU: a turn is one load from L2, and a sleep would only
// be added to it.
__device__ __forceinline__ void spin_pause() {
#ifdef STS_EMULATE
  emulator::spin_pause();
#endif
}

// A barrier of `blocks` resident blocks, all threads of each. What any of them wrote before is visible to all after it,
// to ordinary loads: not to __ldg. The counter is zero before the launch and is only ever added to, so one
// counter serves any number of barriers; the target may wrap around.
class GroupBarrier {
 public:
  __device__ GroupBarrier(unsigned* counter, unsigned blocks) : counter_(counter), blocks_(blocks) {}

  __device__ void sync() {
    target_ += blocks_;
    __syncthreads();
    if (threadIdx.x == 0 && threadIdx.y == 0 && threadIdx.z == 0) {
      add_release(counter_, 1);  // release is cumulative: it carries what the block wrote before __syncthreads
      while (static_cast<int>(load_acquire(counter_) - target_) < 0) spin_pause();
    }
    __syncthreads();
  }

 private:
  unsigned* counter_;
  unsigned blocks_;
  unsigned target_ = 0;
};

// ---- device: messages between the blocks of a cluster (sm_90) ----

#ifndef STS_EMULATE
// As instructions on shared memory take it.
__device__ __forceinline__ unsigned shared_address(const void* address) { return static_cast<unsigned>(__cvta_generic_to_shared(address)); }
#endif

// An mbarrier in the shared memory of the block that receives. A phase ends, and the next begins, when `count` arrivals and as many bytes
// as were expected with them have come. A sender has to know that the phase before has ended.
using Arrivals = unsigned long long;

// By one thread, before the block, or the cluster, synchronises for the first time.
__device__ __forceinline__ void init_arrivals(Arrivals* arrivals, int count = 1) {
#ifdef STS_EMULATE
  emulator::init_arrivals(arrivals, count);
#else
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;\n\tfence.mbarrier_init.release.cluster;" ::"r"(shared_address(arrivals)), "r"(count)
               : "memory");
#endif
}

// An arrival, and bytes to wait for in this phase.
__device__ __forceinline__ void expect_arrivals(Arrivals* arrivals, unsigned bytes) {
#ifdef STS_EMULATE
  emulator::expect_arrivals(arrivals, bytes);
#else
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(arrivals)), "r"(bytes) : "memory");
#endif
}

// An arrival alone: what the calling thread did before it is done for those who wait.
__device__ __forceinline__ void arrive(Arrivals* arrivals) {
#ifdef STS_EMULATE
  emulator::arrive(arrivals);
#else
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(arrivals)) : "memory");
#endif
}

// Waits for the end of a phase; they are counted from zero, and may be waited for until the next has ended. What was sent in it is
// then there.
__device__ __forceinline__ void await_arrivals(Arrivals* arrivals, int phase) {
#ifdef STS_EMULATE
  emulator::await_arrivals(arrivals, phase);
#else
  unsigned ended = 0;
  while (!ended)
    asm volatile(
        "{\n\t.reg .pred ended;\n\tmbarrier.try_wait.parity.shared::cta.b64 ended, [%1], %2;\n\tselp.u32 %0, 1, 0, ended;\n\t}"
        : "=r"(ended)
        : "r"(shared_address(arrivals)), "r"(phase & 1)
        : "memory");
#endif
}

// Writes 4 or 16 aligned bytes to the place in the shared memory of block `rank` of the cluster that `address` is in this block's, in the
// background, and counts them among its `arrivals`.
template <class T>
__device__ __forceinline__ void send(T* address, const T& value, Arrivals* arrivals, int rank) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 16, "4 or 16 bytes");
#ifdef STS_EMULATE
  const auto cluster = cooperative_groups::this_cluster();
  emulator::send(cluster.map_shared_rank(address, rank), value, cluster.map_shared_rank(arrivals, rank));
#else
  unsigned there, count_there, word[sizeof(T) / 4];
  memcpy(word, &value, sizeof(T));
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(shared_address(address)), "r"(rank));
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(count_there) : "r"(shared_address(arrivals)), "r"(rank));
  if constexpr (sizeof(T) == 4)
    asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.b32 [%0], %1, [%2];" ::"r"(there), "r"(word[0]), "r"(count_there)
                 : "memory");
  else
    asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(there), "r"(word[0]),
                 "r"(word[1]), "r"(word[2]), "r"(word[3]), "r"(count_there)
                 : "memory");
#endif
}

// ---- device: values the compiler would compute anew in every step of a loop ----

// A number that stays in a register.
__device__ __forceinline__ int settled(int value) {
#ifndef STS_EMULATE
  asm volatile("mov.u32 %0, %0;" : "+r"(value));
#endif
  return value;
}

// An address in global memory, likewise.
template <class T>
__device__ __forceinline__ const T* settled(const T* global) {
#ifndef STS_EMULATE
  asm volatile("mov.u64 %0, %0;" : "+l"(global));
#endif
  return global;
}

// An address in shared memory, likewise.
template <class T>
__device__ __forceinline__ T* settled_shared(T* shared) {
#ifndef STS_EMULATE
  unsigned address = shared_address(shared);
  asm volatile("mov.u32 %0, %0;" : "+r"(address));
  return static_cast<T*>(__cvta_shared_to_generic(address));
#else
  return shared;
#endif
}

// The same value, of which the compiler knows nothing: what follows from it is not computed ahead of a loop and kept in registers.
__device__ __forceinline__ int opaque(int value) {
#ifndef STS_EMULATE
  asm volatile("" : "+r"(value));
#endif
  return value;
}

// ---- device: asynchronous copies and tensor cores (sm_80) ----

// Starts a copy of 16 aligned bytes from global to shared memory, or of 16 zero bytes where `predicate` is false (then
// `source` is not read). It is complete for the calling thread after the cp_async_wait that covers its group.
__device__ __forceinline__ void cp_async_16(void* destination, const void* source, bool predicate) {
#ifdef STS_EMULATE
  emulator::cp_async_16(destination, source, predicate);
#else
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(destination)),
               "l"(source), "r"(predicate ? 16 : 0)
               : "memory");
#endif
}

__device__ __forceinline__ void cp_async_commit() {
#ifdef STS_EMULATE
  emulator::cp_async_commit();
#else
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits until at most the `Pending` latest groups of this thread are under way.
template <int Pending>
__device__ __forceinline__ void cp_async_wait() {
#ifdef STS_EMULATE
  emulator::cp_async_wait(Pending);
#else
  asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory");
#endif
}

// Four 8 x 8 matrices of 16-bit elements: lane l gives the address of row l % 8 of matrix l / 8, and receives of each
// matrix the elements 2 * (l % 4) and + 1 of row l / 4.
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], const void* shared_row) {
#ifdef STS_EMULATE
  emulator::ldmatrix_x4(r, shared_row);
#else
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(shared_row))
               : "memory");
#endif
}

// d += a b of a warp: a 16 x 16 row-major, b 16 x 8 column-major, of __half or __nv_bfloat16 (the tag), in float32.
#ifdef STS_EMULATE
template <class T>
inline void mma_16x8x16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], T = T()) {
  emulator::mma_16x8x16<T>(d, a, b);
}
#else
__device__ __forceinline__ void mma_16x8x16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], __half) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
__device__ __forceinline__ void mma_16x8x16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], __nv_bfloat16) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
#endif

}  // namespace sts
