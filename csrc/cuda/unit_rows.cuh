// Rows of features in float32, of length one: the squared distances of unit rows are 2 - 2 cosine of the rows.
//
// What: token i of each item, or the i-th token it lists, divided by its length; a warp per row. A row with a NaN or infinity, or that
//   is no token of its item, is spoiled. A row of zeros has no direction. `state` says so; without it the rows do: a spoiled one is
//   NaN throughout, and one of zeros holds zero_row_mark.
// Chosen when: the metric of a selection is cosine. Rows of the copy are 16-byte aligned.
// Steps: (1) the largest channel, whose power of two is divided out: that rounds nothing, and squares neither overflow nor vanish;
//   (2) the length; (3) the division.
// Synchronisation: none but the warp's shuffles.
#pragma once
#include "rows.cuh"

namespace sts {

constexpr int kUnitThreads = 256;
constexpr float kSmallestNormal = 1.17549435e-38f;

enum RowState : uint8_t {
  kSpoiledRow,
  kZeroRow,
  kUnitRow,
};

// Channels of the copy: whole 16-byte chunks.
STS_HOST_DEVICE int64_t unit_pitch(int64_t channels) { return ceil_div(channels, 4) * 4; }

__device__ __forceinline__ float warp_largest(float value) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) value = fmaxf(value, __shfl_xor_sync(kFullWarp, value, offset));
  return value;
}

// listed: (batch, count) tokens, or null for token i in place i. unit: (batch, count, unit_pitch). state: (batch, count), or null. With a
// state, spoiled rows and rows of zeros are zero.
template <class scalar_t>
__global__ void __launch_bounds__(kUnitThreads) unit_rows_kernel(Rows<scalar_t> rows, int64_t batch, int64_t tokens, int64_t count,
                                                                 bool aligned, const int64_t* listed, float* unit, uint8_t* state) {
  constexpr int kVec = Vec16<scalar_t>::size;
  const int lane = threadIdx.x % 32;
  const int64_t place = (static_cast<int64_t>(blockIdx.x) * kUnitThreads + threadIdx.x) / 32;
  if (place >= batch * count) return;
  const int64_t b = place / count, token = listed ? listed[place] : place % count;
  const int pitch = static_cast<int>(unit_pitch(rows.channels));
  float* const out = unit + place * pitch;
  const bool there = token >= 0 && token < tokens;
  const scalar_t* row = rows.row(b, there ? token : 0);

  // (1) the largest channel
  float largest = 0.f;
  bool finite = true;
  for (int c = lane * kVec; c < rows.channels; c += 32 * kVec) {
    const Vec16<scalar_t> x = load_channels(row, c, rows.channels, aligned);
#pragma unroll
    for (int v = 0; v < kVec; ++v) {
      finite = finite && x[v] - x[v] == 0.f;
      largest = fmaxf(largest, fabsf(x[v]));
    }
  }
  const bool good = __all_sync(kFullWarp, finite) && there;
  const float power = fmaxf(__uint_as_float(__float_as_uint(warp_largest(largest)) & 0x7f800000u), kSmallestNormal);

  // (2) the length
  float sum = 0.f;
  for (int c = lane * kVec; c < rows.channels; c += 32 * kVec) {
    const Vec16<scalar_t> x = load_channels(row, c, rows.channels, aligned);
#pragma unroll
    for (int v = 0; v < kVec; ++v) {
      const float part = x[v] / power;
      sum = fmaf(part, part, sum);
    }
  }
  sum = warp_sum(sum);
  const float length = good && sum > 0.f ? sqrtf(sum) : kInfinity;

  // (3) the division
  const float spoiled = state ? 0.f : __uint_as_float(0x7fc00000u), zero = state || sum > 0.f ? 0.f : zero_row_mark(token);
  for (int c = lane * kVec; c < pitch; c += 32 * kVec) {
    const Vec16<scalar_t> x = load_channels(row, c, rows.channels, aligned);
#pragma unroll
    for (int v = 0; v < kVec; ++v) {
      if (c + v >= pitch) continue;
      const float value = good ? x[v] / power / length + (c + v == 0 ? zero : 0.f) : spoiled;
      out[c + v] = c + v < rows.channels ? value : 0.f;
    }
  }
  if (state && lane == 0) state[place] = !good ? kSpoiledRow : sum > 0.f ? kUnitRow : kZeroRow;
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
