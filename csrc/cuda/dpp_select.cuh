// Greedy MAP inference of a determinantal point process: all picks of all items in one launch, over unit rows.
//
// What: token i has the gain q_i^2 d_i, where d_i is the squared distance of its unit row to the span of the picks. Pick j gives every
//   token i an entry of a Cholesky row: e_i = (c_ij - sum_t e_t[i] e_t[j]) / sqrt(d_j), with the cosine c_ij; then d_i -= e_i^2. Sums are
//   float64: rounding of float32, divided by sqrt(d_j), would soon be as large as the remaining gains.
// Chosen when: always. Nothing N x N is stored: a pick computes its N cosines.
// Steps: (1) d_i = 1, and 1 / length of each unit row, which rounding to float32 has changed a little; (2) the pick: the largest gain over
//   all blocks; (3) its Cholesky row, a warp per token. Both sums run along contiguous rows: of the features, and of the factor, which is
//   stored token by token. (4) Once gains are down to the floor, the remaining picks are by quality.
// Synchronisation: a group of resident blocks takes an item. Every pick has a slot of its own: each block lowers it by atomicMin to the key
//   of its best token, and after one group barrier all blocks read it. Only the warp that owns a token writes its distance, state and row
//   of the factor. Other warps read the distance and row of a pick alone, which no longer change.
#pragma once
#include <cmath>

#include "common/dpp_rule.h"
#include "unit_rows.cuh"

