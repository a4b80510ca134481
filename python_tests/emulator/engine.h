// Runs a grid of thread blocks on the CPU.
//
// The warps of a block run in skewed bursts, which exposes missing barriers. Blocks run one after another, in an order that kernels must
// not depend on. The blocks of a cluster, and all blocks of a cooperative launch, run concurrently on OS threads of their own. Under
// ThreadSanitizer all blocks are spread over two OS threads, unordered, so that it sees races between blocks. A barrier costs it time in
// proportion to the number of fibers, so there are no more threads.
// A launch reads the environment variables of Settings; README.md describes them.
//
// A kernel error (deadlock, divergent collective, misaligned access) ends the launch with std::runtime_error.
#pragma once
#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <iterator>
#include <memory>
#include <mutex>
#include <random>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "fiber.h"

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
inline thread_local dim3 gridDim, blockDim;  // of the running block; not macros, since cudaLaunchConfig_t has fields of these names

namespace emulator {

constexpr int kWarp = 32;

struct Settings {
  static constexpr int kForward = -1, kReverse = -2;
  int order;  // kForward, kReverse or a seed
  int multiprocessors, blocks_per_multiprocessor, stall_seconds, capability;
  int fill;  // byte of memory that nothing has been written to

  static Settings from_environment() {
    const char* order = std::getenv("STS_EMULATE_ORDER");
    const std::string kind = order && *order ? order : "fwd";
    return {kind == "fwd"   ? kForward
            : kind == "rev" ? kReverse
                            : number("STS_EMULATE_ORDER", 0, "fwd, rev or a number"),
            number("STS_EMULATE_SMS", 4),
            number("STS_EMULATE_BLOCKS_PER_SM", 2),
            number("STS_EMULATE_STALL_SECONDS", 10),
            number("STS_EMULATE_CAPABILITY", 90),
            number("STS_EMULATE_FILL", 0xff)};
  }

 private:
  static int number(const char* name, int preset, const char* expected = "a number") {
    const char* text = std::getenv(name);
    if (!text || !*text) return preset;
    char* end;
    const long value = std::strtol(text, &end, 10);
    if (*end || value < 0 || value > 1000000)
      throw std::invalid_argument(std::string(name) + ": expected " + expected + ", got '" + text + "'");
    return static_cast<int>(value);
  }
};

// A launch in progress.
struct Grid {
  dim3 grid, block;
  size_t shared_bytes = 0;
  unsigned cluster_size = 1;
  bool overlap = false;
  std::function<void()> body;
  Settings settings;
  std::mutex mutex;
  std::string error;  // the first error

  // All accesses are relaxed: the race checker must not take them for synchronisation of the kernel.
  bool failed() const { return failed_.load(std::memory_order_relaxed); }
  uint64_t progress() const { return progress_.load(std::memory_order_relaxed); }
  void note_progress() { progress_.fetch_add(1, std::memory_order_relaxed); }

  void fail(const std::string& message) {
    const std::lock_guard<std::mutex> lock(mutex);
    if (!failed()) error = message;
    failed_.store(true, std::memory_order_relaxed);
  }

 private:
  std::atomic<bool> failed_{false};
  std::atomic<uint64_t> progress_{0};  // increases when a thread makes progress, other than spinning
};

// A bounded wait of one OS thread for others. pause() returns true when the wait must be given up.
class Patience {
 public:
  explicit Patience(Grid& grid) : grid_(grid) {}
  bool pause() {
    if (grid_.failed()) return true;
    std::this_thread::yield();
    const auto now = std::chrono::steady_clock::now();
    const uint64_t progress = grid_.progress();
    if (progress != seen_) {
      seen_ = progress;
      since_ = now;
    }
    return std::chrono::duration<double>(now - since_).count() > grid_.settings.stall_seconds;
  }

 private:
  Grid& grid_;
  uint64_t seen_ = ~uint64_t(0);
  std::chrono::steady_clock::time_point since_;
};

// A barrier of blocks on OS threads. A block that has left is no longer waited for.
class BlockBarrier {
 public:
  explicit BlockBarrier(unsigned blocks) : expected_(blocks) {}

  bool arrive_and_wait(Grid& grid) {
    const uint64_t generation = arrive();
    Patience patience(grid);
    while (generation_ == generation)
      if (patience.pause()) return false;
    return true;
  }
  void leave() {
    const std::lock_guard<std::mutex> lock(mutex_);
    --expected_;
    complete();
  }

