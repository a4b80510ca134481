// Replaces csrc/cuda/nvidia/hopper.cuh, which documents the functions.
#pragma once
#include "device.cuh"

#define STS_HOPPER 1
#define __grid_constant__

namespace sts {

constexpr int hopper_threads(int threads) { return threads; }

template <class... Params>
bool kernel_serves(void (*)(Params...), int) {
  return emulator::Settings::from_environment().capability >= 90;
}

using TensorMap = emulator::TensorMap;
constexpr int kBoxChannels = 64;  // of 2 bytes: 128 bytes per row of a box

inline cudaError_t make_tensor_map(const void* data, int64_t channels, int parts, int64_t rows, int64_t items, int64_t pitch, int box_rows,
                                   TensorMap& map) {
  if (reinterpret_cast<uintptr_t>(data) % 16 || pitch % 8 || box_rows > 256) return cudaErrorInvalidValue;
  map = {static_cast<const char*>(data), channels, parts, rows, items, pitch * 2, box_rows};
  return cudaSuccess;
}

template <int kRegisters>
void give_registers() {}
template <int kRegisters>
void take_registers() {}

}  // namespace sts

namespace emulator {

inline void land_copies(Block& to, sts::Mbarrier* barrier) {
  for (;;) {
    BoxCopy copy{};
    {
      const Unchecked unchecked;
      const UnorderedLock lock(to.boxes_held);
      const auto found = std::find_if(to.boxes.begin(), to.boxes.end(), [=](const BoxCopy& c) { return c.barrier == barrier; });
      if (found == to.boxes.end()) return;
      copy = *found;
      to.boxes.erase(found);
      acquire(&to.boxes_clock);
    }
    const TensorMap& map = copy.map;
    for (int r = 0; r < map.box_rows; ++r)
      for (int vec = 0; vec < sts::kBoxChannels / 8; ++vec) {
        char* const to = static_cast<char*>(copy.destination) + r * sts::kBoxChannels * 2 + (vec ^ (r & 7)) * 16;
        const int64_t row = copy.row + r, channel = copy.channel + vec * 8;
        const int64_t inside = row < 0 || row >= map.rows ? 0 : std::clamp<int64_t>(map.channels - channel, 0, 8);
        std::memset(to, 0, 16);
        const int64_t part = (copy.item * map.rows + row) * map.parts + copy.part;
        if (inside) std::memcpy(to, map.data + part * map.part_bytes + channel * 2, static_cast<size_t>(inside) * 2);
      }
    const auto bytes = static_cast<int32_t>(map.box_rows * sts::kBoxChannels * 2);
    update_mbarrier(barrier, "copy_box", [bytes](MbarrierState& state) { state.bytes -= bytes; });
  }
}

// Products read shared memory and write their accumulators in the wait that covers them, as late as allowed. Until then the accumulators
// are NaNs.
template <class T>
void multiply(const Product& product) {
  const auto read = [&product](const char* matrix, int row, double (&x)[16]) {
    for (int vec = 0; vec < 2; ++vec) {
      uint16_t bits[8];
      std::memcpy(bits, matrix + row * sts::kBoxChannels * 2 + ((product.k * 2 + vec) ^ (row & 7)) * 16, 16);
      for (int c = 0; c < 8; ++c) x[vec * 8 + c] = number_of(bits[c], T());
    }
  };
  const int row = self().linear % 128 / kWarp * 16 + lane() / 4, column = lane() % 4 * 2;
  double x[2][16], y[16];
  for (int h = 0; h < 2; ++h) read(product.a, row + 8 * h, x[h]);
  for (int j = 0; j < product.count / 2; ++j) {
    read(product.b, j / 2 * 8 + column + j % 2, y);
    for (int h = 0; h < 2; ++h) {
      float& sum = product.accumulators[j / 2 * 4 + h * 2 + j % 2];
      double exact = product.add ? sum : 0;
      for (int c = 0; c < 16; ++c) exact += x[h][c] * y[c];
      sum = static_cast<float>(exact);
    }
  }
}
inline void hide(Product& product) {
  product.start.assign(product.accumulators, product.accumulators + product.count);
  std::fill(product.accumulators, product.accumulators + product.count, std::bit_cast<float>(0x7fffffffu));
}

}  // namespace emulator

