"""How the Triton kernels of `attention_received` cut up the work."""

import functools
from dataclasses import dataclass

import triton


@dataclass(frozen=True)
class Columns:
    """The columns of a row of D as tl.dot takes them: WIDTH in chunks of CHUNK, then TAIL more (0: none)."""

    width: int
    chunk: int
    tail: int

    @staticmethod
    def of(dim: int, itemsize: int) -> "Columns":
        if dim > 256:  # all of a row would not fit the shared memory
            chunk = 64 if itemsize == 2 and dim % 8 == 0 else 32
            return Columns(triton.cdiv(dim, chunk) * chunk, chunk, 0)
        width = max(16, triton.next_power_of_2(dim))
        tail = 0
        if width > 32 and dim - width // 2 <= width // 4:  # 72 or 80 columns as 64 + 16, not as 128
            width //= 2
            tail = max(16, triton.next_power_of_2(dim - width))
        return Columns(width, width if itemsize == 2 else min(width, 32), tail)


@dataclass(frozen=True)
class Plan:
    """Block sizes. They do not depend on the batch, so neither does an item's result."""

    rows: int  # query rows of a block
    keys: int  # keys of a block
    warps: int
    stages: int

    @staticmethod
    @functools.lru_cache(maxsize=1024)
    def of(rows: int, keys: int, dim: int, itemsize: int) -> "Plan":
        most = 64 if itemsize == 4 or dim > 128 else 128
        block_rows = min(most, max(16, triton.next_power_of_2(rows)))
        block_keys = min(64, max(16, triton.next_power_of_2(keys)))
        return Plan(block_rows, block_keys, 4, 3 if dim <= 128 else 2)
