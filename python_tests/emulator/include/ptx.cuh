// Replaces csrc/cuda/nvidia/ptx.cuh, which documents the functions. Asynchronous copies complete as late as the program allows, so that a
// missing wait is seen.
#pragma once
#include "../cuda_on_cpu.h"

#define STS_DYNAMIC_SHARED(type, name) type* const name = static_cast<type*>(::emulator::dynamic_shared())

namespace sts {

inline void await_predecessor() { emulator::await_predecessor(); }

// ---- flags in global memory ----

inline unsigned load_acquire(const unsigned* address) { return __atomic_load_n(address, __ATOMIC_ACQUIRE); }
inline void add_release(unsigned* address, unsigned value) { __atomic_fetch_add(address, value, __ATOMIC_RELEASE); }
inline void spin_pause() { emulator::spin_pause(); }

// ---- mbarriers, and messages between the blocks of a cluster ----

using Mbarrier = unsigned long long;

}  // namespace sts

namespace emulator {

inline std::atomic<int64_t> phases_begun{0};  // mbarrier phases, by all blocks of all launches

// An mbarrier. bytes: expected minus arrived, negative if stores arrive before they are expected. count: arrivals per phase. left: arrivals
// that this phase still waits for. phase: its number.
struct MbarrierState {
  int32_t bytes;
  uint8_t count, left;
  uint16_t phase;
};

// Applies `update` to the state, and begins the next phase if the current one is complete. ThreadSanitizer's clock of a phase orders its
// arrivals and stores before the return of those that wait for it.
template <class Update>
void update_mbarrier(sts::Mbarrier* barrier, const char* what, Update update) {
  check_aligned(barrier, what);
  const Unchecked unchecked;
  for (unsigned long long old = __atomic_load_n(barrier, __ATOMIC_RELAXED);;) {
    auto state = std::bit_cast<MbarrierState>(old);
    release(reinterpret_cast<char*>(barrier) + (state.phase & 1));
    update(state);
    if (state.left == 0 && state.bytes < 0) fail(std::string(what) + ": more bytes have come than were expected");
    if (state.left == 0 && state.bytes == 0) state = {0, state.count, state.count, static_cast<uint16_t>(state.phase + 1)};
    if (__atomic_compare_exchange_n(barrier, &old, std::bit_cast<unsigned long long>(state), false, __ATOMIC_RELAXED, __ATOMIC_RELAXED))
      return;
  }
}

void land_copies(Block& to, sts::Mbarrier* barrier);  // hopper.cuh

}  // namespace emulator

namespace sts {

inline void mbarrier_init(Mbarrier* barrier, int count = 1) {
  emulator::check_aligned(barrier, "mbarrier_init");
  if (count < 1 || count > 255) emulator::fail("mbarrier_init: the emulator counts to 255");
  const auto expected = static_cast<uint8_t>(count);
  *barrier = std::bit_cast<unsigned long long>(emulator::MbarrierState{0, expected, expected, 0});
  emulator::release(&emulator::block->cluster->initialised);
}
inline void meet_cluster() {
  emulator::exchange(~0u, {}, 14, "meet_cluster");
  emulator::sync_cluster("meet_cluster", false);
  emulator::acquire(&emulator::block->cluster->initialised);
}
inline void mbarrier_expect_tx(Mbarrier* barrier, unsigned bytes) {
  emulator::phases_begun.fetch_add(1, std::memory_order_relaxed);
  emulator::update_mbarrier(barrier, "mbarrier_expect_tx", [bytes](emulator::MbarrierState& state) {
    if (state.left == 0) emulator::fail("mbarrier_expect_tx: more arrivals than the phase counts");
    --state.left;
    state.bytes += static_cast<int32_t>(bytes);
  });
}
inline void mbarrier_arrive(Mbarrier* barrier) {
  emulator::update_mbarrier(barrier, "mbarrier_arrive", [](emulator::MbarrierState& state) {
    if (state.left == 0) emulator::fail("mbarrier_arrive: more arrivals than the phase counts");
    --state.left;
  });
}
inline void mbarrier_arrive_at(Mbarrier* barrier, int rank) {
  mbarrier_arrive(cooperative_groups::this_cluster().map_shared_rank(barrier, rank));
}
inline void mbarrier_wait(Mbarrier* barrier, int phase) {
  emulator::check_aligned(barrier, "mbarrier_wait");
  for (;;) {
    emulator::land_copies(*emulator::block, barrier);
    if ((std::bit_cast<emulator::MbarrierState>(__atomic_load_n(barrier, __ATOMIC_RELAXED)).phase & 1) != (phase & 1)) break;
    spin_pause();
  }
  emulator::acquire(reinterpret_cast<char*>(barrier) + (phase & 1));
}
template <class T>
void store_async(T* address, const T& value, Mbarrier* barrier, int rank) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 16, "4 or 16 bytes");
  const auto cluster = cooperative_groups::this_cluster();
  T* const remote = cluster.map_shared_rank(address, rank);
  if (reinterpret_cast<uintptr_t>(remote) % sizeof(T)) emulator::fail("store_async: misaligned address");
  *remote = value;
  emulator::update_mbarrier(cluster.map_shared_rank(barrier, rank), "store_async",
                            [](emulator::MbarrierState& state) { state.bytes -= static_cast<int32_t>(sizeof(T)); });
}

