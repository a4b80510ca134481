"""How the Triton kernels of `last_query_scores` and its varlen form cut up the work."""

import functools
from dataclasses import dataclass

import triton

WHOLE_BYTES = 128 << 10  # one launch up to here: keys of an item in bytes
WHOLE_TILE_BYTES = 32 << 10  # and up to here: one key head of them, as padded in the tile
WHOLE_BLOCK = 256  # and up to here: keys of an item, where rows are short
TILE_BYTES = 16 << 10  # of keys a program of split_kernel works on at a time
PROGRAMS_PER_MULTIPROCESSOR = 4  # of split_kernel: with the tiles in flight they fill the shared memory
MAX_SPLITS = 128  # every program of mean_kernel reads the sums of all splits


def columns(dim: int, itemsize: int) -> tuple[int, int]:
    """Columns of a row of D with its padding, and the columns multiplied at a time: 16 or more, as tl.dot wants."""
    if dim > 256:
        chunk = 64 if itemsize == 2 and dim % 8 == 0 else 32
        return triton.cdiv(dim, chunk) * chunk, chunk
    width = max(16, triton.next_power_of_2(dim))
    return width, width if itemsize == 2 else min(width, 32)  # more in float32 does not fit the registers


@dataclass(frozen=True)
class Plan:
    """How the work on one item is cut up. It does not look at the batch, so neither does an item's result."""

    whole: bool  # one launch
    tiles: int  # of the query heads that read one key head
    heads: int  # query heads in a tile
    block: int  # keys a program works on at a time
    span: int  # keys of a split
    splits: int

    @staticmethod
    @functools.lru_cache(maxsize=1024)
    def of(kv_heads: int, group: int, keys: int, dim: int, itemsize: int, multiprocessors: int) -> "Plan":
        most = 32 if itemsize == 2 else 8  # what the registers hold; float32 comes in three parts
        heads = max(n for n in range(1, min(group, most) + 1) if group % n == 0)
        tiles = group // heads
        width, _ = columns(dim, itemsize)
        row = width * itemsize
        block = max(16, triton.next_power_of_2(keys))
        few = keys * kv_heads * dim * itemsize <= WHOLE_BYTES and block * row <= WHOLE_TILE_BYTES
        if heads <= 16 and few and block <= WHOLE_BLOCK:
            return Plan(True, tiles, heads, block, keys, 1)
        block = min(max(TILE_BYTES // row, 32), 64 if heads > 16 else 128) if width <= 256 else 64
        blocks = triton.cdiv(keys, block)
        wanted = PROGRAMS_PER_MULTIPROCESSOR * multiprocessors // (kv_heads * tiles)
        blocks_per_split = triton.cdiv(blocks, min(max(wanted, 1), MAX_SPLITS))
        return Plan(False, tiles, heads, block, block * blocks_per_split, triton.cdiv(blocks, blocks_per_split))
