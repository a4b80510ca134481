"""Tile sizes of the Triton kernels of `attention_received`."""

import functools
from dataclasses import dataclass

import triton


@dataclass(frozen=True)
class Columns:
    """Operands of tl.dot for rows of D columns: `width` columns in chunks of `chunk`, then `tail` columns (0: none)."""

    width: int
    chunk: int
    tail: int

    @staticmethod
    def of(dim: int, itemsize: int) -> "Columns":
        if dim > 256:  # a whole row does not fit in shared memory
            chunk = 64 if itemsize == 2 and dim % 8 == 0 else 32
            return Columns(triton.cdiv(dim, chunk) * chunk, chunk, 0)
        width = max(16, triton.next_power_of_2(dim))
        tail = 0
        if width > 32 and dim - width // 2 <= width // 4:  # e.g. 80 columns: 64 + 16, not 128
            width //= 2
            tail = max(16, triton.next_power_of_2(dim - width))
        return Columns(width, width if itemsize == 2 else min(width, 32), tail)


@dataclass(frozen=True)
class Plan:
    """Block sizes. Invariant: they do not depend on the batch, so an item's result does not either."""

    rows: int  # pass (1): query rows of a program, while keys stream past
    moving_keys: int  # pass (1): keys per iteration
    keys: int  # pass (2): keys of a program, while query rows stream past
    moving_rows: int  # pass (2): query rows per iteration
    warps: int
    stages: int

    @staticmethod
    @functools.lru_cache(maxsize=1024)
    def of(rows: int, keys: int, dim: int, itemsize: int, causal: bool) -> "Plan":
        # Bounded by registers: float32 is split into three bfloat16, and wide rows have many columns.
        fixed = 64 if itemsize == 4 or dim > 128 else 128
        moving = 32 if itemsize == 4 else 64
        rows, keys = (max(16, triton.next_power_of_2(n)) for n in (rows, keys))
        return Plan(
            rows=min(fixed, rows),
            moving_keys=min(moving, keys),
            keys=min(fixed, keys),
            moving_rows=min(32 if causal else moving, rows),  # each logit is compared with its row's position
            warps=8 if itemsize == 4 else 4,
            stages=3 if dim <= 128 and itemsize == 2 else 2,
        )
