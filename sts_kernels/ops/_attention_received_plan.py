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

    rows: int  # query rows that stay in the first pass, while keys stream past
    moving_keys: int
    keys: int  # keys that stay in the second pass, while rows stream past
    moving_rows: int
    warps: int
    stages: int

    @staticmethod
    @functools.lru_cache(maxsize=1024)
    def of(rows: int, keys: int, dim: int, itemsize: int, causal: bool) -> "Plan":
        # float32 comes in three parts, and wide rows in many columns: more would not fit the registers.
        fixed = 64 if itemsize == 4 or dim > 128 else 128
        moving = 32 if itemsize == 4 else 64
        rows, keys = (max(16, triton.next_power_of_2(n)) for n in (rows, keys))
        return Plan(
            rows=min(fixed, rows),
            moving_keys=min(moving, keys),
            keys=min(fixed, keys),
            moving_rows=min(32 if causal else moving, rows),  # each product is compared with its row's position
            warps=8 if itemsize == 4 else 4,
            stages=3 if dim <= 128 and itemsize == 2 else 2,
        )
