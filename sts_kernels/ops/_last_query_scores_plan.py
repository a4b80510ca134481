"""Tile and split sizes of the Triton kernels of `last_query_scores` and its varlen form."""

import functools
from dataclasses import dataclass

import triton

WHOLE_BYTES = 128 << 10  # whole_kernel, in one launch: max bytes of an item's keys
WHOLE_TILE_BYTES = 32 << 10  # and max bytes of one key head, padded to the tile
WHOLE_BLOCK = 256  # and max keys of an item, padded to a power of two
TILE_BYTES = 16 << 10  # bytes of keys per iteration of split_kernel
PROGRAMS_PER_MULTIPROCESSOR = 4  # of split_kernel: their tiles in flight fill the shared memory
MAX_SPLITS = 128  # every program of mean_kernel reads the sums of all splits


def columns(dim: int, itemsize: int) -> tuple[int, int]:
    """(width, chunk): D with padding, and columns per tl.dot, which needs at least 16."""
    if dim > 256:
        chunk = 64 if itemsize == 2 and dim % 8 == 0 else 32
        return triton.cdiv(dim, chunk) * chunk, chunk
    width = max(16, triton.next_power_of_2(dim))
    return width, width if itemsize == 2 else min(width, 32)  # more in float32 does not fit the registers


@dataclass(frozen=True)
class Plan:
    """Tiles and splits of one item. Invariant: they do not depend on the batch, so its result does not either."""

    whole: bool  # whole_kernel, in one launch
    tiles: int  # tiles of query heads per key head
    heads: int  # query heads per tile
    block: int  # keys per iteration of a program
    span: int  # keys per split
    splits: int  # per item

    @staticmethod
    @functools.lru_cache(maxsize=1024)
    def of(kv_heads: int, group: int, keys: int, dim: int, itemsize: int, multiprocessors: int) -> "Plan":
        most = 32 if itemsize == 2 else 8  # bounded by registers; float32 is split into three bfloat16
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
