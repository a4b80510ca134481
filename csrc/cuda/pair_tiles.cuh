// Which pairs of tokens a block computes: square tiles of the upper triangle of each item's pairs.
//   for (int64_t turn = tiles.begin(); turn < tiles.end(); turn += tiles.step()) { const PairTile tile = tiles.at<kTile>(turn); ... }
#pragma once
#include "packed_plan.cuh"

namespace sts {

constexpr int kMarkTile = 64;  // marks are for tiles of so many tokens

struct PairTile {
  int64_t entry, row;     // token i of the item is rows.row(entry, row + i)
  int64_t item, token;    // the item, and its first token among all tokens
  int64_t tokens, pitch;  // the item's tokens; rows of its matrix are so many floats apart
  int64_t offset;         // of the matrix, in floats
  int64_t i, j;           // the first row and column
};

// Of a padded batch's entries from first_entry on: a tile of the grid's x and y a block, and its entries one after another.
struct PaddedTiles {
  int64_t tokens, first_entry, entries, pitch;

  __device__ __forceinline__ int64_t begin() const { return blockIdx.y > blockIdx.x ? entries : blockIdx.z; }
  __device__ __forceinline__ int64_t end() const { return entries; }
  __device__ __forceinline__ int64_t step() const { return gridDim.z; }
  template <int kTile>
  __device__ __forceinline__ PairTile at(int64_t turn) const {
    const int64_t entry = first_entry + turn;
    const int64_t i = int64_t(blockIdx.y) * kTile, j = int64_t(blockIdx.x) * kTile;
    return {entry, 0, entry, entry * tokens, tokens, pitch, turn * tokens * pitch, i, j};
  }
  // Where the mark of part (i, j) of this block's tile is, or -1 past the end; kParts: parts along a side. Marks are (entries, side, side).
  template <int kParts>
  __device__ __forceinline__ int64_t mark(int64_t turn, int i, int j) const {
    const int64_t side = ceil_div(tokens, kMarkTile), row = int64_t(blockIdx.y) * kParts + i, column = int64_t(blockIdx.x) * kParts + j;
    return row < side && column < side ? (turn * side + row) * side + column : -1;
  }
};

// Of the items of one wave of a packed batch: the tiles in turns. parts: tiles are taken apart into so many along a side.
struct PackedTiles {
  const Item* items;
  const PackedMatrix* matrices;
  const PackedWave* wave;
  int tile, parts;

  __device__ __forceinline__ int64_t begin() const { return wave[0].tile * parts * parts + blockIdx.x; }
  __device__ __forceinline__ int64_t end() const { return wave[1].tile * parts * parts; }
  __device__ __forceinline__ int64_t step() const { return gridDim.x; }
  // By whole warps.
  template <int kTile>
  __device__ __forceinline__ PairTile at(int64_t turn) const {
    const int64_t number = turn / (parts * parts);
    const int part = static_cast<int>(turn % (parts * parts));
    const int64_t b = last_of(wave[0].item, wave[1].item, [&](int64_t i) { return matrices[i].first_tile <= number; });
    const Item item = items[b];
    const PackedMatrix matrix = matrices[b];
    const int left = static_cast<int>(number - matrix.first_tile);  // column by column, of which column c has c + 1
    int column = static_cast<int>((sqrtf(8.f * static_cast<float>(left) + 1.f) - 1.f) / 2.f);
    if (column * (column + 1) / 2 > left) --column;
    if ((column + 1) * (column + 2) / 2 <= left) ++column;
    const int row = left - column * (column + 1) / 2;
    return {0,
            item.first,
            b,
            item.first,
            item.tokens,
            matrix_pitch(item.tokens),
            matrix.offset,
            int64_t(row) * tile + part / parts * kTile,
            int64_t(column) * tile + part % parts * kTile};
  }
  template <int kParts>
  __device__ __forceinline__ int64_t mark(int64_t turn, int i, int j) const {
    return (turn * kParts + i) * kParts + j;
  }
};

// By whole warps: the first turn from `turn` on whose tile, of kMarkTile tokens, is marked; end() where there is none.
template <class Tiles>
__device__ __forceinline__ int64_t next_marked(const Tiles& tiles, const unsigned* marks, int64_t turn) {
  for (; turn < tiles.end(); turn += 32 * tiles.step()) {
    const int64_t mine = turn + threadIdx.x % 32 * tiles.step();
    const unsigned marked = __ballot_sync(kFullWarp, mine < tiles.end() && marks[tiles.template mark<1>(mine, 0, 0)] != 0);
    if (marked) return turn + (__ffs(static_cast<int>(marked)) - 1) * tiles.step();
  }
  return tiles.end();
}

}  // namespace sts
