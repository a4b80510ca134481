// Instructions that CUDA C++ has no function for, one function each. The emulator has a file of this name with the same functions
// (python_tests/emulator/include): which of the two a build takes is its include path.
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

// An address in shared memory, as instructions take it.
__device__ __forceinline__ unsigned shared_address(const void* address) { return static_cast<unsigned>(__cvta_generic_to_shared(address)); }

// ---- programmatic dependent launch (sm_90) ----

// The first statement of a kernel that Launch::overlap is for. Waits until the launch ahead on the stream has ended, and its writes are
// visible; and lets the blocks of the launch behind start, which then wait here.
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

// Does not wait for the old value.
__device__ __forceinline__ void add_release(unsigned* address, unsigned value) {
  asm volatile("red.add.release.gpu.global.u32 [%0], %1;" ::"l"(address), "r"(value) : "memory");
}

// To be called in every turn of a loop that waits for another block. Nothing on a GPU: a turn is one load from L2, and a sleep would only
// be added to it.
__device__ __forceinline__ void spin_pause() {}

// ---- mbarriers, and messages between the blocks of a cluster (sm_90) ----

// An mbarrier in the shared memory of the block that receives. A phase ends, and the next begins, when `count` arrivals and as many bytes
// as were expected with them have come. A sender has to know that the phase before has ended.
using Mbarrier = unsigned long long;

// By one thread, before the block, or the cluster, synchronises for the first time.
__device__ __forceinline__ void mbarrier_init(Mbarrier* arrivals, int count = 1) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;\n\tfence.mbarrier_init.release.cluster;" ::"r"(shared_address(arrivals)), "r"(count)
               : "memory");
}

// An arrival, and bytes to wait for in this phase.
__device__ __forceinline__ void mbarrier_expect_tx(Mbarrier* arrivals, unsigned bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(arrivals)), "r"(bytes) : "memory");
}

// An arrival alone: what the calling thread did before it is done for those who wait.
__device__ __forceinline__ void mbarrier_arrive(Mbarrier* arrivals) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(arrivals)) : "memory");
}

// Waits for the end of a phase; they are counted from zero, and may be waited for until the next has ended. What was sent in it is
// then there.
__device__ __forceinline__ void mbarrier_wait(Mbarrier* arrivals, int phase) {
  unsigned ended = 0;
  while (!ended)
    asm volatile("{\n\t.reg .pred ended;\n\tmbarrier.try_wait.parity.shared::cta.b64 ended, [%1], %2;\n\tselp.u32 %0, 1, 0, ended;\n\t}"
                 : "=r"(ended)
                 : "r"(shared_address(arrivals)), "r"(phase & 1)
                 : "memory");
}

// Writes 4 or 16 aligned bytes to the place in the shared memory of block `rank` of the cluster that `address` is in this block's, in the
// background, and counts them among its `arrivals`.
template <class T>
__device__ __forceinline__ void store_async(T* address, const T& value, Mbarrier* arrivals, int rank) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 16, "4 or 16 bytes");
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
}

// ---- values the compiler would compute anew in every step of a loop ----

// A number that stays in a register.
__device__ __forceinline__ int settled(int value) {
  asm volatile("mov.u32 %0, %0;" : "+r"(value));
  return value;
}

// An address in global memory, likewise.
template <class T>
__device__ __forceinline__ const T* settled(const T* global) {
  asm volatile("mov.u64 %0, %0;" : "+l"(global));
  return global;
}

// An address in shared memory, likewise.
template <class T>
__device__ __forceinline__ T* settled_shared(T* shared) {
  unsigned address = shared_address(shared);
  asm volatile("mov.u32 %0, %0;" : "+r"(address));
  return static_cast<T*>(__cvta_shared_to_generic(address));
}

// The same value, of which the compiler knows nothing: what follows from it is not computed ahead of a loop and kept in registers.
__device__ __forceinline__ int opaque(int value) {
  asm volatile("" : "+r"(value));
  return value;
}

// ---- asynchronous copies and tensor cores (sm_80) ----

// Starts a copy of 16 aligned bytes from global to shared memory, or of 16 zero bytes where `predicate` is false (then
// `source` is not read). It is complete for the calling thread after the cp_async_wait that covers its group.
__device__ __forceinline__ void cp_async_16(void* destination, const void* source, bool predicate) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(destination)), "l"(source), "r"(predicate ? 16 : 0)
               : "memory");
}

__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most the `Pending` latest groups of this thread are under way.
template <int Pending>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory");
}

// Four 8 x 8 matrices of 16-bit elements: lane l gives the address of row l % 8 of matrix l / 8, and receives of each
// matrix the elements 2 * (l % 4) and + 1 of row l / 4.
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], const void* shared_row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(shared_row))
               : "memory");
}

// d += a b of a warp: a 16 x 16 row-major, b 16 x 8 column-major, of __half or __nv_bfloat16 (the tag), in float32.
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