// ---- hints to nvcc's optimiser: no effect here ----

inline int settled(int value) { return value; }
template <class T>
const T* settled(const T* global) {
  return global;
}
template <class T>
T* settled_shared(T* shared) {
  return shared;
}
inline int opaque(int value) { return value; }

// ---- asynchronous copies and tensor cores ----

// A copy completes in the wait that covers it, so that a missing wait or commit is seen. Until then the destination holds NaNs, tiny
// numbers or its old values, depending on the schedule. So a copy that starts while its destination is still being read is seen, too.
inline void cp_async_16(void* destination, const void* source, bool predicate) {
  emulator::check_awaited("cp_async_16");
  if (reinterpret_cast<uintptr_t>(destination) % 16) emulator::fail("cp_async_16: misaligned destination");
  if (predicate && reinterpret_cast<uintptr_t>(source) % 16) emulator::fail("cp_async_16: misaligned source");
  const int order = emulator::block->grid->settings.order;
  if (order != emulator::Settings::kReverse) std::memset(destination, order == emulator::Settings::kForward ? 0xff : 0x20, 16);
  const emulator::Unchecked unchecked;
  emulator::Thread& thread = emulator::self();
  for (const emulator::AsyncCopy& copy : thread.copies)
    if (copy.destination == destination) emulator::fail("cp_async_16: an earlier copy to the same place is under way");
  thread.copies.push_back({destination, predicate ? source : nullptr, thread.copy_group});
}
inline void cp_async_commit() {
  const emulator::Unchecked unchecked;
  ++emulator::self().copy_group;
}
template <int Pending>
void cp_async_wait() {
  emulator::Thread& thread = emulator::self();
  size_t landed = 0;
  for (; landed < thread.copies.size() && thread.copies[landed].group < thread.copy_group - Pending; ++landed) {
    const emulator::AsyncCopy copy = thread.copies[landed];
    if (copy.source)
      std::memcpy(copy.destination, copy.source, 16);
    else
      std::memset(copy.destination, 0, 16);
  }
  thread.copies.erase(thread.copies.begin(), thread.copies.begin() + static_cast<std::ptrdiff_t>(landed));
}

inline void ldmatrix_x4(uint32_t (&r)[4], const void* shared_row) {
  if (reinterpret_cast<uintptr_t>(shared_row) % 16) emulator::fail("ldmatrix: misaligned row");
  const emulator::Words* rows = emulator::exchange(~0u, emulator::pack(shared_row), 10, "ldmatrix");
  for (int matrix = 0; matrix < 4; ++matrix) {
    const auto row = emulator::unpack<const char*>(rows[8 * matrix + emulator::lane() / 4]);
    std::memcpy(&r[matrix], row + 4 * (emulator::lane() % 4), 4);
  }
}

// Fragment layouts are those of PTX's mma.m16n8k16. Products are exact, summed in double precision and rounded once.
template <class T>
void mma_16x8x16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], T = T()) {
  emulator::Words given;
  std::memcpy(&given[0], a, 16);
  std::memcpy(&given[2], b, 8);
  const emulator::Words* lanes = emulator::exchange(~0u, given, 11, "mma");
  const auto half = [&](int from, int fragment, int odd) {
    const uint32_t pair = static_cast<uint32_t>(lanes[from][fragment / 2] >> 32 * (fragment % 2));
    return number_of(static_cast<uint16_t>(pair >> 16 * odd), T());
  };
  const auto a_at = [&](int row, int k) { return half(row % 8 * 4 + k % 8 / 2, row / 8 + 2 * (k / 8), k % 2); };
  const auto b_at = [&](int k, int column) { return half(column * 4 + k % 8 / 2, 4 + k / 8, k % 2); };
  for (int i = 0; i < 4; ++i) {
    const int row = emulator::lane() / 4 + 8 * (i / 2), column = emulator::lane() % 4 * 2 + i % 2;
    double sum = d[i];
    for (int k = 0; k < 16; ++k) sum += double(a_at(row, k)) * b_at(k, column);
    d[i] = static_cast<float>(sum);
  }
}

}  // namespace sts
