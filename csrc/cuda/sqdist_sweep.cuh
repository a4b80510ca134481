// Squared distances of all tokens of an item to a few points: one pass over the features. For selections without a stored matrix.
//
// What: run() is a pass. A block takes tiles of kTile consecutive tokens, the tiles first_tile, first_tile + tile_step, ... of the item. It
//   calls f(i, token, values) once for every token i, with the whole warp together. token is load(i), called ahead; values[p] is
//   weigh(token, p, sqdist) of point p, undefined past points.count. Lane 0 passes the first token of the warp, the next lanes the next
//   ones, and lanes without a token one past the end.
//   pairs() writes store(sqdist) of all pairs of a few tokens, for drafts. Here MmaSweep does not recompute cancelled pairs.
// Chosen when: MmaSweep where mma_fits, DifferenceSweep for all other rows. MmaSweep multiplies tokens by points on tensor cores, as
//   sqdist_mma.cuh does, and recomputes cancelled pairs by differences. In both, the bits of a distance in run() depend on the pair
//   alone.
// Steps of MmaSweep::run: (1) prefetch stages of 64 channels by cp.async, two ahead; (2) multiply a stage; (3) epilogue of a tile: turn
//   products into distances, recompute cancelled pairs, call f.
// Synchronisation: block barriers only. Before a call all threads have finished with the block's dynamic shared memory. After a call the
//   caller may write to it once all threads have passed a barrier.
#pragma once
#include "sqdist_mma.cuh"

namespace sts {

constexpr int kSweepThreads = 256;
constexpr int kSweepWarps = kSweepThreads / 32;
constexpr int kMostSweepPoints = 32;  // max points of a pass by any Sweep

// The points of a pass, in shared memory. Points are tokens of the item.
struct SweepPoints {
  int token[kMostSweepPoints];
  float norm[kMostSweepPoints];  // squared distance to the centre; MmaSweep alone reads it
  int count;
};

// Index of the pair (i, j), i != j, in the result of pairs(): row by row of the triangle below the diagonal.
STS_HOST_DEVICE int pair_index(int i, int j) { return i < j ? j * (j - 1) / 2 + i : i * (i - 1) / 2 + j; }

// By differences, one thread per token.
template <class scalar_t>
struct DifferenceSweep {
  static constexpr int kTile = kSweepThreads, kPoints = 16;
  static constexpr int kChannels = 128;  // channels of the points in shared memory at a time
  static constexpr size_t kSharedBytes = kPoints * kChannels * sizeof(float);

  template <class Load, class Weigh, class F>
  static __device__ __forceinline__ void run(const Rows<scalar_t>& rows, int64_t entry, const Item& item, bool aligned, const float*,
                                             const scalar_t*, const SweepPoints& points, int first_tile, int tile_step, const Load& load,
                                             const Weigh& weigh, const F& f) {
    if (aligned && rows.channels % Vec16<scalar_t>::size == 0)
      run_rows<true>(rows, entry, item, true, points, first_tile, tile_step, load, weigh, f);
    else
      run_rows<false>(rows, entry, item, aligned, points, first_tile, tile_step, load, weigh, f);
  }

