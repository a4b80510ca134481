// Greedy MAP of a determinantal point process: all picks of all items in one launch, after their rows are divided by their lengths.
// What: token i has the gain q_i^2 distance_i, where distance_i is the squared distance of its unit row to the span of the picks. A pick j
//   gives every token an entry of a Cholesky row, e_i = (c_ij - sum_t e_t[i] e_t[j]) / sqrt(distance_j), and distance_i -= e_i^2. Sums are
//   taken in float64: in float32 their rounding, divided by sqrt(distance_j), is soon as large as the gains that are left.
// Chosen when: always. Nothing N x N is stored: a pick computes the N cosines of its row.
// Steps: (1) the gain of a token alone, and what rounding took of the length of its unit row; (2) the pick: the largest gain of all blocks; (3) its Cholesky row, a warp a token: both sums run
//   along rows, of the features and of the factor, which is stored token by token; (4) where gains have fallen to the floor, tokens
//   follow by quality.
// Synchronisation: a group of resident blocks takes an item. Every pick has a slot, to which each block lowers the key of its best
//   token; one barrier of the group, and all blocks read the slot. Only the warp that owns a token writes its distance, state and row
//   of the factor. Others read a pick's distance and row alone, which are not written any more.
#pragma once
#include <cmath>

#include "common/dpp_rule.h"
#include "unit_rows.cuh"

namespace sts {

constexpr int kDppThreads = 512, kDppWarps = kDppThreads / 32;
constexpr uint8_t kPickedRow = 0xff;  // a RowState of this kernel alone

__device__ __forceinline__ double warp_sum(double value) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) value += __shfl_xor_sync(kFullWarp, value, offset);
  return value;
}

// a . b of this lane's channels of unit rows of `pitch` floats.
__device__ __forceinline__ double lane_dot(const float* a, const float* b, int pitch) {
  double sum = 0.;
#pragma unroll 4
  for (int c = threadIdx.x % 32 * 4; c < pitch; c += 128) {
    const Vec16<float> x = load_vec<true>(a, c, pitch, true), y = load_vec<true>(b, c, pitch, true);
#pragma unroll
    for (int v = 0; v < 4; ++v) sum = fma(static_cast<double>(x[v]), static_cast<double>(y[v]), sum);
  }
  return sum;
}

// Groups of `group_blocks` resident blocks; group g takes items g, g + groups, ... and warp w of a group its tokens w, w + warps, ...
// least: sqrt(floor). unit, state: as unit_rows_kernel leaves them. factor: (groups, tokens, k). distance, scale: (batch, tokens). best:
// (batch, k + 1) of kNoKey. arrived: a zero for every group.
static __global__ void __launch_bounds__(kDppThreads, 1)
    dpp_select_kernel(int64_t batch, int64_t tokens, int pitch, int64_t k, int group_blocks, float least, const float* unit, uint8_t* state,
                      const float* quality, const int64_t* num_tokens, double* factor, double* distance, double* scale, Key* best,
                      unsigned* arrived, int64_t* order, float* gain) {
  __shared__ Key partial[2][32];
  const int group = blockIdx.x / group_blocks, groups = gridDim.x / group_blocks, rank = blockIdx.x % group_blocks;
  const int tid = threadIdx.x, lane = tid % 32;
  const int64_t group_warp = rank * kDppWarps + tid / 32, group_warps = static_cast<int64_t>(group_blocks) * kDppWarps;
  GroupBarrier barrier(arrived + group, group_blocks);
  int turn = 0;
  factor += group * tokens * k;

  for (int64_t b = group; b < batch; b += groups) {
    int64_t count = num_tokens ? num_tokens[b] : tokens;
    if (count < 0 || count > tokens) count = 0;
    const int64_t picks = k < count ? k : count;
    if (rank == 0)
      for (int64_t i = picks + tid; i < k; i += kDppThreads) order[b * k + i] = -1, gain[b * k + i] = 0.f;
    if (picks == 0) continue;
    const float *row = unit + b * tokens * pitch, *merit = quality + b * tokens;
    double *const squared = distance + b * tokens, *const inverse = scale + b * tokens;
    uint8_t* const mine = state + b * tokens;
    Key* slot = best + b * (k + 1);

    // The lowest key of the group, from each thread's own.
    const auto find = [&](Key key) {
      key = block_lowest(key, partial, turn++);
      if (tid == 0) atomicMin(slot, key);
      barrier.sync();
      return *slot++;
    };
    const auto key_of_gain = [&](int64_t i, double to_span) {
      return to_span > 0. ? make_key(-(fabsf(merit[i]) * sqrtf(static_cast<float>(to_span))), static_cast<uint32_t>(i)) : kNoKey;
    };
    // The tokens left by quality, those that are spoiled after all others. A lane has each 32nd token of its warp.
    const auto key_of_quality = [&](int64_t picked) {
      Key key = kNoKey;
      for (int64_t i = group_warp + lane * group_warps; i < count; i += 32 * group_warps) {
        if (i == picked) mine[i] = kPickedRow;
        if (mine[i] == kPickedRow) continue;
        key = lower(key, make_key(mine[i] == kSpoiledRow ? kInfinity : -(merit[i] + 0.f), static_cast<uint32_t>(i)));  // -0 equals 0
      }
      return key;
    };

    // (1) the gain of a token alone
    Key key = kNoKey;
    for (int64_t i = group_warp; i < count; i += group_warps) {
      const bool usable = mine[i] == kUnitRow && merit[i] - merit[i] == 0.f;
      const double square = warp_sum(usable ? lane_dot(row + i * pitch, row + i * pitch, pitch) : 0.);
      const double to_span = usable ? 1. : 0.;
      __syncwarp();  // every lane has read before one writes
      if (lane == 0) {
        if (!(merit[i] - merit[i] == 0.f)) mine[i] = kSpoiledRow;
        squared[i] = to_span;
        inverse[i] = usable ? 1. / sqrt(square) : 0.;
      }
      key = lower(key, key_of_gain(i, to_span));
    }
    key = find(key);

    bool filling = false;
    float first = 0.f;
    for (int64_t step = 0;;) {
      // (2) the pick. The root of its gain is compared, which is in range where the gain may not be.
      float root = 0.f;
      if (!filling) {
        if (key != kNoKey) root = -key_value(key);
        if (step == 0) first = root;
        if (!(root > least * first)) {
          filling = true;
          root = 0.f;
          key = find(key_of_quality(-1));
        }
      }
      const int64_t pick = key_index(key);
      if (rank == 0 && tid == 0) {
        order[b * k + step] = pick;
        gain[b * k + step] = root * root;
      }
      if (step + 1 == picks) break;
      if (filling) {
        // (4) by quality
        key = find(key_of_quality(pick));
        ++step;
        continue;
      }
      // (3) the Cholesky row
      const double pivot = sqrt(squared[pick]), pick_inverse = inverse[pick];
      const float* const pick_row = row + pick * pitch;
      const double* const pick_factor = factor + pick * k;
      key = kNoKey;
      for (int64_t i = group_warp; i < count; i += group_warps) {
        if (i == pick) {
          if (lane == 0) mine[i] = kPickedRow;
          continue;
        }
        const double before = squared[i];
        if (mine[i] != kUnitRow || before == 0.) continue;
        double sum = lane_dot(row + i * pitch, pick_row, pitch) * inverse[i] * pick_inverse;
        double* const own = factor + i * k;
#pragma unroll 4
        for (int64_t t = lane; t < step; t += 32) sum = fma(-own[t], pick_factor[t], sum);
        const double entry = warp_sum(sum) / pivot;
        double after = before - entry * entry;
        if (after < kInSpan) after = 0.;
        __syncwarp();  // every lane has read before one writes
        if (lane == 0) {
          own[step] = entry;
          squared[i] = after;
        }
        key = lower(key, key_of_gain(i, after));
      }
      key = find(key);
      ++step;
    }
  }
}

