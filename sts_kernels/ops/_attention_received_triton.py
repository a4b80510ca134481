"""Triton kernels and launcher of `attention_received`. Imported at the first call on CUDA tensors.

What: the column means of softmax(Q K^T scale), without the (R, S) matrix in memory.
Chosen when: the tensors are on a GPU.
Steps:
    (1) rows_kernel: per query row, the maximum of its logits and share = weight / (sum of exponentials). This is a
        FlashAttention forward without values.
    (2) keys_kernel: per query head and key, the sum over rows of exp(logit - maximum) * share, divided by the total
        weight of the rows that count.
    (3) mean_kernel: the mean over heads. Skipped with per_head.
Synchronisation: the three launches follow each other on one stream. Each program sums in a fixed order and writes its
own outputs. There are no atomics.

Both passes multiply a fixed block (rows in (1), keys in (2)) by moving blocks that stream past; `_products` serves
both. Logits are multiplied by log2(e), so exponentials are exp2.
"""

import functools
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._attention_received_plan import Columns, Plan
from ._triton_launch import Bound, Launcher

INTERPRETED = triton.knobs.runtime.interpret
MEAN_BLOCK = 128  # keys per program of mean_kernel


@triton.jit
def _part(at, inside, column, DIM: tl.constexpr, CHUNK: tl.constexpr, UPCAST: tl.constexpr):  # type: ignore[no-untyped-def]
    """CHUNK columns of the rows at `at`: (rows, CHUNK). Padding is 0."""
    d = column + tl.arange(0, CHUNK)
    x = tl.load(at[:, None] + d[None, :], mask=inside[:, None] & (d < DIM)[None, :], other=0.0)
    return x.to(tl.float32) if UPCAST else x