  // kWhole: as in load_vec.
  template <bool kWhole, class Load, class Weigh, class F>
  static __device__ __forceinline__ void run_rows(const Rows<scalar_t>& rows, int64_t entry, const Item& item, bool aligned,
                                                  const SweepPoints& points, int first_tile, int tile_step, const Load& load,
                                                  const Weigh& weigh, const F& f) {
    STS_DYNAMIC_SHARED(float, point);                         // [kPoints][kChannels]
    constexpr int kVec = Vec16<scalar_t>::size, kUnroll = 4;  // loads in flight: 64 bytes of a row
    constexpr int kTogether = 4;  // points per branch. Sums of points past `count` come from stale shared memory, and f ignores them
    const int count = points.count;
    // One tile: sums over all channels, kChannels of the points at a time.
    for (int64_t begin = static_cast<int64_t>(first_tile) * kTile; begin < item.tokens; begin += static_cast<int64_t>(tile_step) * kTile) {
      const int64_t i = begin + threadIdx.x, inside = i < item.tokens ? i : item.tokens - 1;
      const scalar_t* row = rows.row(entry, item.first + inside);
      const auto token = load(inside);
      float sum[kPoints] = {};
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
          for (int p0 = 0; p0 < kPoints; p0 += kTogether) {
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
#pragma unroll
      for (int p = 0; p < kPoints; ++p)
        if (p < count) sum[p] = weigh(token, p, sum[p]);
      f(i < item.tokens ? i : item.tokens, token, sum);
    }
  }

  // Each warp of the group takes two pairs (i, j0), (i, j0 + 1) at a time.
  template <class Store>
  static __device__ __forceinline__ void pairs(const Rows<scalar_t>& rows, int64_t entry, const Item& item, bool aligned, const float*,
                                               const scalar_t*, const int* token, int count, int rank, int blocks, const Store& store,
                                               float* out) {
    constexpr int kColumns = 2;  // pairs whose loads are in flight together
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
      float pair[kColumns];
      warp_sqdist<false>(row_of(i), other, rows.channels, aligned, pair);
#pragma unroll
      for (int n = 0; n < kColumns; ++n)
        if (wanted[n] && threadIdx.x % 32 == 0) out[pair_index(i, j0 + n)] = store(pair[n]);
    }
  }
};

// On tensor cores: a warp multiplies 16 tokens by 32 points, or by 16 if there are no more. Stages run on across tiles: loads of the next
// tile are in flight during the epilogue of this one.
template <class scalar_t>
struct MmaSweep {
  static constexpr int kTile = kSweepWarps * 16, kPoints = 32;
  static constexpr int kStages = 3;
  static constexpr int kStageRows = kTile + kPoints + 1;  // rows of kMmaChannels: tokens, points, centre
  static constexpr int kDotStride = kPoints + 1;          // in floats; odd: no bank conflict when each lane reads its row
  static constexpr size_t kStageBytes = size_t(kStages) * kStageRows * kMmaChannels * sizeof(scalar_t);
  static constexpr size_t kSharedBytes = kStageBytes + kTile * kDotStride * sizeof(float);

