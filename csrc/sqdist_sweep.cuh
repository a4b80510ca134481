// The distances of many tokens to a few points: what a selection computes where the distances of all pairs are not stored. A block
// takes tiles of consecutive tokens, and hands each token's distances to one thread:
//   f(token, sqdist): by all lanes of a warp at once; token is past the end where a lane has none.
// Differences serve every element type. Tensor cores take 16-bit rows: a product of tokens by points, from which distances follow
// as in sqdist_mma.cuh, pairs that would cancel being done by differences. Either way a pair's bits depend on the pair alone.
#pragma once
#include "sqdist_mma.cuh"

namespace sts {

constexpr int kSweepThreads = 256;
constexpr int kSweepWarps = kSweepThreads / 32;
constexpr int kSweepPoints = 16;  // at the most: the columns of two tensor-core tiles

// The points of a sweep, which are tokens of the item, in shared memory.
struct SweepPoints {
  int token[kSweepPoints];
  int count;
};

// By differences: a thread a token.
template <class scalar_t>
struct DifferenceSweep {
  static constexpr int kTile = kSweepThreads;
  static constexpr int kChannels = 128;  // of the points, in shared memory at a time
  static constexpr size_t kSharedBytes = kSweepPoints * kChannels * sizeof(float);

  // The tiles first_tile, first_tile + tile_step, ... of an item.
  template <class F>
  static __device__ __forceinline__ void run(const Rows<scalar_t>& rows, int64_t entry, const Item& item, bool aligned, const float*,
                                             const scalar_t*, const SweepPoints& points, int first_tile, int tile_step, const F& f) {
    STS_DYNAMIC_SHARED(float, point);  // [kSweepPoints][kChannels]
    constexpr int kVec = Chunk<scalar_t>::size, kUnroll = 4;  // loads in flight: 64 bytes of a row
    const int count = points.count;
    for (int64_t begin = static_cast<int64_t>(first_tile) * kTile; begin < item.tokens; begin += static_cast<int64_t>(tile_step) * kTile) {
      const int64_t i = begin + threadIdx.x;
      const scalar_t* row = rows.row(entry, item.first + (i < item.tokens ? i : item.tokens - 1));
      float sum[kSweepPoints] = {};
      for (int c0 = 0; c0 < rows.channels; c0 += kChannels) {
        __syncthreads();
        for (int e = threadIdx.x; e < count * kChannels; e += kSweepThreads) {
          const int c = c0 + e % kChannels;
          point[e] = c < rows.channels ? to_float(rows.row(entry, item.first + points.token[e / kChannels])[c]) : 0.f;
        }
        __syncthreads();
        for (int c = 0; c < kChannels && c0 + c < rows.channels; c += kVec * kUnroll) {
          Chunk<scalar_t> x[kUnroll];
#pragma unroll
          for (int u = 0; u < kUnroll; ++u) x[u] = load_channels(row, c0 + c + u * kVec, rows.channels, aligned);
#pragma unroll
          for (int u = 0; u < kUnroll; ++u)
#pragma unroll
            for (int p = 0; p < kSweepPoints; ++p) {
              if (p >= count) continue;
#pragma unroll
              for (int v = 0; v < kVec; ++v) {
                const float difference = x[u][v] - point[p * kChannels + c + u * kVec + v];
                sum[p] = fmaf(difference, difference, sum[p]);
              }
            }
        }
      }
      f(i, sum);
    }
  }
};

// On tensor cores: a warp 16 tokens by 16 points. The loads of a block's next tiles are under way while it ends one.
template <class scalar_t>
struct MmaSweep {
  static constexpr int kTile = kSweepWarps * 16;
  static constexpr int kStages = 3;
  static constexpr int kStageRows = kTile + kSweepPoints + 1;  // rows of kMmaChannels: the tokens, the points, and the centre
  static constexpr int kDotStride = kSweepPoints + 1;      // off the banks of the row before
  static constexpr size_t kStageBytes = size_t(kStages) * kStageRows * kMmaChannels * sizeof(scalar_t);
  static constexpr size_t kSharedBytes = kStageBytes + kTile * kDotStride * sizeof(float);