 private:
  uint64_t arrive() {
    const std::lock_guard<std::mutex> lock(mutex_);
    const uint64_t generation = generation_;
    ++arrived_;
    complete();
    return generation;
  }
  void complete() {
    if (arrived_ && arrived_ == expected_) {
      arrived_ = 0;
      ++generation_;
    }
  }

  std::mutex mutex_;
  unsigned expected_, arrived_ = 0;
  std::atomic<uint64_t> generation_{0};
};

struct Block;

struct Cluster {
  explicit Cluster(unsigned size) : barrier(size), exit(size), statics(size), dynamics(size), blocks(size) {}
  BlockBarrier barrier, exit;
  std::vector<char*> statics, dynamics;  // base address of the shared memory of each rank
  std::vector<Block*> blocks;            // of each rank, once it has started
  char clock[2];                         // for ThreadSanitizer, of the even and of the odd barriers
  char initialised;                      // the same, of mbarrier_init
};

// A lock that orders nothing for ThreadSanitizer.
class UnorderedLock {
 public:
  explicit UnorderedLock(std::atomic<bool>& held) : held_(held) {
    while (held_.exchange(true, kRaceChecker ? std::memory_order_relaxed : std::memory_order_acquire)) std::this_thread::yield();
    std::atomic_signal_fence(std::memory_order_seq_cst);
  }
  ~UnorderedLock() {
    std::atomic_signal_fence(std::memory_order_seq_cst);
    held_.store(false, kRaceChecker ? std::memory_order_relaxed : std::memory_order_release);
  }
  UnorderedLock(const UnorderedLock&) = delete;

 private:
  std::atomic<bool>& held_;
};

// Threads wait for the next generation. Even and odd generations have a clock each, so a thread that is one barrier ahead is not ordered
// with one that is behind.
struct Barrier {
  uint64_t generation = 0;
  int arrived = 0;
  char clock[2];
};

using Words = std::array<uint64_t, 3>;  // a lane's operand of a warp collective

struct WarpCollective {
  uint32_t mask = 0, arrived = 0;
  uint64_t generation = 0;
  int operation = 0;
  Words given[2][kWarp];
  char clock[2];
};

struct AsyncCopy {
  void* destination;
  const void* source;  // null: zeros
  int group;
};

// Tensor map of a TMA copy (sm_90): 2-byte elements (items, rows, parts, channels).
struct TensorMap {
  const char* data;
  int64_t channels, parts, rows, items, part_bytes;
  int box_rows;  // rows of a box, 128 bytes each
};

struct BoxCopy {
  void* destination;
  TensorMap map;
  int channel, part, row, item;
  unsigned long long* barrier;
};

struct Product {  // a wgmma in flight, one thread's part of it
  float* accumulators;
  int count, group;
  const char *a, *b;
  int k;
  bool add;
  void (*run)(const Product&);
  std::vector<float> start;  // accumulators before it, if it is the first product in flight that writes them
};

struct Thread {
  uint3 index;
  int linear = 0;
  bool done = false, spinning = false;
  bool awaited = false;                 // await_predecessor was called
  const uint64_t* waits_for = nullptr;  // blocked while *waits_for == waits_at
  uint64_t waits_at = 0;
  const char* where = "its start";  // for deadlock messages
  std::vector<AsyncCopy> copies;
  int copy_group = 0;
  std::vector<Product> products;
  int product_group = 0;
  Fiber* fiber = nullptr;

  bool blocked() const { return done || (waits_for && *waits_for == waits_at); }
};

inline thread_local Block* block = nullptr;
inline thread_local char shared_anchor = 0;  // lies in the same thread-local segment as every __shared__ variable

struct Block {
  Grid* grid;
  Cluster* cluster;
  uint3 index;
  unsigned rank;
  int alive, running = 0;
  bool progressed = false;
  std::vector<Thread> threads;
  Thread* first_thread;
  std::vector<std::vector<std::unique_ptr<WarpCollective>>> collectives;  // per warp, one for each mask
  Barrier barrier, cluster_barrier;
  std::vector<BoxCopy> boxes;  // copies under way into the shared memory of this block, also by other blocks
  std::atomic<bool> boxes_held{false};
  char boxes_clock;
  std::atomic<bool> has_ended{false};
  int votes[3] = {0, 0, 0};
  static constexpr size_t kSharedOffset = 128;
  std::unique_ptr<char, void (*)(void*)> allocation{nullptr, std::free};
  char* dynamic = nullptr;
  Context scheduler;
  char started, ended;  // clocks