  // norms: (tokens of the item), squared distances to the centre.
  // Shared memory: stages[kStages][kStageRows][kMmaChannels], swizzled; dots[kTile][kDotStride].
  template <class Load, class Weigh, class F>
  static __device__ __forceinline__ void run(const Rows<scalar_t>& rows, int64_t entry, const Item& item, bool aligned, const float* norms,
                                             const scalar_t* centre, const SweepPoints& points, int first_tile, int tile_step,
                                             const Load& load, const Weigh& weigh, const F& f) {
    STS_DYNAMIC_SHARED(unsigned char, shared);
    scalar_t* const stages = reinterpret_cast<scalar_t*>(shared);
    const int tid = threadIdx.x, lane = tid % 32, warp = tid / 32, count = points.count, chunk = tid % 8;
    float* const dots = reinterpret_cast<float*>(shared + kStageBytes) + warp * 16 * kDotStride;  // [16 tokens of this warp][kDotStride]
    const int steps = static_cast<int>(ceil_div(rows.channels, kMmaChannels));
    const uint32_t tokens = static_cast<uint32_t>(item.tokens);  // below 2^31: the first token of a tile past the end does not wrap
    const scalar_t* const first_row = rows.row(entry, item.first);
    // Position in the pipeline: kMmaChannels channels of a tile, of the points and of the centre, and the stage that holds them.
    struct Position {
      uint32_t first;   // first token of the tile
      int step, stage;  // step: channels from step * kMmaChannels on
    };
    // Moves to the next channels or the next tile. True: the next tile.
    const auto advance = [&](Position& at) {
      at.stage = at.stage + 1 < kStages ? at.stage + 1 : 0;
      if (++at.step < steps) return false;
      at.step = 0;
      at.first += static_cast<uint32_t>(tile_step * kTile);
      return true;
    };
    const auto tokens_of = [&](const Position& at) { return stages + at.stage * kStageRows * kMmaChannels; };
    const auto points_of = [&](const Position& at) { return tokens_of(at) + kTile * kMmaChannels; };
    Position current{static_cast<uint32_t>(first_tile * kTile), 0, 0}, ahead = current;
    // Rows past the end repeat the last row, points past `count` the first point. The base of TileCopy is the first row of the tile, not of
    // the item: its 32-bit offsets may be too short for a long packed item.
    TileCopy<scalar_t, kTile, kSweepThreads> copy(rows, 0, item.tokens - ahead.first);
    static_assert(kPoints == kSweepThreads / 8, "a thread copies 16 bytes of one point");
    const scalar_t* const point = first_row + points.token[tid / 8 < count ? tid / 8 : 0] * rows.row_stride;
    const bool copies_point = tid / 8 < (count > kPoints / 2 ? kPoints : kPoints / 2);
    // (1) Starts the copies of `ahead`, one commit group per stage, and advances it.
    const auto fetch = [&] {
      if (ahead.first < tokens) {
        const int c = ahead.step * kMmaChannels + chunk * 8;
        const bool inside = c < rows.channels;
        copy.start(tokens_of(ahead), first_row + ahead.first * rows.row_stride + c, inside);
        if (copies_point) cp_async_16(points_of(ahead) + swizzled(tid / 8, chunk), point + c, inside);
        if (tid < 8) cp_async_16(tokens_of(ahead) + swizzled(kStageRows - 1, chunk), centre + c, inside);
      }
      cp_async_commit();  // past the end an empty group: cp_async_wait below counts groups
      if (advance(ahead)) copy = TileCopy<scalar_t, kTile, kSweepThreads>(rows, 0, item.tokens - ahead.first);
    };

    MmaProducts<scalar_t, 1, 2> dot[2];  // [half of the points]; column tiles: 8 points each
#pragma unroll
    for (int stage = 0; stage < kStages - 1; ++stage) fetch();
    decltype(load(0)) token;  // of lane % 16
    float norm = 0.f;
    for (; current.first < tokens; advance(current)) {
      const uint32_t first = current.first + warp * 16, i = first + lane % 16;
      if (current.step == 0) {
        const uint32_t inside = i < tokens ? i : tokens - 1;
        token = load(inside);
        norm = norms[inside];
      }
      cp_async_wait<kStages - 2>();
      __syncthreads();  // the current stage is complete for all threads, and all have read the stage that `fetch` overwrites
      fetch();
      // (2) multiply
#pragma unroll
      for (int k = 0; k < kMmaChannels / 16; ++k) {
        uint32_t a[1][4];
        ldmatrix_x4(a[0], tokens_of(current) + swizzled(warp * 16 + lane % 16, k * 2 + lane / 16));
        const CentreFragment<scalar_t> centre_fragment(tokens_of(current), kStageRows - 1, k);
        centre_fragment.subtract_from_a(a[0]);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          if (half * kPoints / 2 >= count) continue;
          uint32_t b[1][4];
          ldmatrix_x4(b[0], points_of(current) + swizzled(half * 16 + lane % 8 + lane / 16 * 8, k * 2 + lane / 8 % 2));
          centre_fragment.subtract_from_b(b[0]);
          dot[half].multiply(a, b);
        }
      }
      const bool last = current.step + 1 == steps;
      if (last || (current.step + 1) * kMmaChannels % kFlushChannels == 0) dot[0].flush(), dot[1].flush();
      if (!last) continue;

      // (3) epilogue of the tile: through shared memory, lanes t and t + 16 get the products of token t with a half of the points each
#pragma unroll
      for (int half = 0; half < 2; ++half)
#pragma unroll
        for (int n = 0; n < 2; ++n)
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            dots[(lane / 4 + e / 2 * 8) * kDotStride + half * 16 + n * 8 + lane % 4 * 2 + e % 2] = dot[half].product[0][n][e];
            dot[half].product[0][n][e] = 0.f;
          }
      __syncwarp();
      float* const row = dots + lane % 16 * kDotStride;  // products of the token, then its values
      const int first_point = lane / 16 * (kPoints / 2);
      unsigned cancelled = 0;  // bit p: the distance to point p cancels
#pragma unroll
      for (int q = 0; q < kPoints / 2; ++q) {
        const int p = first_point + q;
        if (p >= count) continue;
        const float norms_of_pair = norm + points.norm[p], distance = norms_of_pair - 2.f * row[p];
        row[p] = weigh(token, p, distance);
        if (i < tokens && cancels(distance, norms_of_pair, kCancellation)) cancelled |= 1u << p;
      }
      // The warp recomputes cancelled distances by differences, one after another.
      if (__any_sync(kFullWarp, cancelled)) {
        for (int p = 0; p < count; ++p) {
          for (unsigned owners = __ballot_sync(kFullWarp, cancelled >> p & 1); owners; owners &= owners - 1) {
            const int owner = __ffs(static_cast<int>(owners)) - 1;
            const scalar_t* const other[1] = {rows.row(entry, item.first + points.token[p])};
            float exact[1];
            warp_sqdist<false>(rows.row(entry, item.first + first + owner % 16), other, rows.channels, aligned, exact);
            if (lane == owner) row[p] = weigh(token, p, exact[0]);
          }
        }
      }
      __syncwarp();  // `row` is read by lanes 0..15, which have one token each
      f(lane < 16 && i < tokens ? i : tokens, token, row);
      __syncwarp();  // all lanes have read `dots` before the next tile overwrites it
    }
    cp_async_wait<0>();
  }

  // A block takes tiles of 16 x 16 pairs with ti <= tj. Its warps split the channels (split-K), and add the partial sums in shared memory.
  // Fragments come from global memory, without ldmatrix: a lane loads 8 consecutive channels of a row (16 bytes) and uses them as its
  // registers for two steps of 16 channels. The channels of both rows are permuted alike, so the dot product is that of the rows.
  template <class Store>
  static __device__ __forceinline__ void pairs(const Rows<scalar_t>& rows, int64_t entry, const Item& item, bool, const float* norms,
                                               const scalar_t* centre, const int* token, int count, int rank, int blocks,
                                               const Store& store, float* out) {
    STS_DYNAMIC_SHARED(float, part);  // partial sums [kSweepWarps][16][16]
    const int tid = threadIdx.x, lane = tid % 32, warp = tid / 32, row = lane / 4, tiles = (count + 15) / 16;
    const scalar_t* const first_row = rows.row(entry, item.first);
    // An absent candidate reads the row of candidate 0, which is always present.
    const auto row_of = [&](int candidate) {
      const int row_token = token[candidate < count ? candidate : 0];
      return first_row + (row_token < 0 ? token[0] : row_token) * rows.row_stride;
    };
    for (int tile = rank; tile < tiles * (tiles + 1) / 2; tile += blocks) {
      int ti = tile, tj = 0;  // tile = tj * (tj + 1) / 2 + ti, ti <= tj
      while (ti > tj) ti -= ++tj;
      const scalar_t *a[2], *b[2];
#pragma unroll
      for (int h = 0; h < 2; ++h) a[h] = row_of(ti * 16 + h * 8 + row), b[h] = row_of(tj * 16 + h * 8 + row);
      float sum[2][4] = {};
#pragma unroll 2
      for (int c = warp * 32 + lane % 4 * 8; c - lane % 4 * 8 < rows.channels; c += kSweepWarps * 32) {
        const Vec16<scalar_t> offset = load_vec<true>(centre, c, rows.channels, true);
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
            x[h].word[w] = subtract_pairs(x[h].word[w], offset.word[w], scalar_t());
            y[h].word[w] = subtract_pairs(y[h].word[w], offset.word[w], scalar_t());
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
        const float approximate = norms[token[i]] + norms[token[j]] - 2.f * dot;
        out[pair_index(i, j)] = store(approximate < 0.f ? 0.f : approximate);
      }
      __syncthreads();  // all have read `part` before the next tile overwrites it
    }
  }
};

}  // namespace sts