  // norms: of the item's tokens from its centre.
  template <class F>
  static __device__ __forceinline__ void run(const Rows<scalar_t>& rows, int64_t entry, const Item& item, bool aligned, const float* norms,
                                             const scalar_t* centre, const SweepPoints& points, int first_tile, int tile_step, const F& f) {
    STS_DYNAMIC_SHARED(unsigned char, shared);
    scalar_t* const stages = reinterpret_cast<scalar_t*>(shared);
    const int tid = threadIdx.x, lane = tid % 32, warp = tid / 32, count = points.count;
    float* const dots = reinterpret_cast<float*>(shared + kStageBytes) + warp * 16 * kDotStride;  // of this warp's tokens
    const int steps = static_cast<int>(ceil_div(rows.channels, kMmaChannels));
    // A load: some channels of a tile's tokens and of the points, into a stage.
    struct Load {
      int64_t first;  // the tile's first token
      int step, stage;
    };
    const auto advance = [&](Load& load) {
      load.stage = load.stage + 1 < kStages ? load.stage + 1 : 0;
      if (++load.step < steps) return;
      load.step = 0;
      load.first += static_cast<int64_t>(tile_step) * kTile;
    };
    const auto tokens_of = [&](const Load& load) { return stages + load.stage * kStageRows * kMmaChannels; };
    const auto points_of = [&](const Load& load) { return tokens_of(load) + kTile * kMmaChannels; };
    Load now{static_cast<int64_t>(first_tile) * kTile, 0, 0}, ahead = now;
    const auto fetch = [&] {
      if (ahead.first < item.tokens) {
        const int chunk = tid % 8, c = ahead.step * kMmaChannels + chunk * 8;
#pragma unroll
        for (int r = tid / 8; r < kTile; r += kSweepThreads / 8) {
          // Rows past the end repeat the last one, points past `count` the first.
          const int64_t i = ahead.first + r < item.tokens ? ahead.first + r : item.tokens - 1;
          cp_async_16(tokens_of(ahead) + staged(r, chunk), rows.row(entry, item.first + i) + c, c < rows.channels);
        }
        if (tid / 8 < kSweepPoints) {
          const int64_t token = points.token[tid / 8 < count ? tid / 8 : 0];
          cp_async_16(points_of(ahead) + staged(tid / 8, chunk), rows.row(entry, item.first + token) + c, c < rows.channels);
        }
        if (tid < 8) cp_async_16(tokens_of(ahead) + staged(kStageRows - 1, chunk), centre + c, c < rows.channels);
      }
      cp_async_commit();  // empty past the end, so that every wait below counts the same
      advance(ahead);
    };

    float dot[2][4] = {}, sum[2][4] = {};  // [8 points][what mma gives a thread]
    const auto close_run = [&] {
#pragma unroll
      for (int n = 0; n < 2; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          dot[n][e] += sum[n][e];
          sum[n][e] = 0.f;
        }
    };
#pragma unroll
    for (int stage = 0; stage < kStages - 1; ++stage) fetch();
    for (; now.first < item.tokens; advance(now)) {
      cp_async_wait<kStages - 2>();
      __syncthreads();  // this stage has arrived for all threads, and all are done with the one before, which `fetch` overwrites
      fetch();
#pragma unroll
      for (int k = 0; k < kMmaChannels / 16; ++k) {
        uint32_t a[4], b[4];
        ldmatrix_x4(a, tokens_of(now) + staged(warp * 16 + lane % 16, k * 2 + lane / 16));
        ldmatrix_x4(b, points_of(now) + staged(lane % 8 + lane / 16 * 8, k * 2 + lane / 8 % 2));
        const CentrePairs<scalar_t> common(tokens_of(now), kStageRows - 1, k);
        common.leave_by_halves(a);
        common.leave_in_turns(b);
#pragma unroll
        for (int n = 0; n < 2; ++n) {
          const uint32_t columns[2] = {b[n * 2], b[n * 2 + 1]};
          mma_16x8x16(sum[n], a, columns, scalar_t());
        }
      }
      if ((now.step + 1) * kMmaChannels % kMmaRun == 0) close_run();
      if (now.step + 1 < steps) continue;

      close_run();
#pragma unroll
      for (int n = 0; n < 2; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          dots[(lane / 4 + e / 2 * 8) * kDotStride + n * 8 + lane % 4 * 2 + e % 2] = dot[n][e];
          dot[n][e] = 0.f;
        }
      __syncwarp();
      const int64_t first = now.first + warp * 16, i = lane < 16 ? first + lane : item.tokens;
      float sqdist[kSweepPoints];
#pragma unroll
      for (int p = 0; p < kSweepPoints; ++p) {
        sqdist[p] = 0.f;
        if (p >= count) continue;
        bool kept = true;
        if (i < item.tokens) {
          const float norms_of_pair = norms[i] + norms[points.token[p]];
          sqdist[p] = norms_of_pair - 2.f * dots[lane * kDotStride + p];
          kept = sqdist[p] >= kCancellation * norms_of_pair;  // false for a NaN too
        }
        for (unsigned marked = __ballot_sync(kFullWarp, !kept); marked; marked &= marked - 1) {
          const int owner = __ffs(static_cast<int>(marked)) - 1;
          const scalar_t* const point[1] = {rows.row(entry, item.first + points.token[p])};
          float exact[1];
          warp_sqdist<false>(rows.row(entry, item.first + first + owner), point, rows.channels, aligned, exact);
          if (lane == owner) sqdist[p] = exact[0];
        }
      }
      __syncwarp();  // all have read `dots` before the next tile's
      f(i, sqdist);
    }
    cp_async_wait<0>();
  }
};

}  // namespace sts
