// The distances of many tokens to a few points: what a selection computes where the distances of all pairs are not stored.
//
// What: run(): a block takes tiles of consecutive tokens, tile_step apart, and hands each token's distances to one thread:
//   f(token, slot, sqdist), by all lanes of a warp at once. slot: kTile * (tiles before) + place in the tile; token is past the end where a
//   lane has none. pairs(): about the distances of all pairs of a few tokens, for drafts: nothing is repaired.
// Chosen when: MmaSweep where mma_fits: products of tokens by points on tensor cores, from which distances follow as in sqdist_mma.cuh,
//   pairs that would cancel being done by differences. DifferenceSweep for every other row. Either way a pair's bits in run() depend on
//   the pair alone.
// Synchronisation: barriers of the block only. The caller's threads are done with the block's shared memory before a call, and may use it
//   after the next barrier.
#pragma once
#include "sqdist_mma.cuh"

namespace sts {

constexpr int kSweepThreads = 256;
constexpr int kSweepWarps = kSweepThreads / 32;
constexpr int kSweepPoints = 16;  // at the most: the columns of two tensor-core tiles

// The points of a sweep, which are tokens of the item, in shared memory.
struct SweepPoints {
  int token[kSweepPoints];
  float norm[kSweepPoints];  // of MmaSweep
  int count;
};

// Where pairs() puts the distance of candidates i and j.
STS_HOST_DEVICE int pair_place(int i, int j) { return i < j ? j * (j - 1) / 2 + i : i * (i - 1) / 2 + j; }

// By differences: a thread a token.
template <class scalar_t>
struct DifferenceSweep {
  static constexpr int kTile = kSweepThreads;
  static constexpr int kChannels = 128;  // of the points, in shared memory at a time
  static constexpr size_t kSharedBytes = kSweepPoints * kChannels * sizeof(float);

  template <class F>
  static __device__ __forceinline__ void run(const Rows<scalar_t>& rows, int64_t entry, const Item& item, bool aligned, const float*,
                                             const scalar_t*, const SweepPoints& points, int first_tile, int tile_step, const F& f) {
    if (aligned && rows.channels % Vec16<scalar_t>::size == 0)
      run_rows<true>(rows, entry, item, true, points, first_tile, tile_step, f);
    else
      run_rows<false>(rows, entry, item, aligned, points, first_tile, tile_step, f);
  }

  // kWhole: as in load_vec.
  template <bool kWhole, class F>
  static __device__ __forceinline__ void run_rows(const Rows<scalar_t>& rows, int64_t entry, const Item& item, bool aligned,
                                                  const SweepPoints& points, int first_tile, int tile_step, const F& f) {
    STS_DYNAMIC_SHARED(float, point);                         // [kSweepPoints][kChannels]
    constexpr int kVec = Vec16<scalar_t>::size, kUnroll = 4;  // loads in flight: 64 bytes of a row
    constexpr int kTogether = 4;  // points without a branch between them, that those past `count` are computed with, from anything
    const int count = points.count;
    int slot = threadIdx.x;
    for (int64_t begin = static_cast<int64_t>(first_tile) * kTile; begin < item.tokens;
         begin += static_cast<int64_t>(tile_step) * kTile, slot += kTile) {
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
          Vec16<scalar_t> x[kUnroll];
#pragma unroll
          for (int u = 0; u < kUnroll; ++u) x[u] = load_vec<kWhole>(row, c0 + c + u * kVec, rows.channels, aligned);
#pragma unroll
          for (int p0 = 0; p0 < kSweepPoints; p0 += kTogether) {
            if (p0 >= count) continue;
#pragma unroll
            for (int u = 0; u < kUnroll; ++u)
#pragma unroll
              for (int p = p0; p < p0 + kTogether; ++p)
#pragma unroll
                for (int v = 0; v < kVec; ++v) {
                  const float difference = x[u][v] - point[p * kChannels + c + u * kVec + v];
                  sum[p] = fmaf(difference, difference, sum[p]);
                }
          }
        }
      }
      f(i, slot, sum);
    }
  }

  // A warp of the group takes two pairs at a time.
  static __device__ __forceinline__ void pairs(const Rows<scalar_t>& rows, int64_t entry, const Item& item, bool aligned, const float*,
                                               const scalar_t*, const int* token, int count, int rank, int blocks, float* sqdist) {
    constexpr int kColumns = 2;  // pairs whose loads are under way together
    const int warp = rank * kSweepWarps + threadIdx.x / 32, warps = blocks * kSweepWarps, strips = (count + kColumns - 1) / kColumns;
    const auto row_of = [&](int candidate) { return rows.row(entry, item.first + token[candidate]); };
    for (int strip = warp; strip < count * strips; strip += warps) {
      const int i = strip / strips, j0 = strip % strips * kColumns;
      if (token[i] < 0 || i + 1 >= j0 + kColumns) continue;
      const scalar_t* other[kColumns];
      bool wanted[kColumns];
#pragma unroll
      for (int n = 0; n < kColumns; ++n) {
        wanted[n] = i < j0 + n && j0 + n < count && token[j0 + n < count ? j0 + n : 0] >= 0;
        other[n] = row_of(wanted[n] ? j0 + n : i);
      }
      float of_pair[kColumns];
      warp_sqdist<false>(row_of(i), other, rows.channels, aligned, of_pair);
#pragma unroll
      for (int n = 0; n < kColumns; ++n)
        if (wanted[n] && threadIdx.x % 32 == 0) sqdist[pair_place(i, j0 + n)] = of_pair[n];
    }
  }
};