namespace sts {

// A copy completes when a thread waits for its mbarrier, or at once in the schedule kReverse. Until then the destination holds NaNs or tiny
// numbers, as in cp_async_16. to: the block of `destination` and `barrier`.
inline void copy_box_to(emulator::Block& to, void* destination, const TensorMap& map, int channel, int part, int row, int item,
                        Mbarrier* barrier) {
  if (reinterpret_cast<uintptr_t>(destination) % 1024) emulator::fail("copy_box: a swizzled box starts on 1024 bytes");
  if (channel % 8 || part < 0 || part >= map.parts || item < 0 || item >= map.items) emulator::fail("copy_box: outside the tensor");
  const int order = emulator::block->grid->settings.order;
  const size_t bytes = static_cast<size_t>(map.box_rows) * kBoxChannels * 2;
  if (order != emulator::Settings::kReverse) std::memset(destination, order == emulator::Settings::kForward ? 0xff : 0x20, bytes);
  bool under_way = false;
  {
    const emulator::Unchecked unchecked;
    const emulator::UnorderedLock lock(to.boxes_held);
    for (const emulator::BoxCopy& copy : to.boxes) under_way = under_way || copy.destination == destination;
    to.boxes.push_back({destination, map, channel, part, row, item, barrier});
    emulator::release(&to.boxes_clock);
  }
  if (under_way) emulator::fail("copy_box: an earlier copy to the same place is under way");
  if (order == emulator::Settings::kReverse) emulator::land_copies(to, barrier);
}
inline void copy_box(void* destination, const TensorMap& map, int channel, int part, int row, int item, Mbarrier* barrier) {
  copy_box_to(*emulator::block, destination, map, channel, part, row, item, barrier);
}
inline void multicast_box(void* destination, const TensorMap& map, int channel, int part, int row, int item, Mbarrier* barrier,
                          int blocks) {
  const auto cluster = cooperative_groups::this_cluster();
  const auto block_of = [](int rank) {
    const emulator::Unchecked unchecked;
    return emulator::block->cluster->blocks[static_cast<size_t>(rank)];
  };
  for (int rank = 0; rank < blocks; ++rank) {
    void* const to = cluster.map_shared_rank(destination, rank);  // fails if there is no such block
    copy_box_to(*block_of(rank), to, map, channel, part, row, item, cluster.map_shared_rank(barrier, rank));
  }
}

inline void wgmma_fence() {}

template <class T, int kSums>
void wgmma(float (&accumulators)[kSums], const T* a, const T* b, int k, bool add) {
  if (reinterpret_cast<uintptr_t>(a) % 1024 || reinterpret_cast<uintptr_t>(b) % 1024)
    emulator::fail("wgmma: a swizzled matrix starts on 1024 bytes");
  emulator::Thread& thread = emulator::self();
  const bool first = std::none_of(thread.products.begin(), thread.products.end(),
                                  [&](const emulator::Product& p) { return p.accumulators == accumulators; });
  thread.products.push_back({accumulators,
                             kSums,
                             thread.product_group,
                             reinterpret_cast<const char*>(a),
                             reinterpret_cast<const char*>(b),
                             k,
                             add,
                             &emulator::multiply<T>,
                             {}});
  if (first) emulator::hide(thread.products.back());
}
inline void wgmma_commit() {
  emulator::exchange(~0u, {}, 12, "wgmma_commit");
  ++emulator::self().product_group;
}
template <int Pending>
void wgmma_wait() {
  std::vector<emulator::Product>& products = emulator::self().products;
  const int done = emulator::self().product_group - Pending;
  const auto ended = std::find_if(products.begin(), products.end(), [=](const emulator::Product& p) { return p.group >= done; });
  for (auto product = products.begin(); product != ended; ++product) {
    std::copy(product->start.begin(), product->start.end(), product->accumulators);
    product->run(*product);
  }
  products.erase(products.begin(), ended);
  for (auto product = products.begin(); product != products.end(); ++product)
    if (std::none_of(products.begin(), product, [=](const emulator::Product& p) { return p.accumulators == product->accumulators; }) &&
        product->start.empty())
      emulator::hide(*product);
  emulator::exchange(~0u, {}, 13, "wgmma_wait", true);  // the products of all lanes are complete
}
template <int kSums>
void wgmma_finish(float (&)[kSums]) {
  wgmma_wait<0>();
}

}  // namespace sts