  Block(Grid& grid, Cluster& cluster, unsigned linear, unsigned rank)
      : grid(&grid),
        cluster(&cluster),
        index{linear % grid.grid.x, linear / grid.grid.x % grid.grid.y, linear / grid.grid.x / grid.grid.y},
        rank(rank),
        alive(static_cast<int>(grid.block.x * grid.block.y * grid.block.z)),
        threads(static_cast<size_t>(alive)),
        first_thread(threads.data()),
        collectives((threads.size() + kWarp - 1) / kWarp) {
    // Exactly sized: AddressSanitizer sees accesses past its end. All ones by default: a read before the first write gives NaN.
    // As on a GPU, it has the same alignment in all blocks, which is not that of a swizzled box.
    if (grid.shared_bytes) {
      void* bytes = nullptr;
      if (posix_memalign(&bytes, 1024, kSharedOffset + grid.shared_bytes)) throw std::bad_alloc();
      allocation.reset(static_cast<char*>(bytes));
      dynamic = allocation.get() + kSharedOffset;
      std::memset(dynamic, grid.settings.fill, grid.shared_bytes);
    }
    cluster.dynamics[rank] = dynamic;
    cluster.statics[rank] = &shared_anchor;
    cluster.blocks[rank] = this;
  }

  void run(const Fibers& fibers);

