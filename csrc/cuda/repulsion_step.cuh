// One step of Algorithm 1.
//
// What: adds the repulsion of each item's picked token to the potentials of its tokens, in place, and finds the lowest. The picked token's
//   potential becomes infinity; a token that is not finite has at least kNonFinitePotential.
// Chosen when: always.
// Steps: (1) repel, a warp per token: distance to the pick, new potential; the lowest key of a block lowers its item's; (2) next_pick: keys
//   to token indices.
// Synchronisation: two launches. Blocks lower an item's key by atomicMin, whose result does not depend on their order.
#pragma once
#include "rows.cuh"

namespace sts {

constexpr int kStepThreads = 256;

// (1) `lowest` (batch) receives the lowest key of each item; kNoKey before the launch.
template <class scalar_t>
__global__ void __launch_bounds__(kStepThreads)
    repel_kernel(Rows<scalar_t> rows, int64_t batch, int64_t tokens, bool aligned, float* potential, int64_t potential_batch_stride,
                 int64_t potential_token_stride, const int64_t* picked, Repulsion rule, Key* lowest) {
  constexpr int kVec = Vec16<scalar_t>::size, kWarps = kStepThreads / 32;
  __shared__ Key partial[2][32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kWarps + warp;
  int calls = 0;
  for (int64_t b = blockIdx.y; b < batch; b += gridDim.y) {
    const int64_t pick = picked[b] >= 0 && picked[b] < tokens ? picked[b] : -1;
    Key best = kNoKey;
    if (i < tokens) {
      const scalar_t* row = rows.row(b, i);
      const scalar_t* pick_row = rows.row(b, pick < 0 ? i : pick);
      float sum = 0.f;
      bool finite = true;
#pragma unroll 4
      for (int c = lane * kVec; c < rows.channels; c += 32 * kVec) {
        const Vec16<scalar_t> x = load_channels(row, c, rows.channels, aligned), y = load_channels(pick_row, c, rows.channels, aligned);
#pragma unroll
        for (int v = 0; v < kVec; ++v) {
          const float difference = x[v] - y[v];
          sum = fmaf(difference, difference, sum);
          finite = finite && x[v] - x[v] == 0.f;
        }
      }
      sum = warp_sum(sum);
      finite = __all_sync(kFullWarp, finite);
      float* own_potential = potential + b * potential_batch_stride + i * potential_token_stride;
      float value = *own_potential;
      if (pick >= 0) value = rule.add(value, rule.weight(sum));
      if (value != value || (!finite && value < kNonFinitePotential)) value = kNonFinitePotential;
      if (i == pick) value = kInfinity;
      __syncwarp();  // all lanes have read the potential, which lane 0 overwrites
      if (lane == 0) *own_potential = value;
      best = make_key(value, static_cast<uint32_t>(i));
    }
    best = block_lowest(best, partial, calls++);
    if (threadIdx.x == 0) atomicMin(lowest + b, best);
  }
}

// (2) Keys to token indices, in place; -1 if every token is picked.
static __global__ void __launch_bounds__(kStepThreads) next_pick_kernel(int64_t batch, int64_t* next) {
  const int64_t b = static_cast<int64_t>(blockIdx.x) * kStepThreads + threadIdx.x;
  if (b >= batch) return;
  const Key key = static_cast<Key>(next[b]);
  next[b] = key_value(key) < kInfinity ? static_cast<int64_t>(key_index(key)) : -1;
}

// next (batch): the result; holds the keys until (2).
template <class scalar_t>
cudaError_t launch_step(float* potential, int64_t potential_batch_stride, int64_t potential_token_stride, const Rows<scalar_t>& rows,
                        int64_t batch, int64_t tokens, const int64_t* picked, Repulsion rule, int64_t* next, cudaStream_t stream) {
  static_assert(kNoKey == ~0ull, "the memset below writes kNoKey");
  cudaError_t error = cudaMemsetAsync(next, 0xff, batch * sizeof(int64_t), stream);
  if (error != cudaSuccess) return error;
  const dim3 grid(static_cast<unsigned>(ceil_div(tokens, kStepThreads / 32)), grid_extent(batch));
  const Launch shape{grid, dim3(kStepThreads), 0, 1, false, stream};
  error = launch(repel_kernel<scalar_t>, shape, rows, batch, tokens, rows_aligned(rows), potential, potential_batch_stride,
                 potential_token_stride, picked, rule, reinterpret_cast<Key*>(next));
  if (error != cudaSuccess) return error;
  const Launch finish{dim3(static_cast<unsigned>(ceil_div(batch, kStepThreads))), dim3(kStepThreads), 0, 1, false, stream};
  return launch(next_pick_kernel, finish, batch, next);
}

}  // namespace sts
