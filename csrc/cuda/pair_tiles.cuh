// Work lists of the distance kernels: square tiles of the upper triangle of each item's matrix of pairs. A block strides over its tiles:
//   for (int64_t index = tiles.begin(); index < tiles.end(); index += tiles.step()) { const PairTile tile = tiles.at<kTile>(index); ... }
// tile: side of a tile in tokens. grid(): the launch. marked(): the same pairs, in tiles that have a mark each.
#pragma once
#include "packed_plan.cuh"

namespace sts {

constexpr int kMarkTile = 64;   // side of the tiles that have a mark each, in tokens
constexpr int kTileBlocks = 4;  // packed: blocks per SM that share the tiles of a wave

struct PairTile {
  int64_t entry, row;     // token i of the item is rows.row(entry, row + i)
  int64_t item, token;    // index of the item, and of its first token among all tokens
  int64_t tokens, pitch;  // tokens of the item; row pitch of its matrix in floats
  int64_t offset;         // start of the item's matrix, in floats
  int64_t i, j;           // first row and column of the tile
  // Of the cluster tile, see TriangleTile:
  bool one_column;  // both tiles have the same columns
  int64_t lower_j;  // first column of the first tile
};

// Tile number t of the upper triangle of side x side tiles, of triangle_tiles(side). Tiles 2u and 2u + 1 make cluster tile u: neighbours in
// one column, and after these the tiles of the diagonal that are left, two at a time. Diagonal tiles load half as much: as the last ones
// they even out the ends of the blocks. The very last tile may lie past the end.
struct TriangleTile {
  int row, column;
  bool one_column;   // both tiles of the cluster tile are in `column`
  int lower_column;  // of the first tile of the cluster tile

  __device__ __forceinline__ TriangleTile(int t, int side) {
    const int u = t / 2, above = side * side / 4;  // c * c / 4, rounded down: the cluster tiles in columns before c
    one_column = u < above;
    if (one_column) {
      column = static_cast<int>(sqrtf(4.f * static_cast<float>(u) + 3.f));
      column -= column * column / 4 > u;  // the root may be off by one
      column += (column + 1) * (column + 1) / 4 <= u;
      row = 2 * (u - column * column / 4) + t % 2;
      lower_column = column;
    } else {
      lower_column = 4 * (u - above);
      row = column = lower_column + t % 2 * 2;
    }
  }
};

// Entries [first_entry, first_entry + entries) of a padded batch. blockIdx.x and y give the tile, and blockIdx.z strides over the entries:
// index = entry - first_entry. Blocks below the diagonal have no work. In an entry with fewer tokens a tile may lie past the end.
struct PaddedTiles {
  int64_t tokens;
  const int64_t* num_tokens;  // (batch), or null; see Items
  int64_t first_entry, entries, pitch;
  int tile;

  dim3 grid() const {
    const auto side = static_cast<unsigned>(ceil_div(tokens, tile));
    return dim3(side, side, grid_extent(entries));
  }
  PaddedTiles marked() const { return {tokens, num_tokens, first_entry, entries, pitch, kMarkTile}; }

  __device__ __forceinline__ int64_t begin() const { return blockIdx.y > blockIdx.x ? entries : blockIdx.z; }
  __device__ __forceinline__ int64_t end() const { return entries; }
  __device__ __forceinline__ int64_t step() const { return gridDim.z; }
  template <int kTile>
  __device__ __forceinline__ PairTile at(int64_t index) const {
    return tile_of(index, int64_t(blockIdx.y) * kTile, int64_t(blockIdx.x) * kTile);
  }
  __device__ __forceinline__ PairTile tile_of(int64_t index, int64_t i, int64_t j) const {
    const int64_t entry = first_entry + index;
    return {entry, 0, entry, entry * tokens, counted(num_tokens, entry, tokens), pitch, index * tokens * pitch, i, j, false, j};
  }
  // Marks are (entries, side, side). Index of the mark of part (i, j) of this block's tile, or -1 past the end; kParts: parts along a side.
  template <int kParts>
  __device__ __forceinline__ int64_t mark(int64_t index, int i, int j) const {
    const int64_t side = ceil_div(tokens, kMarkTile), row = int64_t(blockIdx.y) * kParts + i, column = int64_t(blockIdx.x) * kParts + j;
    return row < side && column < side ? (index * side + row) * side + column : -1;
  }
};

// All tiles of one wave of a packed batch; blocks stride over them. most: max tiles. parts: a tile is split into parts x parts squares, and
// index counts the squares.
struct PackedTiles {
  const Item* items;
  const PackedMatrix* matrices;
  const PackedWave* wave;
  int64_t most;
  int tile, parts = 1;

  dim3 grid() const {
    const int64_t blocks = int64_t(kTileBlocks) * device_sm_count();
    return dim3(static_cast<unsigned>(most < blocks ? most : blocks));
  }
  PackedTiles marked() const { return {items, matrices, wave, most, tile, tile / kMarkTile}; }

  __device__ __forceinline__ int64_t begin() const { return wave[0].tile * parts * parts + blockIdx.x; }
  __device__ __forceinline__ int64_t end() const { return wave[1].tile * parts * parts; }
  __device__ __forceinline__ int64_t step() const { return gridDim.x; }
  // Called by whole warps, for last_of.
  template <int kTile>
  __device__ __forceinline__ PairTile at(int64_t index) const {
    const int64_t number = index / (parts * parts);
    const int part = static_cast<int>(index % (parts * parts));
    const int64_t b = last_of(wave[0].item, wave[1].item, [&](int64_t i) { return matrices[i].first_tile <= number; });
    const Item item = items[b];
    const PackedMatrix matrix = matrices[b];
    const TriangleTile place(static_cast<int>(number - matrix.first_tile), static_cast<int>(ceil_div(item.tokens, tile)));
    return {0,
            item.first,
            b,
            item.first,
            item.tokens,
            matrix_pitch(item.tokens),
            matrix.offset,
            int64_t(place.row) * tile + part / parts * kTile,
            int64_t(place.column) * tile + part % parts * kTile,
            place.one_column,
            int64_t(place.lower_column) * tile};
  }
  template <int kParts>
  __device__ __forceinline__ int64_t mark(int64_t index, int i, int j) const {
    return (index * kParts + i) * kParts + j;
  }
};

// The first index from `index` on whose tile of kMarkTile tokens is marked, or end(). Called by whole warps: each lane tests an index.
template <class Tiles>
__device__ __forceinline__ int64_t next_marked(const Tiles& tiles, const unsigned* marks, int64_t index) {
  for (; index < tiles.end(); index += 32 * tiles.step()) {
    const int64_t candidate = index + threadIdx.x % 32 * tiles.step();
    const unsigned marked = __ballot_sync(kFullWarp, candidate < tiles.end() && marks[tiles.template mark<1>(candidate, 0, 0)] != 0);
    if (marked) return index + (__ffs(static_cast<int>(marked)) - 1) * tiles.step();
  }
  return tiles.end();
}

}  // namespace sts