 private:
  void run_warps(std::mt19937& random, std::vector<int>& order);
  bool run_warp(int warp, int flip);
  bool meet_cluster();
  std::string whereabouts() const;
};

EMULATOR_NO_TSAN inline Thread& self() { return block->first_thread[block->running]; }

// Ends the launch; the calling fiber never runs again.
[[noreturn]] inline void fail(const std::string& what) {
  {
    const Unchecked unchecked;
    const Thread& thread = self();
    const auto triple = [](uint3 i) { return std::to_string(i.x) + "," + std::to_string(i.y) + "," + std::to_string(i.z); };
    block->grid->fail(what + " [block " + triple(block->index) + " thread " + triple(thread.index) + "]");
  }
  for (;;) switch_context(self().fiber->context, block->scheduler);
}

// A thread of an overlapping launch must call this before anything else. Launches here run one after another, so only the order of the
// calls is checked.
inline void await_predecessor() {
  const Unchecked unchecked;
  self().awaited = true;
}
inline void check_awaited(const char* what) {
  const Unchecked unchecked;
  if (block->grid->overlap && !self().awaited) fail(std::string(what) + ": before await_predecessor");
}

// Runs other threads until `generation` differs from `value`.
inline void wait_while(const uint64_t& generation, uint64_t value, const char* where) {
  Thread& thread = self();
  thread.waits_for = &generation;
  thread.waits_at = value;
  thread.where = where;
  while (generation == value) switch_context(thread.fiber->context, block->scheduler);
  thread.waits_for = nullptr;
}

inline void spin_pause() {
  {
    const Unchecked unchecked;
    Thread& thread = self();
    thread.spinning = true;
    thread.where = "a spin loop";
    switch_context(thread.fiber->context, block->scheduler);
    thread.spinning = false;
  }
}

inline std::atomic<int64_t> barriers_passed{0};  // block barriers, by all blocks of all launches

inline void sync_block(const char* where = "__syncthreads") {
  check_awaited(where);
  const Unchecked unchecked;
  Barrier& barrier = block->barrier;
  const uint64_t generation = barrier.generation;
  release(&barrier.clock[generation & 1]);
  if (++barrier.arrived == block->alive) {
    barrier.arrived = 0;
    ++barrier.generation;
    barriers_passed.fetch_add(1, std::memory_order_relaxed);
  } else {
    wait_while(barrier.generation, generation, where);
  }
  acquire(&barrier.clock[generation & 1]);
}

// The scheduler completes it when all threads of the block have arrived.
inline void sync_cluster(const char* where = "cluster.sync", bool orders_memory = true) {
  check_awaited(where);
  const Unchecked unchecked;
  Barrier& barrier = block->cluster_barrier;
  const uint64_t generation = barrier.generation;
  char* clock = &block->cluster->clock[generation & 1];
  if (orders_memory) release(clock);
  ++barrier.arrived;
  wait_while(barrier.generation, generation, where);
  if (orders_memory) acquire(clock);
}

// Returns the operands of all lanes of `mask`, once all have arrived. Only __syncwarp orders memory; shuffles and votes do not.
inline const Words* exchange(uint32_t mask, const Words& words, int operation, const char* name, bool orders_memory = false) {
  check_awaited(name);
  const Unchecked unchecked;
  const Thread& thread = self();
  const int lane = thread.linear % kWarp, first = thread.linear - lane;
  const auto reject = [name](const char* what) { fail(std::string(name) + ": " + what); };
  if (!(mask >> lane & 1)) reject("the calling lane is not in its own mask");
  for (int l = 0; l < kWarp; ++l) {
    const int other = first + l;
    if ((mask >> l & 1) && (other >= static_cast<int>(block->threads.size()) || block->threads[other].done))
      reject("the mask names a lane that does not exist or has exited");
  }
  WarpCollective* collective = nullptr;
  auto& collectives = block->collectives[thread.linear / kWarp];
  for (const auto& candidate : collectives)
    if (candidate->mask == mask) collective = candidate.get();
  if (!collective) {
    collectives.push_back(std::make_unique<WarpCollective>());
    collective = collectives.back().get();
    collective->mask = mask;
  }
  if (collective->arrived && collective->operation != operation) reject("lanes of one warp are at different collectives");
  const uint64_t generation = collective->generation;
  char* clock = &collective->clock[generation & 1];
  collective->operation = operation;
  collective->given[generation & 1][lane] = words;
  collective->arrived |= 1u << lane;
  if (orders_memory) release(clock);
  if (collective->arrived == mask) {
    collective->arrived = 0;
    ++collective->generation;
  } else {
    wait_while(collective->generation, generation, name);
  }
  if (orders_memory) acquire(clock);
  return collective->given[generation & 1];
}

inline void* dynamic_shared() { return block->dynamic; }

// ---- the scheduler of a block ----

__attribute__((noinline)) inline void run_thread() {
  acquire(&block->started);
  block->grid->body();
  check_awaited("the end of a thread");
  {
    const Unchecked unchecked;
    self().done = true;
    --block->alive;
    Barrier& barrier = block->barrier;
    if (barrier.arrived && barrier.arrived == block->alive) {  // threads that have exited do not count
      barrier.arrived = 0;
      ++barrier.generation;
    }
  }
  release(&block->ended);
}

EMULATOR_NO_TSAN __attribute__((noinline)) inline void leave_thread() { switch_context(self().fiber->context, block->scheduler); }

// A fiber runs one thread after another, over many launches: ThreadSanitizer spends most of its time on creating fibers.
inline void fiber_main() {
  finish_switch(nullptr);
  for (;;) {
    run_thread();
    leave_thread();
  }
}

EMULATOR_NO_TSAN inline void Block::run(const Fibers& fibers) {
  const Unchecked unchecked;
  block = this;
  gridDim = grid->grid, blockDim = grid->block;
  adopt_thread(scheduler);
  const dim3 size = grid->block;
  for (size_t i = 0; i < threads.size(); ++i) {
    const unsigned linear = static_cast<unsigned>(i);
    threads[i].linear = static_cast<int>(i);
    threads[i].index = {linear % size.x, linear / size.x % size.y, linear / size.x / size.y};
    threads[i].fiber = fibers[i].get();
  }
  release(&started);
  std::mt19937 random(static_cast<unsigned>(grid->settings.order) + 7919 * (index.x + 31 * (index.y + 31 * index.z)));
  std::vector<int> order(collectives.size());
  for (size_t i = 0; i < order.size(); ++i) order[i] = static_cast<int>(i);
  Patience patience(*grid);
  while (alive && !grid->failed()) {
    progressed = false;
    run_warps(random, order);
    if (progressed || grid->failed()) {
      grid->note_progress();
      continue;
    }
    const bool spinning = std::any_of(threads.begin(), threads.end(), [](const Thread& t) { return t.spinning; });
    if (spinning) {
      if (patience.pause())
        grid->fail("deadlock: blocks wait for blocks that never come; " + whereabouts() +
                   " (only the blocks of a cooperative launch may wait for each other)");
    } else if (cluster_barrier.arrived == alive) {
      if (!cluster->barrier.arrive_and_wait(*grid)) grid->fail("deadlock: blocks of the cluster never come; " + whereabouts());
      cluster_barrier.arrived = 0;
      ++cluster_barrier.generation;
      grid->note_progress();
    } else {
      grid->fail("deadlock: " + whereabouts());
    }
  }
  acquire(&ended);
  has_ended.store(true, std::memory_order_relaxed);
  if (!boxes.empty()) grid->fail("a block ends before all copies into its shared memory have come");
  cluster->barrier.leave();
  cluster->exit.arrive_and_wait(*grid);  // other blocks may still access its shared memory
  for (const Thread& thread : threads)
    if (thread.fiber->overflowed()) grid->fail("a thread overflowed its stack of " + std::to_string(Fiber::kStack) + " bytes");
  block = nullptr;
}

// One pass over the warps. Random schedules shuffle the warps, start each at a random lane order, and run it up to `burst` times.
EMULATOR_NO_TSAN inline void Block::run_warps(std::mt19937& random, std::vector<int>& order) {
  const int kind = grid->settings.order, warps = static_cast<int>(order.size());
  if (kind >= 0)
    for (int i = warps - 1; i > 0; --i) std::swap(order[i], order[random() % (i + 1)]);
  for (int i = 0; i < warps; ++i) {
    const int warp = kind == Settings::kReverse ? warps - 1 - i : order[i];
    const int flip = kind >= 0 ? static_cast<int>(random() % kWarp) : kind == Settings::kReverse ? kWarp - 1 : 0;
    const uint32_t burst = kind >= 0 ? 1u << random() % 8 : ~0u;
    for (uint32_t step = 0; step < burst && run_warp(warp, flip); ++step) {
    }
  }
}

// Runs each lane that is not blocked until it waits. Returns whether any made progress. flip: exclusive or on the order of the lanes.
EMULATOR_NO_TSAN inline bool Block::run_warp(int warp, int flip) {
  bool any = false;
  for (int l = 0; l < kWarp; ++l) {
    const size_t linear = static_cast<size_t>(warp * kWarp + (l ^ flip));
    if (linear >= threads.size() || threads[linear].blocked()) continue;
    running = static_cast<int>(linear);
    switch_context(scheduler, threads[linear].fiber->context);
    if (grid->failed()) return false;
    if (!threads[linear].spinning) any = progressed = true;
  }
  return any;
}

inline std::string Block::whereabouts() const {
  std::vector<std::pair<std::string, std::vector<int>>> groups;
  for (const Thread& thread : threads) {
    if (thread.done) continue;
    auto group = std::find_if(groups.begin(), groups.end(), [&](const auto& p) { return p.first == thread.where; });
    if (group == groups.end()) group = groups.insert(groups.end(), {thread.where, {}});
    group->second.push_back(thread.linear);
  }
  std::string text;
  for (const auto& [where, waiting] : groups)
    text += (text.empty() ? "" : ", ") + std::to_string(waiting.size()) + " threads (first " + std::to_string(waiting.front()) +
            ") wait at " + where;
  return text + " [block " + std::to_string(index.x) + "," + std::to_string(index.y) + "," + std::to_string(index.z) + "]";
}

// ---- a grid ----

inline void run_grid(Grid& grid, bool cooperative) {
  const unsigned blocks = grid.grid.x * grid.grid.y * grid.grid.z, size = grid.cluster_size;
  const unsigned concurrent = cooperative ? blocks : size > 1 ? size : kRaceChecker ? std::min(2u, blocks) : 1;
  std::vector<unsigned> order(blocks / size);
  for (unsigned i = 0; i < order.size(); ++i) order[i] = i;
  if (grid.settings.order == Settings::kReverse) std::reverse(order.begin(), order.end());
  if (grid.settings.order >= 0) std::shuffle(order.begin(), order.end(), std::mt19937(grid.settings.order));
  std::vector<std::unique_ptr<Cluster>> clusters;
  for (unsigned i = 0; i < order.size(); ++i) clusters.push_back(std::make_unique<Cluster>(size));
  // Fibers leave the pool before all blocks run, and return after: the pool must not order the blocks of this launch.
  static std::mutex one_launch;
  const std::lock_guard<std::mutex> lock(one_launch);
  static Fibers pool;
  std::vector<Fibers> fibers(concurrent);
  for (Fibers& block_fibers : fibers)
    while (block_fibers.size() < size_t(grid.block.x) * grid.block.y * grid.block.z) {
      if (pool.empty()) pool.push_back(std::make_unique<Fiber>(fiber_main));
      block_fibers.push_back(std::move(pool.back()));
      pool.pop_back();
    }
  const auto work = [&](unsigned first) {
    for (unsigned i = first; i < blocks && !grid.failed(); i += concurrent) {
      const unsigned cluster = order[i / size], rank = i % size;
      Block(grid, *clusters[cluster], cluster * size + rank, rank).run(fibers[first]);
    }
  };
  if (concurrent == 1) {
    work(0);
  } else {
    std::vector<std::thread> threads;
    for (unsigned i = 0; i < concurrent; ++i) threads.emplace_back(work, i);
    for (auto& thread : threads) thread.join();
  }
  if (!grid.failed())  // else some fibers are suspended inside a kernel
    for (Fibers& block_fibers : fibers) std::move(block_fibers.begin(), block_fibers.end(), std::back_inserter(pool));
  if (grid.failed()) throw std::runtime_error("emulated kernel: " + grid.error);
}

}  // namespace emulator
