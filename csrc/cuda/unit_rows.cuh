// Unit rows: features in float32, divided by their length. The squared distance of two unit rows is 2 - 2 cosine.
//
// What: token i of each item, or the i-th token that the item lists, divided by its length. A row is invalid if it has a NaN or infinity,
//   or is no token of its item. A zero row has no direction. `state` tells them apart. Without `state` the rows do: an invalid row is NaN
//   throughout, and a zero row holds zero_row_mark in its first channel.
// Chosen when: the metric is cosine. Rows of the copy are 16-byte aligned.
// Steps, a warp per row: (1) the largest channel, whose power of two is divided out: the division is exact, and squares neither overflow
//   nor vanish; (2) the length; (3) the division by it.
// Synchronisation: warp shuffles alone.
#pragma once
#include "rows.cuh"

namespace sts {

constexpr int kUnitThreads = 256;
constexpr float kSmallestNormal = 1.17549435e-38f;  // 2^-126

enum RowState : uint8_t {
  kInvalidRow,  // has a NaN or infinity, or is no token of its item
  kZeroRow,
  kUnitRow,
};

// Row pitch of the copy, in floats: rows are 16-byte aligned.
STS_HOST_DEVICE int64_t unit_pitch(int64_t channels) { return ceil_div(channels, 4) * 4; }

// listed: (batch, count) token indices; null: row i is of token i. unit: (batch, count, unit_pitch). state: (batch, count), or null. With
// `state`, invalid rows and zero rows are all zeros.
template <class scalar_t>
__global__ void __launch_bounds__(kUnitThreads) unit_rows_kernel(Rows<scalar_t> rows, int64_t batch, int64_t tokens, int64_t count,
                                                                 bool aligned, const int64_t* listed, float* unit, uint8_t* state) {
  constexpr int kVec = Vec16<scalar_t>::size;
  const int lane = threadIdx.x % 32;
  const int64_t r = (static_cast<int64_t>(blockIdx.x) * kUnitThreads + threadIdx.x) / 32;
  if (r >= batch * count) return;
  const int64_t b = r / count, token = listed ? listed[r] : r % count;
  const int pitch = static_cast<int>(unit_pitch(rows.channels));
  float* const out = unit + r * pitch;
  const bool in_range = token >= 0 && token < tokens;
  const scalar_t* row = rows.row(b, in_range ? token : 0);

  // (1) the largest channel
  float max_abs = 0.f;
  bool finite = true;
  for (int c = lane * kVec; c < rows.channels; c += 32 * kVec) {
    const Vec16<scalar_t> x = load_channels(row, c, rows.channels, aligned);
#pragma unroll
    for (int v = 0; v < kVec; ++v) {
      finite = finite && x[v] - x[v] == 0.f;
      max_abs = fmaxf(max_abs, fabsf(x[v]));
    }
  }
  const bool usable = __all_sync(kFullWarp, finite) && in_range;
  const float power = fmaxf(__uint_as_float(__float_as_uint(warp_max(max_abs)) & 0x7f800000u), kSmallestNormal);

  // (2) the length
  float sum = 0.f;
  for (int c = lane * kVec; c < rows.channels; c += 32 * kVec) {
    const Vec16<scalar_t> x = load_channels(row, c, rows.channels, aligned);
#pragma unroll
    for (int v = 0; v < kVec; ++v) {
      const float scaled = x[v] / power;
      sum = fmaf(scaled, scaled, sum);
    }
  }
  sum = warp_sum(sum);
  const float length = usable && sum > 0.f ? sqrtf(sum) : kInfinity;

  // (3) the division
  const float invalid_value = state ? 0.f : kNaN, zero_mark = state || sum > 0.f ? 0.f : zero_row_mark(token);
  for (int c = lane * kVec; c < pitch; c += 32 * kVec) {
    const Vec16<scalar_t> x = load_channels(row, c, rows.channels, aligned);
#pragma unroll
    for (int v = 0; v < kVec; ++v) {
      if (c + v >= pitch) continue;
      const float value = usable ? x[v] / power / length + (c + v == 0 ? zero_mark : 0.f) : invalid_value;
      out[c + v] = c + v < rows.channels ? value : 0.f;
    }
  }
  if (state && lane == 0) state[r] = !usable ? kInvalidRow : sum > 0.f ? kUnitRow : kZeroRow;
}

template <class scalar_t>
cudaError_t launch_unit_rows(const Rows<scalar_t>& rows, int64_t batch, int64_t tokens, int64_t count, const int64_t* listed, float* unit,
                             uint8_t* state, cudaStream_t stream) {
  const auto blocks = static_cast<unsigned>(ceil_div(batch * count, kUnitThreads / 32));
  return launch(unit_rows_kernel<scalar_t>, Launch{dim3(blocks), dim3(kUnitThreads), 0, 1, false, stream}, rows, batch, tokens, count,
                rows_aligned(rows), listed, unit, state);
}

inline Rows<float> unit_rows_of(const float* unit, int64_t tokens, int64_t channels) {
  const int64_t width = unit_pitch(channels);
  return {unit, tokens * width, width, static_cast<int>(width)};
}

}  // namespace sts