namespace sts {

constexpr int kDppThreads = 512, kDppWarps = kDppThreads / 32;
constexpr uint8_t kPickedRow = 0xff;  // a RowState that only this kernel uses

// This lane's part of a . b, for unit rows of `pitch` floats.
__device__ __forceinline__ double lane_dot(const float* a, const float* b, int pitch) {
  double sum = 0.;
#pragma unroll 8
  for (int c = threadIdx.x % 32 * 4; c < pitch; c += 128) {
    const Vec16<float> x = load_vec<true>(a, c, pitch, true), y = load_vec<true>(b, c, pitch, true);
#pragma unroll
    for (int v = 0; v < 4; ++v) sum = fma(static_cast<double>(x[v]), static_cast<double>(y[v]), sum);
  }
  return sum;
}

// Groups of `group_blocks` resident blocks stride over the items, and the warps of a group over the tokens of its item.
//   min_root_ratio: sqrt(floor), the smallest sqrt(gain) relative to the first pick's
//   unit, state: of unit_rows_kernel; factor (groups, tokens, k): entries of the Cholesky rows
//   distance (batch, tokens): squared, to the span; inv_length (batch, tokens): 1 / length of the unit row
//   best (batch, k + 1): the slots, kNoKey before the launch; arrived (groups): counters of the group barriers, 0 before the launch
static __global__ void __launch_bounds__(kDppThreads, 1)
    dpp_select_kernel(int64_t batch, int64_t tokens, int pitch, int64_t k, int group_blocks, float min_root_ratio, const float* unit,
                      uint8_t* state, const float* quality, const int64_t* num_tokens, double* factor, double* distance, double* inv_length,
                      Key* best, unsigned* arrived, int64_t* order, float* gain) {
  __shared__ Key partial[2][32];
  const int group = blockIdx.x / group_blocks, groups = gridDim.x / group_blocks, block_in_group = blockIdx.x % group_blocks;
  const int tid = threadIdx.x, lane = tid % 32;
  const int64_t group_warp = block_in_group * kDppWarps + tid / 32, group_warps = static_cast<int64_t>(group_blocks) * kDppWarps;
  GroupBarrier barrier(arrived + group, group_blocks);
  int calls = 0;
  factor += group * tokens * k;

  for (int64_t b = group; b < batch; b += groups) {
    int64_t count = num_tokens ? num_tokens[b] : tokens;
    if (count < 0 || count > tokens) count = 0;
    const int64_t picks = k < count ? k : count;
    if (block_in_group == 0)
      for (int64_t i = picks + tid; i < k; i += kDppThreads) order[b * k + i] = -1, gain[b * k + i] = 0.f;
    if (picks == 0) continue;
    const float *item_rows = unit + b * tokens * pitch, *item_quality = quality + b * tokens;
    double *const sqdist = distance + b * tokens, *const item_inv_length = inv_length + b * tokens;
    uint8_t* const item_state = state + b * tokens;
    Key* slot = best + b * (k + 1);

    // The lowest key of all threads of the group: block minimum, atomicMin to the next slot, group barrier.
    const auto group_lowest = [&](Key key) {
      key = block_lowest(key, partial, calls++);
      if (tid == 0) atomicMin(slot, key);
      barrier.sync();
      return *slot++;
    };
    const auto key_of_gain = [&](int64_t i, double span_sqdist) {
      return span_sqdist > 0. ? make_key(-(fabsf(item_quality[i]) * sqrtf(static_cast<float>(span_sqdist))), static_cast<uint32_t>(i))
                              : kNoKey;
    };
    // The lowest key, by quality, of this lane's tokens that are not picked; invalid rows come last. Lanes stride over
    // the tokens of their warp.
    const auto key_of_quality = [&](int64_t picked) {
      Key key = kNoKey;
      for (int64_t i = group_warp + lane * group_warps; i < count; i += 32 * group_warps) {
        if (i == picked) item_state[i] = kPickedRow;
        if (item_state[i] == kPickedRow) continue;
        key = lower(key, make_key(item_state[i] == kInvalidRow ? kInfinity : -(item_quality[i] + 0.f),
                                  static_cast<uint32_t>(i)));  // + 0: -0 becomes 0
      }
      return key;
    };

    // (1) distance, length and gain of each token before the first pick
    Key key = kNoKey;
    for (int64_t i = group_warp; i < count; i += group_warps) {
      const bool usable = item_state[i] == kUnitRow && item_quality[i] - item_quality[i] == 0.f;
      const double square = warp_sum(usable ? lane_dot(item_rows + i * pitch, item_rows + i * pitch, pitch) : 0.);
      const double span_sqdist = usable ? 1. : 0.;
      __syncwarp();  // all lanes have read what lane 0 overwrites
      if (lane == 0) {
        if (!(item_quality[i] - item_quality[i] == 0.f)) item_state[i] = kInvalidRow;
        sqdist[i] = span_sqdist;
        item_inv_length[i] = usable ? 1. / sqrt(square) : 0.;
      }
      key = lower(key, key_of_gain(i, span_sqdist));
    }
    key = group_lowest(key);

    bool by_quality = false;
    float first_root = 0.f;
    for (int64_t step = 0;;) {
      // (2) the pick. sqrt(gain) is compared, since a gain may be out of float32's range.
      float root = 0.f;
      if (!by_quality) {
        if (key != kNoKey) root = -key_value(key);
        if (step == 0) first_root = root;
        if (!(root > min_root_ratio * first_root)) {
          by_quality = true;
          root = 0.f;
          key = group_lowest(key_of_quality(-1));
        }
      }
      const int64_t pick = key_index(key);
      if (block_in_group == 0 && tid == 0) {
        order[b * k + step] = pick;
        gain[b * k + step] = root * root;
      }
      if (step + 1 == picks) break;
      if (by_quality) {
        // (4) by quality
        key = group_lowest(key_of_quality(pick));
        ++step;
        continue;
      }
      // (3) the Cholesky row. The row loads are issued first: the token's state and the distances load meanwhile.
      const float* const pick_row = item_rows + pick * pitch;
      const double* const pick_factor = factor + pick * k;
      key = kNoKey;
      for (int64_t i = group_warp; i < count; i += group_warps) {
        if (i == pick) {
          if (lane == 0) item_state[i] = kPickedRow;
          continue;
        }
        double sum = lane_dot(item_rows + i * pitch, pick_row, pitch);
        const double old_sqdist = sqdist[i];
        if (item_state[i] != kUnitRow || old_sqdist == 0.) continue;
        sum = sum * item_inv_length[i] * item_inv_length[pick];
        double* const factor_row = factor + i * k;
#pragma unroll 4
        for (int64_t t = lane; t < step; t += 32) sum = fma(-factor_row[t], pick_factor[t], sum);
        const double entry = warp_sum(sum) / sqrt(sqdist[pick]);
        double new_sqdist = old_sqdist - entry * entry;
        if (new_sqdist < kInSpan) new_sqdist = 0.;
        __syncwarp();  // all lanes have read what lane 0 overwrites
        if (lane == 0) {
          factor_row[step] = entry;
          sqdist[i] = new_sqdist;
        }
        key = lower(key, key_of_gain(i, new_sqdist));
      }
      key = group_lowest(key);
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
  const int64_t max_useful = ceil_div(tokens, kDppWarps);
  return {groups, static_cast<int>(max_useful < resident / groups ? max_useful : resident / groups)};
}

// Scratch in device memory; shapes as at the kernel. allocate(bytes) is called once per array.
struct DppScratch {
  float* unit;
  double *factor, *distance, *inv_length;
  uint8_t* state;
  Key* best;
  unsigned* arrived;
  int64_t slots;

  template <class Allocate>
  DppScratch(const DppPlan& plan, int64_t batch, int64_t tokens, int64_t channels, int64_t k, Allocate&& allocate)
      : slots(batch * (k + 1)) {
    take_array(unit, batch * tokens * unit_pitch(channels), allocate);
    take_array(factor, plan.groups * tokens * k, allocate);
    take_array(distance, batch * tokens, allocate);
    take_array(inv_length, batch * tokens, allocate);
    take_array(state, batch * tokens, allocate);
    take_array(best, slots, allocate);
    take_array(arrived, plan.groups, allocate);
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
                scratch.unit, scratch.state, quality, num_tokens, scratch.factor, scratch.distance, scratch.inv_length, scratch.best,
                scratch.arrived, order, gain);
}

}  // namespace sts
