// Rows divided by their length, as a float32 copy: the squared distances of the copy are 2 - 2 cosine of the rows.
//
// What: a warp per row. A row with a NaN or infinity becomes NaN throughout; a row of zeros is marked (zero_row_mark), because its cosine
//   to every row is 0.
// Chosen when: the metric of a selection is cosine. The copy goes through the float32 kernels; rows are 16-byte aligned.
// Steps: (1) largest magnitude; (2) sum of squares over the largest, which no square takes out of float32's range; (3) divide.
// Synchronisation: none but the warp's shuffles.
#pragma once
#include "rows.cuh"

namespace sts {

constexpr int kUnitThreads = 256;

// Channels of the copy: whole 16-byte chunks.
STS_HOST_DEVICE int64_t unit_channels(int64_t channels) { return ceil_div(channels, 4) * 4; }

// unit: (entries, tokens, unit_channels).
template <class scalar_t>
__global__ void __launch_bounds__(kUnitThreads)
    unit_rows_kernel(Rows<scalar_t> rows, int64_t entries, int64_t tokens, bool aligned, float* unit) {
  constexpr int kVec = Chunk<scalar_t>::size;
  const int lane = threadIdx.x % 32;
  const int64_t warp = (static_cast<int64_t>(blockIdx.x) * kUnitThreads + threadIdx.x) / 32, warps = int64_t(gridDim.x) * kUnitThreads / 32;
  const int width = static_cast<int>(unit_channels(rows.channels));
  for (int64_t i = warp; i < entries * tokens; i += warps) {
    const scalar_t* row = rows.row(i / tokens, i % tokens);
    float* out = unit + i * width;
    uint32_t bits = 0;  // (1) of magnitudes: order like them, and a NaN or infinity comes last
    for (int c = lane * kVec; c < rows.channels; c += 32 * kVec) {
      const Chunk<scalar_t> x = load_channels(row, c, rows.channels, aligned);
#pragma unroll
      for (int v = 0; v < kVec; ++v) bits = max(bits, __float_as_uint(x[v]) & 0x7fffffffu);
    }
    const float largest = __uint_as_float(__reduce_max_sync(kFullWarp, bits));
    const bool finite = largest < kInfinity;
    const float divisor = largest > 0.f ? largest : 1.f;
    float sum = 0.f;
    for (int c = lane * kVec; c < rows.channels; c += 32 * kVec) {  // (2)
      const Chunk<scalar_t> x = load_channels(row, c, rows.channels, aligned);
#pragma unroll
      for (int v = 0; v < kVec; ++v) sum = fmaf(x[v] / divisor, x[v] / divisor, sum);
    }
    const float length = sqrtf(warp_sum(sum));
    for (int c = lane * kVec; c < rows.channels; c += 32 * kVec) {  // (3)
      const Chunk<scalar_t> x = load_channels(row, c, rows.channels, aligned);
#pragma unroll
      for (int v = 0; v < kVec; ++v) {
        float value = !finite ? __uint_as_float(0x7fc00000u) : largest > 0.f ? x[v] / divisor / length : 0.f;
        if (c + v == 0 && largest == 0.f) value = zero_row_mark(i % tokens);
        if (c + v < rows.channels) out[c + v] = value;
      }
    }
    if (lane < width - rows.channels) out[rows.channels + lane] = 0.f;
  }
}

template <class scalar_t>
cudaError_t launch_unit_rows(const Rows<scalar_t>& rows, int64_t entries, int64_t tokens, float* unit, cudaStream_t stream) {
  const int64_t blocks = ceil_div(entries * tokens, kUnitThreads / 32), most = int64_t(1) << 20;
  const Launch shape{dim3(static_cast<unsigned>(blocks < most ? blocks : most)), dim3(kUnitThreads), 0, 1, false, stream};
  return launch(unit_rows_kernel<scalar_t>, shape, rows, entries, tokens, rows_aligned(rows), unit);
}

inline Rows<float> unit_rows_of(const float* unit, int64_t tokens, int64_t channels) {
  const int64_t width = unit_channels(channels);
  return {unit, tokens * width, width, static_cast<int>(width)};
}

#ifdef STS_KERNEL_TABLE
template <class scalar_t>
cudaError_t launch_unit_rows_of(const scalar_t* features, int64_t batch, int64_t tokens, int64_t channels, int64_t batch_stride,
                                int64_t row_stride, float* unit, cudaStream_t stream) {
  return launch_unit_rows(Rows<scalar_t>{features, batch_stride, row_stride, static_cast<int>(channels)}, batch, tokens, unit, stream);
}
#endif

STS_KERNEL(unit_rows_float32, launch_unit_rows_of<float>);
STS_KERNEL(unit_rows_float16, launch_unit_rows_of<__half>);
STS_KERNEL(unit_rows_bfloat16, launch_unit_rows_of<__nv_bfloat16>);

}  // namespace sts
