// What: the weighted mean of the tokens of each slot.
// Chosen when: always.
// Steps: (1) a warp a token: its slot, or -1 where it counts nowhere; (2) a block per slot and tile of channels: the assignments are
//   scanned in order, some at a time, and those of the slot listed in order; (3) each thread adds the listed tokens to its channels.
// Synchronisation: two launches; block barriers around the list. No atomics: sums are float64, in token order.
#pragma once
#include "rows.cuh"

namespace sts {

constexpr int kSlotThreads = 256;

template <class scalar_t>
__global__ void __launch_bounds__(kSlotThreads)
    token_slots_kernel(Rows<scalar_t> rows, int64_t batch, int64_t tokens, bool aligned, const int64_t* assignment, int64_t count,
                       const float* weight, int* slots) {
  constexpr int kVec = Vec16<scalar_t>::size;
  const int lane = threadIdx.x % 32;
  const int64_t r = static_cast<int64_t>(blockIdx.x) * (kSlotThreads / 32) + threadIdx.x / 32;
  if (r >= batch * tokens) return;
  const int64_t slot = assignment[r];
  const float w = weight ? weight[r] : 1.f;
  bool counts = slot >= 0 && slot < count && w - w == 0.f;
  if (counts) {
    const scalar_t* row = rows.row(r / tokens, r % tokens);
#pragma unroll 4
    for (int c = lane * kVec; c < rows.channels; c += 32 * kVec) {
      const Vec16<scalar_t> x = load_channels(row, c, rows.channels, aligned);
#pragma unroll
      for (int v = 0; v < kVec; ++v) counts = counts && x[v] - x[v] == 0.f;
    }
  }
  counts = __all_sync(kFullWarp, counts);
  if (lane == 0) slots[r] = counts ? static_cast<int>(slot) : -1;
}

constexpr int kMeanThreads = 128, kMeanWarps = kMeanThreads / 32;
constexpr int kScanned = 4;  // assignments a thread looks at before the list is worked off

__device__ __forceinline__ void store_mean(float value, float& element) { element = value; }
template <class scalar_t>
__device__ __forceinline__ void store_mean(float value, scalar_t& element) {
  from_float(value, element);
}

// Slot blockIdx.x, channels from blockIdx.y on.
template <class scalar_t>
__global__ void __launch_bounds__(kMeanThreads)
    slot_means_kernel(Rows<scalar_t> rows, int64_t batch, int64_t tokens, bool aligned, const int* slots, int64_t count,
                      const float* weight, scalar_t* mean, float* mass) {
  constexpr int kVec = Vec16<scalar_t>::size;
  __shared__ int list[kScanned * kMeanThreads];
  __shared__ int listed[kScanned * kMeanWarps];  // by each warp in each round
  const int tid = threadIdx.x, lane = tid % 32, warp = tid / 32;
  const int slot = static_cast<int>(blockIdx.x), channels = rows.channels;
  const int tiles = static_cast<int>(ceil_div(channels, kMeanThreads * kVec));
  for (int64_t b = blockIdx.z; b < batch; b += gridDim.z)
    for (int tile = blockIdx.y; tile < tiles; tile += gridDim.y) {
      const int c = (tile * kMeanThreads + tid) * kVec;
      double sum[kVec] = {}, total = 0;
      for (int64_t begin = 0; begin < tokens; begin += kScanned * kMeanThreads) {
        // (2) the next tokens of the slot
        unsigned mine[kScanned];
#pragma unroll
        for (int round = 0; round < kScanned; ++round) {
          const int64_t i = begin + round * kMeanThreads + tid;
          mine[round] = __ballot_sync(kFullWarp, i < tokens && slots[b * tokens + i] == slot);
        }
        __syncthreads();  // all are done with the list before
#pragma unroll
        for (int round = 0; round < kScanned; ++round)
          if (lane == round) listed[round * kMeanWarps + warp] = __popc(mine[round]);
        __syncthreads();
        int length = 0;
#pragma unroll
        for (int part = 0; part < kScanned * kMeanWarps; ++part) {
          const int round = part / kMeanWarps;
          if (part % kMeanWarps == warp && (mine[round] >> lane & 1))
            list[length + __popc(mine[round] & ((1u << lane) - 1))] = round * kMeanThreads + tid;
          length += listed[part];
        }
        __syncthreads();
        // (3) their sums
        for (int m = 0; m < length; ++m) {
          const int64_t i = begin + list[m];
          const double w = weight ? weight[b * tokens + i] : 1.f;
          total += w;
          const Vec16<scalar_t> x = load_channels(rows.row(b, i), c, channels, aligned);
#pragma unroll
          for (int v = 0; v < kVec; ++v) sum[v] += w * x[v];
        }
      }
      if (tile == 0 && tid == 0) mass[b * count + slot] = static_cast<float>(total);
      const double per_mass = total > 0 ? 1 / total : 0;
      scalar_t* out = mean + (b * count + slot) * channels;
#pragma unroll
      for (int v = 0; v < kVec; ++v)
        if (c + v < channels) store_mean(static_cast<float>(sum[v] * per_mass), out[c + v]);
    }
}

// features (batch, tokens, channels) with the given strides, assignment and weight (batch, tokens) -> mean (batch, count, channels) and
// mass (batch, count). slots: batch tokens ints of scratch.
template <class scalar_t>
cudaError_t launch_scatter_mean(const scalar_t* features, int64_t batch, int64_t tokens, int64_t channels, int64_t batch_stride,
                                int64_t row_stride, const int64_t* assignment, int64_t count, const float* weight, int* slots,
                                scalar_t* mean, float* mass, cudaStream_t stream) {
  const Rows<scalar_t> rows{features, batch_stride, row_stride, static_cast<int>(channels)};
  const bool aligned = rows_aligned(rows);
  const Launch find{dim3(static_cast<unsigned>(ceil_div(batch * tokens, kSlotThreads / 32))), dim3(kSlotThreads), 0, 1, false, stream};
  const cudaError_t error = launch(token_slots_kernel<scalar_t>, find, rows, batch, tokens, aligned, assignment, count, weight, slots);
  if (error != cudaSuccess) return error;
  const auto most = [](int64_t blocks) { return static_cast<unsigned>(blocks < 65535 ? blocks : 65535); };
  const dim3 grid(static_cast<unsigned>(count), most(ceil_div(channels, kMeanThreads * Vec16<scalar_t>::size)), most(batch));
  const Launch shape{grid, dim3(kMeanThreads), 0, 1, false, stream};
  return launch(slot_means_kernel<scalar_t>, shape, rows, batch, tokens, aligned, slots, count, weight, mean, mass);
}

}  // namespace sts
