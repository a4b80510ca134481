// Weighted mean of the tokens of each slot.
//
// What: mean of the tokens assigned to each slot, and their total weight. Tokens or weights that are not finite are left out.
// Chosen when: always.
// Steps: (1) token_slots, a warp per token: its slot, or -1 if the token is left out; (2) slot_means, a block per slot and tile of
//   channels: scans the assignments in order, and compacts the tokens of its slot into a list; (3) each thread adds the listed tokens to
//   its channels, after loading several of them at once.
// Synchronisation: two launches; block barriers around the list. No atomics: sums are float64, in token order.
#pragma once
#include "rows.cuh"

namespace sts {

constexpr int kSlotThreads = 256;

// (1)
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
  bool is_used = slot >= 0 && slot < count && w - w == 0.f;
  if (is_used) {
    const scalar_t* row = rows.row(r / tokens, r % tokens);
#pragma unroll 4
    for (int c = lane * kVec; c < rows.channels; c += 32 * kVec) {
      const Vec16<scalar_t> x = load_channels(row, c, rows.channels, aligned);
#pragma unroll
      for (int v = 0; v < kVec; ++v) is_used = is_used && x[v] - x[v] == 0.f;
    }
  }
  is_used = __all_sync(kFullWarp, is_used);
  if (lane == 0) slots[r] = is_used ? static_cast<int>(slot) : -1;
}

constexpr int kMeanThreads = 128, kMeanWarps = kMeanThreads / 32;
constexpr int kScanRounds = 4;    // assignments that a thread scans before the list is summed
constexpr int kRowsInFlight = 4;  // rows of the list whose loads overlap

// Slot blockIdx.x; blockIdx.y strides over the tiles of channels, and blockIdx.z over the batch. slots: (batch, tokens), of (1).
template <class scalar_t>
__global__ void __launch_bounds__(kMeanThreads)
    slot_means_kernel(Rows<scalar_t> rows, int64_t batch, int64_t tokens, bool aligned, const int* slots, int64_t count,
                      const float* weight, scalar_t* mean, float* mass) {
  constexpr int kVec = Vec16<scalar_t>::size;
  __shared__ int members[kScanRounds * kMeanThreads];
  __shared__ int warp_count[kScanRounds * kMeanWarps];  // (round, warp): members among the warp's assignments
  const int tid = threadIdx.x, lane = tid % 32, warp = tid / 32;
  const int slot = static_cast<int>(blockIdx.x), channels = rows.channels;
  const int tiles = static_cast<int>(ceil_div(channels, kMeanThreads * kVec));
  for (int64_t b = blockIdx.z; b < batch; b += gridDim.z)
    for (int tile = blockIdx.y; tile < tiles; tile += gridDim.y) {
      const int c = (tile * kMeanThreads + tid) * kVec;
      double sum[kVec] = {}, total_weight = 0;
      for (int64_t begin = 0; begin < tokens; begin += kScanRounds * kMeanThreads) {
        // (2) the tokens of the slot among the next kScanRounds * kMeanThreads, compacted by ballots and a prefix sum over (round, warp)
        unsigned member_mask[kScanRounds];
#pragma unroll
        for (int round = 0; round < kScanRounds; ++round) {
          const int64_t i = begin + round * kMeanThreads + tid;
          member_mask[round] = __ballot_sync(kFullWarp, i < tokens && slots[b * tokens + i] == slot);
        }
        __syncthreads();  // all threads have read the previous list
#pragma unroll
        for (int round = 0; round < kScanRounds; ++round)
          if (lane == round) warp_count[round * kMeanWarps + warp] = __popc(member_mask[round]);
        __syncthreads();
        int num_members = 0;
#pragma unroll
        for (int part = 0; part < kScanRounds * kMeanWarps; ++part) {
          const int round = part / kMeanWarps;
          if (part % kMeanWarps == warp && (member_mask[round] >> lane & 1))
            members[num_members + __popc(member_mask[round] & ((1u << lane) - 1))] = round * kMeanThreads + tid;
          num_members += warp_count[part];
        }
        __syncthreads();
        // (3) sums
        for (int m = 0; m < num_members; m += kRowsInFlight) {
          Vec16<scalar_t> x[kRowsInFlight];
          float w[kRowsInFlight];
#pragma unroll
          for (int u = 0; u < kRowsInFlight; ++u) {  // past the end the last member
            const int64_t i = begin + members[m + u < num_members ? m + u : num_members - 1];
            x[u] = load_channels(rows.row(b, i), c, channels, aligned);
            w[u] = weight ? weight[b * tokens + i] : 1.f;
          }
#pragma unroll
          for (int u = 0; u < kRowsInFlight; ++u) {
            if (m + u >= num_members) break;
            const double row_weight = w[u];
            total_weight += row_weight;
#pragma unroll
            for (int v = 0; v < kVec; ++v) sum[v] += row_weight * x[u][v];
          }
        }
      }
      if (tile == 0 && tid == 0) mass[b * count + slot] = static_cast<float>(total_weight);
      const double per_mass = total_weight > 0 ? 1 / total_weight : 0;
      scalar_t* out = mean + (b * count + slot) * channels;
#pragma unroll
      for (int v = 0; v < kVec; ++v)
        if (c + v < channels) from_float(static_cast<float>(sum[v] * per_mass), out[c + v]);
    }
}

// rows (batch, tokens, channels), assignment and weight (batch, tokens) -> mean (batch, count, channels) and mass (batch, count), the total
// weight. weight: may be null. slots: scratch of batch tokens ints.
template <class scalar_t>
cudaError_t launch_scatter(const Rows<scalar_t>& rows, int64_t batch, int64_t tokens, const int64_t* assignment, int64_t count,
                           const float* weight, int* slots, scalar_t* mean, float* mass, cudaStream_t stream) {
  const bool aligned = rows_aligned(rows);
  const Launch find{dim3(static_cast<unsigned>(ceil_div(batch * tokens, kSlotThreads / 32))), dim3(kSlotThreads), 0, 1, false, stream};
  const cudaError_t error = launch(token_slots_kernel<scalar_t>, find, rows, batch, tokens, aligned, assignment, count, weight, slots);
  if (error != cudaSuccess) return error;
  const dim3 grid(static_cast<unsigned>(count), grid_extent(ceil_div(rows.channels, kMeanThreads * Vec16<scalar_t>::size)),
                  grid_extent(batch));
  const Launch shape{grid, dim3(kMeanThreads), 0, 1, false, stream};
  return launch(slot_means_kernel<scalar_t>, shape, rows, batch, tokens, aligned, slots, count, weight, mean, mass);
}

}  // namespace sts