@triton.jit
def _products(  # type: ignore[no-untyped-def]
    fixed, fixed_tail, at_fixed, inside_fixed, at_moving, inside_moving, x,
    DIM: tl.constexpr, WIDTH: tl.constexpr, CHUNK: tl.constexpr, TAIL: tl.constexpr, STAGES: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """x + the dot products of fixed and moving rows: (fixed rows, moving rows)."""
    if CHUNK == WIDTH:
        moving = _part(at_moving, inside_moving, 0, DIM, CHUNK, UPCAST)
        x = tl.dot(fixed, tl.trans(moving), x, input_precision=PRECISION)
    elif WIDTH <= 256:
        for column in tl.static_range(0, WIDTH, CHUNK):
            part = _part(at_fixed, inside_fixed, column, DIM, CHUNK, UPCAST)
            moving = _part(at_moving, inside_moving, column, DIM, CHUNK, UPCAST)
            x = tl.dot(part, tl.trans(moving), x, input_precision=PRECISION)
    else:
        for column in tl.range(0, WIDTH, CHUNK, num_stages=STAGES):
            part = _part(at_fixed, inside_fixed, column, DIM, CHUNK, UPCAST)
            moving = _part(at_moving, inside_moving, column, DIM, CHUNK, UPCAST)
            x = tl.dot(part, tl.trans(moving), x, input_precision=PRECISION)
    if TAIL:
        moving = _part(at_moving, inside_moving, WIDTH, DIM, TAIL, UPCAST)
        x = tl.dot(fixed_tail, tl.trans(moving), x, input_precision=PRECISION)
    return x


@triton.jit
def _finite(top):  # type: ignore[no-untyped-def]
    """The maximum to subtract: 0 for a row that sees no key, because -inf - -inf is NaN."""
    return tl.where(top == float("-inf"), 0.0, top)


@triton.jit
def _last_seen(position, keys):  # type: ignore[no-untyped-def]
    """The last key that a row at `position` sees; -1: none."""
    return tl.maximum(tl.minimum(position, keys - 1), -1).to(tl.int32)


@triton.jit
def _add_keys(  # type: ignore[no-untyped-def]
    top, total, fixed, fixed_tail, at_fixed, live, key, stride_token, key_mask, stride_mask, position, start, keys,
    scale,
    DIM: tl.constexpr, WIDTH: tl.constexpr, CHUNK: tl.constexpr, TAIL: tl.constexpr, ROWS: tl.constexpr,
    KEYS: tl.constexpr, STAGES: tl.constexpr, ALIGN: tl.constexpr, MASKED: tl.constexpr, CAUSAL: tl.constexpr,
    CHECKED: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Online softmax: updates maximum and sum of exponentials of ROWS rows with KEYS keys. CHECKED: applies masks."""
    s = start + tl.arange(0, KEYS)
    inside = s < keys
    if MASKED:
        inside = inside & (tl.load(key_mask + s.to(tl.int64) * stride_mask, mask=inside, other=0) != 0)
    at = key + s.to(tl.int64) * (stride_token.to(tl.int64) * ALIGN)
    x = _products(
        fixed, fixed_tail, at_fixed, live, at, inside, tl.zeros((ROWS, KEYS), tl.float32),
        DIM, WIDTH, CHUNK, TAIL, STAGES, PRECISION, UPCAST,
    )  # fmt: skip
    x *= scale
    if CHECKED:
        seen = inside[None, :]
        if CAUSAL:
            seen = seen & (s[None, :] <= position[:, None])
        x = tl.where(seen, x, float("-inf"))
    new_top = tl.maximum(top, tl.max(x, 1))
    base = _finite(new_top)
    total = total * tl.exp2(top - base) + tl.sum(tl.exp2(x - base[:, None]), 1)
    return new_top, total


_RUNTIME = (
    *("rows", "keys", "query_stride_item", "query_stride_row", "query_stride_head", "key_stride_item"),
    *("key_stride_token", "key_stride_head", "mask_stride_item", "mask_stride_token", "weight_stride_item"),
    *("weight_stride_row", "position_stride_item", "position_stride_row"),
)


@triton.jit
def _place(count, HEADS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Program -> (block < count, item, head, item * HEADS + head)."""
    item_head = tl.program_id(0) // count
    return tl.program_id(0) % count, (item_head // HEADS).to(tl.int64), item_head % HEADS, item_head.to(tl.int64)


@Launcher
@triton.jit(do_not_specialize=_RUNTIME)
def rows_kernel(  # type: ignore[no-untyped-def]
    query, key, key_mask, row_weight, row_position, tops, shares, reaches, scale, rows, keys,
    query_stride_item, query_stride_row, query_stride_head, key_stride_item, key_stride_token, key_stride_head,
    mask_stride_item, mask_stride_token, weight_stride_item, weight_stride_row,
    position_stride_item, position_stride_row,
    HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr, CHUNK: tl.constexpr,
    TAIL: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, STAGES: tl.constexpr, ALIGN: tl.constexpr,
    MASKED: tl.constexpr, WEIGHTED: tl.constexpr, CAUSAL: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """(1) Program (item, query head, block of rows): maximum and share of each row."""
    blocks = tl.cdiv(rows, ROWS)
    block, item, head, item_head = _place(blocks, HEADS)
    if CAUSAL:
        block = blocks - 1 - block  # the last rows usually see most keys: they start first
    r = block * ROWS + tl.arange(0, ROWS)
    live = r < rows
    weight = tl.where(live, 1.0, 0.0)
    if WEIGHTED:
        at = row_weight + item * weight_stride_item + r.to(tl.int64) * weight_stride_row
        weight = tl.load(at, mask=live, other=0.0).to(tl.float32)
        live = weight != 0.0
    # The last key that each row sees; -1 for a row of weight 0.
    position = tl.where(live, keys - 1, -1)
    if CAUSAL:
        at = row_position + item * position_stride_item + r.to(tl.int64) * position_stride_row
        position = _last_seen(tl.load(at, mask=live, other=-1), keys)
    stop = keys
    unchecked = keys
    if CAUSAL or WEIGHTED:
        stop = tl.max(position, 0) + 1
        unchecked = tl.min(tl.where(live, position, stop - 1), 0) + 1
        tl.store(reaches + item_head * blocks + block, stop)
    if MASKED:
        unchecked = 0
    unchecked = unchecked // KEYS * KEYS

    query += item * (query_stride_item.to(tl.int64) * ALIGN) + head * (query_stride_head.to(tl.int64) * ALIGN)
    at_query = query + r.to(tl.int64) * (query_stride_row.to(tl.int64) * ALIGN)
    key += item * (key_stride_item.to(tl.int64) * ALIGN) + head // GROUP * (key_stride_head.to(tl.int64) * ALIGN)
    if MASKED:
        key_mask += item * mask_stride_item
    mine = at_query
    if CHUNK == WIDTH:
        mine = _part(at_query, live, 0, DIM, CHUNK, UPCAST)
    tail = at_query
    if TAIL:
        tail = _part(at_query, live, WIDTH, DIM, TAIL, UPCAST)

    top = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    if not MASKED:
        for start in tl.range(0, unchecked, KEYS, num_stages=STAGES, disable_licm=CHUNK != WIDTH):
            top, total = _add_keys(
                top, total, mine, tail, at_query, live, key, key_stride_token, key_mask, mask_stride_token, position,
                start, keys, scale,
                DIM, WIDTH, CHUNK, TAIL, ROWS, KEYS, STAGES, ALIGN, MASKED, CAUSAL, False, PRECISION, UPCAST,
            )  # fmt: skip
    for start in tl.range(unchecked, stop, KEYS, num_stages=STAGES, disable_licm=CHUNK != WIDTH):
        top, total = _add_keys(
            top, total, mine, tail, at_query, live, key, key_stride_token, key_mask, mask_stride_token, position,
            start, keys, scale,
            DIM, WIDTH, CHUNK, TAIL, ROWS, KEYS, STAGES, ALIGN, MASKED, CAUSAL, True, PRECISION, UPCAST,
        )  # fmt: skip
    at = item_head * rows + r
    tl.store(tops + at, _finite(top), mask=r < rows)
    # total == 0: the row sees no key. A NaN total gives a NaN share.
    tl.store(shares + at, tl.where(total == 0.0, 0.0, weight / total), mask=r < rows)


@Launcher
@triton.jit(do_not_specialize=_RUNTIME)
def keys_kernel(  # type: ignore[no-untyped-def]
    query, key, key_mask, row_weight, row_position, tops, shares, reaches, received, scale, rows, keys,
    query_stride_item, query_stride_row, query_stride_head, key_stride_item, key_stride_token, key_stride_head,
    mask_stride_item, mask_stride_token, weight_stride_item, weight_stride_row,
    position_stride_item, position_stride_row,
    HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr, CHUNK: tl.constexpr,
    TAIL: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, REACH: tl.constexpr, BLOCKS: tl.constexpr,
    STAGES: tl.constexpr, ALIGN: tl.constexpr, MASKED: tl.constexpr, WEIGHTED: tl.constexpr, CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """(2) Program (item, query head, block of keys): attention that each key receives from all rows."""
    block, item, head, item_head = _place(tl.cdiv(keys, KEYS), HEADS)
    s = block * KEYS + tl.arange(0, KEYS)
    allowed = s < keys
    if MASKED:
        at_mask = key_mask + item * mask_stride_item + s.to(tl.int64) * mask_stride_token
        allowed = allowed & (tl.load(at_mask, mask=allowed, other=0) != 0)
    tops += item_head * rows
    shares += item_head * rows
    if WEIGHTED:
        row_weight += item * weight_stride_item
    if CAUSAL:
        row_position += item * position_stride_item

    low = 0
    high = rows
    counted = rows.to(tl.float32)
    if CAUSAL or WEIGHTED:
        # Rows [low, high): from the first to the last block of rows that sees a key of this block.
        j = tl.arange(0, BLOCKS)
        blocks = tl.cdiv(rows, REACH)
        sees = tl.load(reaches + item_head * blocks + j, mask=j < blocks, other=0) > block * KEYS
        low = tl.min(tl.where(sees, j, blocks), 0) * REACH
        high = tl.minimum((tl.max(tl.where(sees, j, -1), 0) + 1) * REACH, rows)
        weights = tl.zeros((1024,), tl.float32)
        for start in range(0, rows, 1024):
            r = start + tl.arange(0, 1024)
            counts = tl.load(shares + r, mask=r < rows, other=0.0) != 0.0
            weight = tl.where(counts, 1.0, 0.0)
            if WEIGHTED:
                weight = tl.load(row_weight + r.to(tl.int64) * weight_stride_row, mask=counts, other=0.0).to(tl.float32)
            weights += weight
        counted = tl.sum(weights, 0)

    query += item * (query_stride_item.to(tl.int64) * ALIGN) + head * (query_stride_head.to(tl.int64) * ALIGN)
    key += item * (key_stride_item.to(tl.int64) * ALIGN) + head // GROUP * (key_stride_head.to(tl.int64) * ALIGN)
    at_key = key + s.to(tl.int64) * (key_stride_token.to(tl.int64) * ALIGN)
    mine = at_key
    if CHUNK == WIDTH:
        mine = _part(at_key, allowed, 0, DIM, CHUNK, UPCAST)
    tail = at_key
    if TAIL:
        tail = _part(at_key, allowed, WIDTH, DIM, TAIL, UPCAST)

    total = tl.zeros((KEYS,), tl.float32)
    for start in tl.range(low, high, ROWS, num_stages=STAGES, disable_licm=CHUNK != WIDTH):
        r = start + tl.arange(0, ROWS)
        inside = r < rows
        at = query + r.to(tl.int64) * (query_stride_row.to(tl.int64) * ALIGN)
        x = _products(
            mine, tail, at_key, allowed, at, inside, tl.zeros((KEYS, ROWS), tl.float32),
            DIM, WIDTH, CHUNK, TAIL, STAGES, PRECISION, UPCAST,
        )  # fmt: skip
        top = tl.load(tops + r, mask=inside, other=0.0)
        share = tl.load(shares + r, mask=inside, other=0.0)
        given = tl.exp2(x * scale - top[None, :]) * share[None, :]
        if CAUSAL:
            position = tl.load(row_position + r.to(tl.int64) * position_stride_row, mask=inside, other=-1)
            seen = s[:, None] <= _last_seen(position, keys)[None, :]
            given = tl.where(seen & (share != 0.0)[None, :], given, 0.0)
        elif WEIGHTED:
            given = tl.where((share != 0.0)[None, :], given, 0.0)  # the row may hold NaN
        total += tl.sum(given, 1)
    total *= tl.where(counted == 0.0, 0.0, 1.0 / tl.where(counted == 0.0, 1.0, counted))
    tl.store(received + item_head * keys + s, tl.where(allowed, total, 0.0), mask=s < keys)


@Launcher
@triton.jit(do_not_specialize=("keys",))
def mean_kernel(received, out, keys, HEADS: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """(3) Program (item, block of keys): mean over heads."""
    block = tl.program_id(0) % tl.cdiv(keys, BLOCK)
    item = (tl.program_id(0) // tl.cdiv(keys, BLOCK)).to(tl.int64)
    s = block * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for head in range(0, HEADS, PADDED):
        h = head + tl.arange(0, PADDED)
        at = received + (item * HEADS + h)[:, None] * keys + s[None, :]
        total += tl.sum(tl.load(at, mask=(h < HEADS)[:, None] & (s < keys)[None, :], other=0.0), 0)
    tl.store(out + item * keys + s, total / HEADS, mask=s < keys)


@functools.lru_cache(maxsize=1024)
def _passes(
    plan: Plan,
    heads: int,
    kv_heads: int,
    dim: int,
    size: int,
    align: int,
    blocks: int,
    masked: bool,
    weighted: bool,
    causal: bool,
) -> tuple[Bound, Bound]:
    """rows_kernel and keys_kernel with their constexpr parameters. blocks: a power of two, at least the number of
    blocks of rows."""
    columns = Columns.of(dim, size)
    constants = {
        "HEADS": heads,
        "GROUP": heads // kv_heads,
        "DIM": dim,
        "WIDTH": columns.width,
        "CHUNK": columns.chunk,
        "TAIL": columns.tail,
        "STAGES": plan.stages,
        "ALIGN": align,
        "MASKED": masked,
        "WEIGHTED": weighted,
        "CAUSAL": causal,
        # float32: split into three bfloat16, six products, as accurate as float32 (TF32: 11 bits)
        "PRECISION": "bf16x6" if size == 4 and not INTERPRETED else "ieee",
        "UPCAST": INTERPRETED,  # Triton's interpreter computes bfloat16 on raw bits
    }
    return (
        rows_kernel.bind(plan.warps, ROWS=plan.rows, KEYS=plan.moving_keys, **constants),
        keys_kernel.bind(
            plan.warps, ROWS=plan.moving_rows, KEYS=plan.keys, REACH=plan.rows, BLOCKS=blocks, **constants
        ),
    )


@functools.lru_cache(maxsize=1024)
def _mean(heads: int) -> Bound:
    return mean_kernel.bind(4, HEADS=heads, PADDED=min(32, triton.next_power_of_2(heads)), BLOCK=MEAN_BLOCK)


def received(
    out: Tensor,
    query: Tensor,
    key: Tensor,
    scale: float | None,
    row_weight: Tensor | None,
    row_position: Tensor | None,
    key_mask: Tensor | None,
    per_head: bool,
    plan: Plan | None = None,
) -> Tensor:
    """Fills `out` (B, S), or (B, Hq, S) with per_head."""
    batch, rows, heads, dim = query.shape
    _, keys, kv_heads, _ = key.shape
    if not batch:
        return out
    size = key.element_size()
    plan = plan or Plan.of(rows, keys, dim, size, row_position is not None)
    query_strides, key_strides = query.stride()[:3], key.stride()[:3]
    align = math.gcd(16 // size, *query_strides, *key_strides)
    strides = [stride // align for stride in (*query_strides, *key_strides)]
    key_mask = None if key_mask is None else key_mask.view(torch.uint8)
    for option in (key_mask, row_weight, row_position):
        strides += (0, 0) if option is None else option.stride()
    blocks = -(-rows // plan.rows)
    options = (option is not None for option in (key_mask, row_weight, row_position))
    shape = heads, kv_heads, dim, size, align, 1 << (blocks - 1).bit_length()
    rows_pass, keys_pass = _passes(plan, *shape, *options)
    floats = functools.partial(torch.empty, dtype=torch.float32, device=query.device)
    scale = (dim**-0.5 if scale is None else scale) * math.log2(math.e)
    with torch.cuda.device_of(query):
        tops, shares = floats((batch, heads, rows)), floats((batch, heads, rows))
        reaches = torch.empty((batch, heads, blocks), dtype=torch.int32, device=query.device)
        tensors = query, key, key_mask, row_weight, row_position, tops, shares, reaches
        numbers = scale, rows, keys, *strides
        rows_pass.launch((batch * heads * blocks,), tensors, numbers)
        of_heads = out if per_head else floats((batch, heads, keys))
        keys_pass.launch((batch * heads * -(-keys // plan.keys),), (*tensors, of_heads), numbers)
        if not per_head:
            _mean(heads).launch((batch * -(-keys // MEAN_BLOCK),), (of_heads, out), (keys,))
    return out