// On tensor cores: a warp 16 tokens by 16 points. The loads of a block's next tiles are under way while it ends one.
template <class scalar_t>
struct MmaSweep {
  static constexpr int kTile = kSweepWarps * 16;
  static constexpr int kStages = 3;
  static constexpr int kStageRows = kTile + kSweepPoints + 1;  // rows of kMmaChannels: the tokens, the points, and the centre
  static constexpr int kDotStride = kSweepPoints + 1;          // off the banks of the row before
  static constexpr size_t kStageBytes = size_t(kStages) * kStageRows * kMmaChannels * sizeof(scalar_t);
  static constexpr size_t kSharedBytes = kStageBytes + kTile * kDotStride * sizeof(float);

  // norms: of the item's tokens from its centre.
  template <class F>
  static __device__ __forceinline__ void run(const Rows<scalar_t>& rows, int64_t entry, const Item& item, bool aligned, const float* norms,
                                             const scalar_t* centre, const SweepPoints& points, int first_tile, int tile_step, const F& f) {
    STS_DYNAMIC_SHARED(unsigned char, shared);
    scalar_t* const stages = reinterpret_cast<scalar_t*>(shared);
    const int tid = threadIdx.x, lane = tid % 32, warp = tid / 32, count = points.count, chunk = tid % 8;
    float* const dots = reinterpret_cast<float*>(shared + kStageBytes) + warp * 16 * kDotStride;  // of this warp's tokens
    const int steps = static_cast<int>(ceil_div(rows.channels, kMmaChannels));
    const uint32_t tokens = static_cast<uint32_t>(item.tokens);  // below 2^31, so that no tile behind wraps around
    const scalar_t* const first_row = rows.row(entry, item.first);
    // A load: some channels of a tile's tokens and of the points, into a stage.
    struct Load {
      uint32_t first;  // the tile's first token
      int step, stage;
    };
    const auto advance = [&](Load& load) {
      load.stage = load.stage + 1 < kStages ? load.stage + 1 : 0;
      if (++load.step < steps) return false;
      load.step = 0;
      load.first += static_cast<uint32_t>(tile_step * kTile);
      return true;
    };
    const auto tokens_of = [&](const Load& load) { return stages + load.stage * kStageRows * kMmaChannels; };
    const auto points_of = [&](const Load& load) { return tokens_of(load) + kTile * kMmaChannels; };
    Load now{static_cast<uint32_t>(first_tile * kTile), 0, 0}, ahead = now;
    // Rows past the end repeat the last one, points past `count` the first. TileCopy reaches a tile's rows from its first: a packed item
    // may be longer than it reaches from the item's.
    TileCopy<scalar_t, kTile, kSweepThreads> copy(rows, 0, item.tokens - ahead.first);
    const scalar_t* const point = first_row + points.token[tid / 8 < count ? tid / 8 : 0] * rows.row_stride;
    const auto fetch = [&] {
      if (ahead.first < tokens) {
        const int c = ahead.step * kMmaChannels + chunk * 8;
        const bool inside = c < rows.channels;
        copy.start(tokens_of(ahead), first_row + ahead.first * rows.row_stride + c, inside);
        if (tid / 8 < kSweepPoints) cp_async_16(points_of(ahead) + swizzled(tid / 8, chunk), point + c, inside);
        if (tid < 8) cp_async_16(tokens_of(ahead) + swizzled(kStageRows - 1, chunk), centre + c, inside);
      }
      cp_async_commit();  // empty past the end, so that every wait below counts the same
      if (advance(ahead)) copy = TileCopy<scalar_t, kTile, kSweepThreads>(rows, 0, item.tokens - ahead.first);
    };

    float dot[2][4] = {}, sum[2][4] = {};  // [8 points][what mma gives a thread]
    const auto flush_accumulator = [&] {
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
    int slot = warp * 16 + lane;  // of the first 16 lanes
    for (; now.first < tokens; advance(now)) {
      cp_async_wait<kStages - 2>();
      __syncthreads();  // this stage has arrived for all threads, and all are done with the one before, which `fetch` overwrites
      fetch();
#pragma unroll
      for (int k = 0; k < kMmaChannels / 16; ++k) {
        uint32_t a[4], b[4];
        ldmatrix_x4(a, tokens_of(now) + swizzled(warp * 16 + lane % 16, k * 2 + lane / 16));
        ldmatrix_x4(b, points_of(now) + swizzled(lane % 8 + lane / 16 * 8, k * 2 + lane / 8 % 2));
        const CentreFragment<scalar_t> common(tokens_of(now), kStageRows - 1, k);
        common.subtract_from_a(a);
        common.subtract_from_b(b);
#pragma unroll
        for (int n = 0; n < 2; ++n) {
          const uint32_t columns[2] = {b[n * 2], b[n * 2 + 1]};
          mma_16x8x16(sum[n], a, columns, scalar_t());
        }
      }
      if ((now.step + 1) * kMmaChannels % kFlushChannels == 0) flush_accumulator();
      if (now.step + 1 < steps) continue;

      flush_accumulator();
#pragma unroll
      for (int n = 0; n < 2; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          dots[(lane / 4 + e / 2 * 8) * kDotStride + n * 8 + lane % 4 * 2 + e % 2] = dot[n][e];
          dot[n][e] = 0.f;
        }
      __syncwarp();
      const uint32_t first = now.first + warp * 16, i = lane < 16 ? first + lane : tokens;
      float* const mine = dots + lane * kDotStride;
      unsigned cancelled = 0;  // bit p: of this token and point p
      if (i < tokens) {
        const float norm = norms[i];
#pragma unroll
        for (int p = 0; p < kSweepPoints; ++p) {
          if (p >= count) continue;
          const float norms_of_pair = norm + points.norm[p], between = norms_of_pair - 2.f * mine[p];
          mine[p] = between;
          if (!(between >= kCancellation * norms_of_pair)) cancelled |= 1u << p;  // a NaN too
        }
      }
      if (__any_sync(kFullWarp, cancelled)) {
        for (int p = 0; p < count; ++p) {
          for (unsigned marked = __ballot_sync(kFullWarp, cancelled >> p & 1); marked; marked &= marked - 1) {
            const int owner = __ffs(static_cast<int>(marked)) - 1;
            const scalar_t* const other[1] = {rows.row(entry, item.first + points.token[p])};
            float exact[1];
            warp_sqdist<false>(rows.row(entry, item.first + first + owner), other, rows.channels, aligned, exact);
            if (lane == owner) mine[p] = exact[0];
          }
        }
      }
      float sqdist[kSweepPoints];
#pragma unroll
      for (int p = 0; p < kSweepPoints; ++p) sqdist[p] = p < count && i < tokens ? mine[p] : 0.f;
      __syncwarp();  // all have read `dots` before the next tile's
      f(i, slot, sqdist);
      slot += kTile;
    }
    cp_async_wait<0>();
  }

  // A block takes 16 x 16 pairs at a time, each warp some channels of them. A lane loads 16 bytes of a row: eight channels, which stand at
  // other places of the products than in the row, the same for both rows of a pair.
  static __device__ __forceinline__ void pairs(const Rows<scalar_t>& rows, int64_t entry, const Item& item, bool, const float* norms,
                                               const scalar_t* centre, const int* token, int count, int rank, int blocks, float* sqdist) {
    STS_DYNAMIC_SHARED(float, part);  // [kSweepWarps][16][16]
    const int tid = threadIdx.x, lane = tid % 32, warp = tid / 32, row = lane / 4, tiles = (count + 15) / 16;
    const scalar_t* const first_row = rows.row(entry, item.first);
    const auto row_of = [&](int candidate) {
      const int its = token[candidate < count ? candidate : 0];
      return first_row + (its < 0 ? token[0] : its) * rows.row_stride;
    };
    for (int tile = rank; tile < tiles * (tiles + 1) / 2; tile += blocks) {
      int ti = tile, tj = 0;  // tile number tj * (tj + 1) / 2 + ti
      while (ti > tj) ti -= ++tj;
      const scalar_t *a[2], *b[2];
#pragma unroll
      for (int h = 0; h < 2; ++h) a[h] = row_of(ti * 16 + h * 8 + row), b[h] = row_of(tj * 16 + h * 8 + row);
      float sum[2][4] = {};
#pragma unroll 2
      for (int c = warp * 32 + lane % 4 * 8; c - lane % 4 * 8 < rows.channels; c += kSweepWarps * 32) {
        const Vec16<scalar_t> common = load_vec<true>(centre, c, rows.channels, true);
        Vec16<scalar_t> x[2], y[2];
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          x[h] = load_vec<true>(a[h], c, rows.channels, true);
          y[h] = load_vec<true>(b[h], c, rows.channels, true);
        }
#pragma unroll
        for (int h = 0; h < 2; ++h)
#pragma unroll
          for (int w = 0; w < 4; ++w) {
            x[h].word[w] = subtract_pairs(x[h].word[w], common.word[w], scalar_t());
            y[h].word[w] = subtract_pairs(y[h].word[w], common.word[w], scalar_t());
          }
#pragma unroll
        for (int w = 0; w < 4; w += 2) {
          const uint32_t of_rows[4] = {x[0].word[w], x[1].word[w], x[0].word[w + 1], x[1].word[w + 1]};
#pragma unroll
          for (int n = 0; n < 2; ++n) {
            const uint32_t columns[2] = {y[n].word[w], y[n].word[w + 1]};
            mma_16x8x16(sum[n], of_rows, columns, scalar_t());
          }
        }
      }
#pragma unroll
      for (int n = 0; n < 2; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) part[warp * 256 + (row + e / 2 * 8) * 16 + n * 8 + lane % 4 * 2 + e % 2] = sum[n][e];
      __syncthreads();
      const int i = ti * 16 + tid / 16, j = tj * 16 + tid % 16;
      if (i < j && j < count && token[i] >= 0 && token[j] >= 0) {
        float dot = 0.f;
#pragma unroll
        for (int w = 0; w < kSweepWarps; ++w) dot += part[w * 256 + tid];
        const float about = norms[token[i]] + norms[token[j]] - 2.f * dot;
        sqdist[pair_place(i, j)] = about < 0.f ? 0.f : about;
      }
      __syncthreads();  // all have read `part` before the next tile's
    }
  }
};

}  // namespace sts
