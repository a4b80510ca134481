// Shared by the kernels: 16-byte loads of token rows, order-preserving keys, and reductions over a warp or block.
#pragma once
#include "common/items.h"
#include "device.cuh"

namespace sts {

constexpr unsigned kFullWarp = 0xffffffffu;
constexpr float kNaN = __builtin_nanf("");

// Row pitch of a stored matrix, in floats: rows are 16-byte aligned.
STS_HOST_DEVICE int64_t matrix_pitch(int64_t tokens) { return ceil_div(tokens, 4) * 4; }

// Whether every row starts on 16 bytes.
template <class scalar_t>
bool rows_aligned(const Rows<scalar_t>& rows) {
  const auto bytes = [](int64_t elements) { return elements * static_cast<int64_t>(sizeof(scalar_t)); };
  return reinterpret_cast<uintptr_t>(rows.data) % 16 == 0 && bytes(rows.row_stride) % 16 == 0 && bytes(rows.batch_stride) % 16 == 0;
}

// 16 bytes of a row, kept packed and converted when an element is read: 16-bit types take half the registers of floats.
template <class scalar_t>
struct Vec16 {
  static constexpr int size = 16 / sizeof(scalar_t);
  uint32_t word[4];

  __device__ __forceinline__ float operator[](int i) const {
    scalar_t element;
    if constexpr (sizeof(scalar_t) == 4) {
      memcpy(&element, &word[i], 4);
    } else {
      const uint16_t bits = static_cast<uint16_t>(word[i / 2] >> (i % 2 * 16));
      memcpy(&element, &bits, 2);
    }
    return to_float(element);
  }
};

// The 16 bytes of a row that start at channel c; zeros past its end.
template <class scalar_t>
__device__ __forceinline__ Vec16<scalar_t> load_channels(const scalar_t* row, int c, int channels, bool aligned) {
  constexpr int kSize = Vec16<scalar_t>::size;
  Vec16<scalar_t> out;
  if (aligned && c + kSize <= channels) {
    const uint4 bits = __ldg(reinterpret_cast<const uint4*>(row + c));
    out.word[0] = bits.x, out.word[1] = bits.y, out.word[2] = bits.z, out.word[3] = bits.w;
    return out;
  }
#pragma unroll
  for (int w = 0; w < 4; ++w) out.word[w] = 0;
#pragma unroll
  for (int i = 0; i < kSize; ++i) {
    if (c + i >= channels) continue;
    if constexpr (sizeof(scalar_t) == 4) {
      memcpy(&out.word[i], row + c + i, 4);
    } else {
      uint16_t bits;
      memcpy(&bits, row + c + i, 2);
      out.word[i / 2] |= static_cast<uint32_t>(bits) << (i % 2 * 16);
    }
  }
  return out;
}

// As load_channels. kWhole: rows are 16-byte aligned and whole 16-byte vectors long. Without a branch for the tail, the loads of an
// unrolled loop overlap.
template <bool kWhole, class scalar_t>
__device__ __forceinline__ Vec16<scalar_t> load_vec(const scalar_t* row, int c, int channels, bool aligned) {
  if constexpr (kWhole) {
    Vec16<scalar_t> out{};
    if (c < channels) {
      const uint4 bits = __ldg(reinterpret_cast<const uint4*>(row + c));
      out.word[0] = bits.x, out.word[1] = bits.y, out.word[2] = bits.z, out.word[3] = bits.w;
    }
    return out;
  } else {
    return load_channels(row, c, channels, aligned);
  }
}

// Bits that compare as unsigned like the floats do. A NaN without sign bit is above infinity.
__device__ __forceinline__ uint32_t ordered_bits(float value) {
  const uint32_t bits = __float_as_uint(value);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
__device__ __forceinline__ float from_ordered_bits(uint32_t ordered) {
  return __uint_as_float(ordered & 0x80000000u ? ordered & 0x7fffffffu : ~ordered);
}

// (value, index) as one number that compares like the pair: bits 32..63 ordered_bits(value) | bits 0..31 index. Ties: the lowest index.
using Key = unsigned long long;
constexpr Key kNoKey = ~0ull;  // above every key

__device__ __forceinline__ Key make_key(float value, uint32_t index) { return static_cast<Key>(ordered_bits(value)) << 32 | index; }
__device__ __forceinline__ uint32_t key_index(Key key) { return static_cast<uint32_t>(key); }
__device__ __forceinline__ float key_value(Key key) { return from_ordered_bits(static_cast<uint32_t>(key >> 32)); }
__device__ __forceinline__ Key lower(Key a, Key b) { return a < b ? a : b; }

// Minimum over the warp, given to every lane: a REDUX for each word.
__device__ __forceinline__ Key warp_lowest(Key key) {
  const uint32_t high = static_cast<uint32_t>(key >> 32), low = static_cast<uint32_t>(key);
  const uint32_t lowest_high = __reduce_min_sync(kFullWarp, high);
  const uint32_t lowest_low = __reduce_min_sync(kFullWarp, high == lowest_high ? low : 0xffffffffu);
  return static_cast<Key>(lowest_high) << 32 | lowest_low;
}

// Minimum over the block, given to every thread, with one barrier a call. call: the number of the call, whose parity selects a half of the
// double buffer `partial`, with a slot per warp. So a fast warp cannot overwrite a slot that a slow warp has yet to read. Whole warps only.
__device__ __forceinline__ Key block_lowest(Key key, Key (*partial)[32], int call) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  key = warp_lowest(key);
  if (lane == 0) partial[call & 1][warp] = key;
  __syncthreads();
  return warp_lowest(lane < warps ? partial[call & 1][lane] : kNoKey);
}

// Butterfly minimum over the lane-id bits kFrom, 2 kFrom, ... below kEnd. All lanes that agree in the other bits get the same result.
template <int kFrom, int kEnd>
__device__ __forceinline__ float lanes_min(float value) {
#pragma unroll
  for (int offset = kFrom; offset < kEnd; offset *= 2) value = fminf(value, __shfl_xor_sync(kFullWarp, value, offset));
  return value;
}

// Butterfly sum, given to every lane. T: float or double.
template <class T>
__device__ __forceinline__ T warp_sum(T value) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) value += __shfl_xor_sync(kFullWarp, value, offset);
  return value;
}

// Butterfly maximum, given to every lane.
__device__ __forceinline__ float warp_max(float value) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) value = fmaxf(value, __shfl_xor_sync(kFullWarp, value, offset));
  return value;
}

// sum[s][t] += (a - b)^2, or a b if kProduct, of row ti + s of `a` and row tj + t of `b`, over the channels of a stage in shared memory.
template <bool kProduct, int kChannels, int kPitch>
__device__ __forceinline__ void accumulate_pairs(const float (&a)[kChannels][kPitch], const float (&b)[kChannels][kPitch], int ti, int tj,
                                                 float (&sum)[4][4]) {
#pragma unroll 4
  for (int c = 0; c < kChannels; ++c) {
    float x[4], y[4];
#pragma unroll
    for (int t = 0; t < 4; ++t) x[t] = a[c][ti + t], y[t] = b[c][tj + t];
#pragma unroll
    for (int s = 0; s < 4; ++s)
#pragma unroll
      for (int t = 0; t < 4; ++t) {
        const float lhs = kProduct ? x[s] : x[s] - y[t], rhs = kProduct ? y[t] : lhs;
        sum[s][t] = fmaf(lhs, rhs, sum[s][t]);
      }
  }
}

}  // namespace sts