// ---- plan and launch ----

struct DppPlan {
  int groups, group_blocks;
};

inline DppPlan plan_dpp(int64_t batch, int64_t tokens) {
  const int resident = max_resident_blocks(dpp_select_kernel, kDppThreads, 0);
  if (resident == 0) return {0, 0};
  const int groups = static_cast<int>(batch < resident ? batch : resident);
  const int64_t useful = ceil_div(tokens, kDppWarps);
  return {groups, static_cast<int>(useful < resident / groups ? useful : resident / groups)};
}

// Device memory besides input and output. `allocate(bytes)` is called once for each part.
struct DppScratch {
  float* unit;
  double *factor, *distance, *scale;
  uint8_t* state;
  Key* best;
  unsigned* arrived;
  int64_t slots;

  template <class Allocate>
  DppScratch(const DppPlan& plan, int64_t batch, int64_t tokens, int64_t channels, int64_t k, Allocate&& allocate)
      : slots(batch * (k + 1)) {
    const auto take = [&](auto*& part, int64_t count) {
      part = static_cast<std::remove_reference_t<decltype(part)>>(allocate(count * static_cast<int64_t>(sizeof(*part))));
    };
    take(unit, batch * tokens * unit_pitch(channels));
    take(factor, plan.groups * tokens * k);
    take(distance, batch * tokens);
    take(scale, batch * tokens);
    take(state, batch * tokens);
    take(best, slots);
    take(arrived, plan.groups);
  }
};

// quality: (batch, tokens), contiguous. num_tokens: (batch), or null. order, gain: (batch, k).
template <class scalar_t>
cudaError_t launch_dpp(const Rows<scalar_t>& rows, int64_t batch, int64_t tokens, int64_t k, float floor, const float* quality,
                       const int64_t* num_tokens, const DppPlan& plan, const DppScratch& scratch, int64_t* order, float* gain,
                       cudaStream_t stream) {
  if (plan.groups == 0) return cudaErrorLaunchOutOfResources;
  cudaError_t error = launch_unit_rows(rows, batch, tokens, tokens, nullptr, scratch.unit, scratch.state, stream);
  if (error != cudaSuccess) return error;
  static_assert(kNoKey == ~0ull, "the memset below writes kNoKey");
  error = cudaMemsetAsync(scratch.best, 0xff, scratch.slots * sizeof(Key), stream);
  if (error == cudaSuccess) error = cudaMemsetAsync(scratch.arrived, 0, plan.groups * sizeof(unsigned), stream);
  if (error != cudaSuccess) return error;
  const Launch shape{dim3(plan.groups * plan.group_blocks), dim3(kDppThreads), 0, 1, true, stream};
  return launch(dpp_select_kernel, shape, batch, tokens, static_cast<int>(unit_pitch(rows.channels)), k, plan.group_blocks, sqrtf(floor),
                scratch.unit, scratch.state, quality, num_tokens, scratch.factor, scratch.distance, scratch.scale, scratch.best,
                scratch.arrived, order, gain);
}

}  // namespace sts
