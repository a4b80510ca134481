// Instructions without a CUDA C++ function, as one function each. The emulator has a file of this name with the same functions
// (python_tests/emulator/include); the include path of a build selects one of the two.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>

// Declares `type* name`, the dynamic shared memory of the launch, 16-byte aligned.
#define STS_DYNAMIC_SHARED(type, name)                           \
  extern __shared__ __align__(16) unsigned char name##_bytes_[]; \
  type* const name = reinterpret_cast<type*>(name##_bytes_)

namespace sts {

// 32-bit address in shared memory, the operand of PTX instructions.
__device__ __forceinline__ unsigned shared_address(const void* address) { return static_cast<unsigned>(__cvta_generic_to_shared(address)); }

// ---- programmatic dependent launch (sm_90) ----

// The first statement of a kernel that is launched with Launch::overlap. Waits until the previous launch on the stream has ended and its
// writes are visible. Also allows the blocks of the next launch to start; these then wait here.
// nvcc may move a load by __ldg across the wait, whatever the asm clobbers. .ci/check_cubins.py finds loads above it in the machine code.
__device__ __forceinline__ void await_predecessor() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;\n\tgriddepcontrol.wait;" ::: "memory");
#endif
}

// ---- flags in global memory ----

__device__ __forceinline__ unsigned load_acquire(const unsigned* address) {
  unsigned value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(address) : "memory");
  return value;
}

// A reduction: unlike an atomic, it returns no old value to wait for.
__device__ __forceinline__ void add_release(unsigned* address, unsigned value) {
  asm volatile("red.add.release.gpu.global.u32 [%0], %1;" ::"l"(address), "r"(value) : "memory");
}

// Called in every iteration of a loop that waits for another block. Does nothing on a GPU: an iteration is one load from L2, and a sleep
// would add latency. The emulator runs other threads.
__device__ __forceinline__ void spin_pause() {}

// ---- mbarriers, and messages between the blocks of a cluster (sm_90) ----

// An mbarrier in the shared memory of the receiving block. A phase completes, and the next begins, after `count` arrivals and after all
// bytes that these arrivals expected. Precondition of sending: the previous phase is complete.
using Mbarrier = unsigned long long;

// By one thread, before the first barrier of the block or meet_cluster. The fence makes the mbarrier visible to the whole cluster.
__device__ __forceinline__ void mbarrier_init(Mbarrier* barrier, int count = 1) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;\n\tfence.mbarrier_init.release.cluster;" ::"r"(shared_address(barrier)), "r"(count)
               : "memory");
}

// Barrier of all threads of the cluster, called by whole warps. It orders no memory but mbarrier_init: a cluster barrier that does is a
// fence of the device, and takes seven times as long.
__device__ __forceinline__ void meet_cluster() {
  __syncwarp();
  asm volatile("barrier.cluster.arrive.relaxed.aligned;\n\tbarrier.cluster.wait.aligned;" ::: "memory");
}

// Arrives, and adds `bytes` to the bytes that the current phase expects.
__device__ __forceinline__ void mbarrier_expect_tx(Mbarrier* barrier, unsigned bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes) : "memory");
}

// Arrives. Reads and writes of the calling thread before it are complete for threads that wait for the phase.
__device__ __forceinline__ void mbarrier_arrive(Mbarrier* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}

// Arrives at the mbarrier that lies at the same offset in block `rank` of the cluster.
__device__ __forceinline__ void mbarrier_arrive_at(Mbarrier* barrier, int rank) {
  unsigned remote;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(shared_address(barrier)), "r"(rank));
  asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(remote) : "memory");
}

// Waits until phase number `phase`, counted from 0, is complete; its bytes have then arrived. Only the parity is tested, so the next phase
// must not be complete yet. The acquire has the default scope, .cta, also for store_async of other blocks: what they wrote is in shared
// memory of this block, which no cache holds. Scope .cluster would invalidate L1 in every iteration of the wait (CCTL.IVALL).
__device__ __forceinline__ void mbarrier_wait(Mbarrier* barrier, int phase) {
  unsigned ended = 0;
  while (!ended)
    asm volatile("{\n\t.reg .pred ended;\n\tmbarrier.try_wait.parity.shared::cta.b64 ended, [%1], %2;\n\tselp.u32 %0, 1, 0, ended;\n\t}"
                 : "=r"(ended)
                 : "r"(shared_address(barrier)), "r"(phase & 1)
                 : "memory");
}

// Asynchronous DSMEM store of 4 or 16 aligned bytes to block `rank` of the cluster. `address` and `barrier` are addresses of this block;
// the same offsets of block `rank` are written, and its mbarrier counts the bytes.
template <class T>
__device__ __forceinline__ void store_async(T* address, const T& value, Mbarrier* barrier, int rank) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 16, "4 or 16 bytes");
  unsigned remote_address, remote_barrier, word[sizeof(T) / 4];
  memcpy(word, &value, sizeof(T));
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote_address) : "r"(shared_address(address)), "r"(rank));
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote_barrier) : "r"(shared_address(barrier)), "r"(rank));
  if constexpr (sizeof(T) == 4)
    asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.b32 [%0], %1, [%2];" ::"r"(remote_address), "r"(word[0]),
                 "r"(remote_barrier)
                 : "memory");
  else
    asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(remote_address),
                 "r"(word[0]), "r"(word[1]), "r"(word[2]), "r"(word[3]), "r"(remote_barrier)
                 : "memory");
}

// ---- values that the compiler must not recompute in every iteration, or hoist out of a loop ----

// The value from an opaque move: the compiler keeps it in a register, since it cannot recompute it.
__device__ __forceinline__ int settled(int value) {
  asm volatile("mov.u32 %0, %0;" : "+r"(value));
  return value;
}

// The same for an address in global memory.
template <class T>
__device__ __forceinline__ const T* settled(const T* global) {
  asm volatile("mov.u64 %0, %0;" : "+l"(global));
  return global;
}

// The same for an address in shared memory.
template <class T>
__device__ __forceinline__ T* settled_shared(T* shared) {
  unsigned address = shared_address(shared);
  asm volatile("mov.u32 %0, %0;" : "+r"(address));
  return static_cast<T*>(__cvta_shared_to_generic(address));
}

// The value, hidden from the optimiser: expressions of it are not hoisted out of a loop, where they would occupy registers.
__device__ __forceinline__ int opaque(int value) {
  asm volatile("" : "+r"(value));
  return value;
}

// ---- asynchronous copies and tensor cores (sm_80) ----

// Starts a copy of 16 aligned bytes from global to shared memory. If `predicate` is false it writes zeros, and does not read `source`. The
// copy is complete for the calling thread after the cp_async_wait that covers its group.
__device__ __forceinline__ void cp_async_16(void* destination, const void* source, bool predicate) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(destination)), "l"(source), "r"(predicate ? 16 : 0)
               : "memory");
}

// Closes the current group of copies of this thread.
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most the `Pending` latest groups of this thread are in flight.
template <int Pending>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory");
}

// Loads fragments of four 8 x 8 matrices of 16-bit elements. Lane l passes the address of row l % 8 of matrix l / 8, and receives the
// elements 2 (l % 4) and 2 (l % 4) + 1 of row l / 4 of each matrix.
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], const void* shared_row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(shared_row))
               : "memory");
}

// d += a b by a warp, with float32 accumulators: a (16, 16) row-major, b (16, 8) column-major, of __half or __nv_bfloat16 (the tag).
__device__ __forceinline__ void mma_16x8x16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], __half) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
__device__ __forceinline__ void mma_16x8x16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], __nv_bfloat16) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

}  // namespace sts
