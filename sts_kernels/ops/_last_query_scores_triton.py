"""Triton kernels and launchers of `last_query_scores` and its varlen form. Imported at the first call on CUDA tensors.

What: the mean over query heads of softmax(q K^T scale), for one query row per item.
Chosen when: the tensors are on a GPU. Long items take steps (1) and (2). Small items take step (3) alone: a second
    launch would take longer than one SM reading their keys.
Steps:
    (1) split_kernel: per split of an item's keys, key head and tile of its query heads, the logits and, per query head,
        the maximum and the sum of exponentials of the split. Every key is read once.
    (2) mean_kernel: per block of keys, combines the sums of the splits; the mean of the weights over heads.
    (3) whole_kernel: per item, all of it.
Synchronisation: the two launches follow each other on one stream. From Hopper on, (2) is launched early and waits for
    (1) by programmatic dependent launch (gdc_wait). Each program sums in a fixed order and writes its own outputs.
    There are no atomics.

Logits are multiplied by log2(e), so exponentials are exp2.
"""

import functools
import math

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ._last_query_scores_plan import Plan, columns
from ._triton_launch import Bound, Launcher

INTERPRETED = triton.knobs.runtime.interpret


@triton.jit
def _span(item, cu_seqlens, tokens, longest, VARLEN: tl.constexpr):  # type: ignore[no-untyped-def]
    """First token and length of an item in the packed order of logits and scores. An item out of range has length 0."""
    if VARLEN:
        first = tl.load(cu_seqlens + item).to(tl.int64)
        length = tl.load(cu_seqlens + item + 1).to(tl.int64) - first
        fits = (first >= 0) & (first <= tokens) & (length >= 0) & (length <= longest) & (length <= tokens - first)
        first = tl.where(fits, first, 0)
        length = tl.where(fits, length, 0).to(tl.int32)
    else:
        first = item * longest
        length = longest
    return first, length


@triton.jit
def _keys(key, item, first, stride_item, stride_token, ALIGN: tl.constexpr, VARLEN: tl.constexpr):  # type: ignore[no-untyped-def]
    """Pointer to an item's keys. Strides are passed divided by ALIGN, so that the compiler knows their divisor."""
    if VARLEN:
        key += first * (stride_token.to(tl.int64) * ALIGN)
    else:
        key += item * (stride_item.to(tl.int64) * ALIGN)
    return key


@triton.jit
def _queries(  # type: ignore[no-untyped-def]
    query, stride_head, column, HEADS: tl.constexpr, PADDED: tl.constexpr, DIM: tl.constexpr, CHUNK: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """CHUNK columns of a program's query heads: (CHUNK, PADDED)."""
    h = tl.arange(0, PADDED)
    d = column + tl.arange(0, CHUNK)
    at = query + d[:, None] + h[None, :] * stride_head.to(tl.int64)
    query = tl.load(at, mask=(d < DIM)[:, None] & (h < HEADS)[None, :], other=0.0)
    return query.to(tl.float32) if UPCAST else query


@triton.jit
def _add_columns(  # type: ignore[no-untyped-def]
    x, query, stride_head, row, inside, column, HEADS: tl.constexpr, PADDED: tl.constexpr, DIM: tl.constexpr,
    WIDTH: tl.constexpr, CHUNK: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """x + the products of CHUNK columns."""
    d = column + tl.arange(0, CHUNK)
    keys = tl.load(
        row + d[None, :], mask=inside[:, None] & (d < DIM)[None, :], other=0.0, eviction_policy="evict_first"
    )
    if UPCAST:
        keys = keys.to(tl.float32)
    part = query
    if CHUNK != WIDTH:
        part = _queries(query, stride_head, column, HEADS, PADDED, DIM, CHUNK, UPCAST)
    return tl.dot(keys, part, x, input_precision=PRECISION)


@triton.jit
def _logits(  # type: ignore[no-untyped-def]
    query, stride_head, key, stride_token, key_mask, stride_mask, start, end, scale,
    HEADS: tl.constexpr, PADDED: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK: tl.constexpr, STAGES: tl.constexpr, ALIGN: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """(BLOCK, PADDED) logits of keys [start, start + BLOCK); -inf if a key is past `end` or masked."""
    s = start + tl.arange(0, BLOCK)
    inside = s < end
    allowed = inside
    if MASKED:
        allowed = inside & (tl.load(key_mask + s.to(tl.int64) * stride_mask, mask=inside, other=0) != 0)
    row = key + s.to(tl.int64)[:, None] * (stride_token.to(tl.int64) * ALIGN)
    x = tl.zeros((BLOCK, PADDED), tl.float32)
    if WIDTH <= 256:
        for column in tl.static_range(0, WIDTH, CHUNK):
            x = _add_columns(
                x, query, stride_head, row, inside, column, HEADS, PADDED, DIM, WIDTH, CHUNK, PRECISION, UPCAST
            )
    else:  # not unrolled: the tiles of all columns do not fit in shared memory
        for column in tl.range(0, WIDTH, CHUNK, num_stages=STAGES):
            x = _add_columns(
                x, query, stride_head, row, inside, column, HEADS, PADDED, DIM, WIDTH, CHUNK, PRECISION, UPCAST
            )
    return tl.where(allowed[:, None], x * scale, float("-inf"))


@triton.jit
def _finite(top):  # type: ignore[no-untyped-def]
    """The maximum to subtract: 0 without allowed keys, because -inf - -inf is NaN."""
    return tl.where(top == float("-inf"), 0.0, top)


@triton.jit
def _share(total, HEADS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Factor of an exponential in the mean over heads: 1 / (total * HEADS). A total of 0 has no exponentials."""
    return 1.0 / (tl.where(total == 0.0, 1.0, total) * HEADS)


_RUNTIME = (
    *("tokens", "longest", "splits", "span", "query_stride_item", "query_stride_head", "key_stride_item"),
    *("key_stride_token", "key_stride_head", "mask_stride_item", "mask_stride_token"),
)


@Launcher
@triton.jit(do_not_specialize=_RUNTIME)
def split_kernel(  # type: ignore[no-untyped-def]
    query, key, key_mask, cu_seqlens, logits, sums, scale, tokens, longest, splits, span,
    query_stride_item, query_stride_head, key_stride_item, key_stride_token, key_stride_head,
    mask_stride_item, mask_stride_token,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, TILES: tl.constexpr, HEADS: tl.constexpr, PADDED: tl.constexpr,
    DIM: tl.constexpr, WIDTH: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
    ALIGN: tl.constexpr, MASKED: tl.constexpr, VARLEN: tl.constexpr, PRECISION: tl.constexpr,
    UPCAST: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """(1) Program (item, key head, tile of its query heads; split): logits, maximum and sum of exponentials."""
    if OVERLAP:
        gdc_launch_dependents()
    item = (tl.program_id(0) // (KV_HEADS * TILES)).to(tl.int64)
    kv_head = tl.program_id(0) // TILES % KV_HEADS
    tile = tl.program_id(0) % TILES
    split = tl.program_id(1)
    first, length = _span(item, cu_seqlens, tokens, longest, VARLEN)
    head = kv_head * GROUP + tile * HEADS
    query += item * query_stride_item + head * query_stride_head.to(tl.int64)
    if CHUNK == WIDTH:  # else they do not fit in registers
        query = _queries(query, query_stride_head, 0, HEADS, PADDED, DIM, WIDTH, UPCAST)
    key = _keys(key, item, first, key_stride_item, key_stride_token, ALIGN, VARLEN)
    key += kv_head * (key_stride_head.to(tl.int64) * ALIGN)
    if MASKED:
        key_mask += item * mask_stride_item

    h = tl.arange(0, PADDED)
    mine = h < HEADS
    row = logits + (head + h).to(tl.int64) * tokens + first
    # Running maximum and sum per key position of the tile. One reduction across positions, after the loop.
    top = tl.full((BLOCK, PADDED), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK, PADDED), tl.float32)
    stop = tl.minimum(split * span + span, length)
    for start in tl.range(split * span, stop, BLOCK, num_stages=STAGES, disable_licm=CHUNK != WIDTH):
        x = _logits(
            query, query_stride_head, key, key_stride_token, key_mask, mask_stride_token, start, length, scale,
            HEADS, PADDED, DIM, WIDTH, CHUNK, BLOCK, STAGES, ALIGN, MASKED, PRECISION, UPCAST,
        )  # fmt: skip
        s = start + tl.arange(0, BLOCK)
        tl.store(row[None, :] + s[:, None], x, mask=(s < length)[:, None] & mine[None, :])
        new_top = tl.maximum(top, x)
        base = _finite(new_top)
        total = total * tl.exp2(top - base) + tl.exp2(x - base)
        top = new_top
    peak = tl.max(top, 0)
    total = tl.sum(total * tl.exp2(top - _finite(peak)[None, :]), 0)
    at = sums + (item * KV_HEADS * GROUP + head + h) * (2 * splits) + split
    tl.store(at, peak, mask=mine)
    tl.store(at + splits, total, mask=mine)


@Launcher
@triton.jit(do_not_specialize=_RUNTIME)
def mean_kernel(  # type: ignore[no-untyped-def]
    logits, sums, cu_seqlens, scores, tokens, longest, splits,
    ALL_HEADS: tl.constexpr, PADDED: tl.constexpr, SPLITS: tl.constexpr, BLOCK: tl.constexpr, VARLEN: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """(2) Program (item and block of keys): combines the splits, mean over heads."""
    blocks = tl.cdiv(longest, BLOCK)
    item = (tl.program_id(0) // blocks).to(tl.int64)
    first, length = _span(item, cu_seqlens, tokens, longest, VARLEN)
    s = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    j = tl.arange(0, SPLITS)
    mean = tl.zeros((BLOCK,), tl.float32)
    if OVERLAP:
        gdc_wait()
    for head in range(0, ALL_HEADS, PADDED):
        h = head + tl.arange(0, PADDED)
        mine = (h < ALL_HEADS)[:, None]
        at = logits + h.to(tl.int64)[:, None] * tokens + first + s[None, :]
        x = tl.load(at, mask=mine & (s < length)[None, :], other=float("-inf"))
        at = sums + (item * ALL_HEADS + h)[:, None] * (2 * splits) + j[None, :]
        top = tl.load(at, mask=mine & (j < splits)[None, :], other=float("-inf"))
        total = tl.load(at + splits, mask=mine & (j < splits)[None, :], other=0.0)
        base = _finite(tl.max(top, 1))[:, None]
        share = _share(tl.sum(total * tl.exp2(top - base), 1), ALL_HEADS)[:, None]
        mean += tl.sum(tl.where(x == float("-inf"), 0.0, tl.exp2(x - base) * share), 0)
    tl.store(scores + first + s, mean, mask=s < length)


@Launcher
@triton.jit(do_not_specialize=_RUNTIME)
def whole_kernel(  # type: ignore[no-untyped-def]
    query, key, key_mask, cu_seqlens, scores, scale, tokens, longest,
    query_stride_item, query_stride_head, key_stride_item, key_stride_token, key_stride_head,
    mask_stride_item, mask_stride_token,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, TILES: tl.constexpr, HEADS: tl.constexpr, PADDED: tl.constexpr,
    DIM: tl.constexpr, WIDTH: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
    ALIGN: tl.constexpr, MASKED: tl.constexpr, VARLEN: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """(3) Program (item): all heads and keys."""
    item = tl.program_id(0).to(tl.int64)
    first, length = _span(item, cu_seqlens, tokens, longest, VARLEN)
    query += item * query_stride_item
    key = _keys(key, item, first, key_stride_item, key_stride_token, ALIGN, VARLEN)
    if MASKED:
        key_mask += item * mask_stride_item
    h = tl.arange(0, PADDED)
    mean = tl.zeros((BLOCK,), tl.float32)
    for tile in tl.range(0, KV_HEADS * TILES, num_stages=STAGES):
        kv_head = tile // TILES
        at = query + (kv_head * GROUP + tile % TILES * HEADS) * query_stride_head.to(tl.int64)
        if CHUNK == WIDTH:
            at = _queries(at, query_stride_head, 0, HEADS, PADDED, DIM, WIDTH, UPCAST)
        x = _logits(
            at, query_stride_head, key + kv_head * (key_stride_head.to(tl.int64) * ALIGN), key_stride_token,
            key_mask, mask_stride_token, 0, length, scale,
            HEADS, PADDED, DIM, WIDTH, CHUNK, BLOCK, STAGES, ALIGN, MASKED, PRECISION, UPCAST,
        )  # fmt: skip
        weight = tl.exp2(x - _finite(tl.max(x, 0))[None, :])
        share = tl.where(h < HEADS, _share(tl.sum(weight, 0), KV_HEADS * GROUP), 0.0)
        mean += tl.sum(weight * share[None, :], 1)
    s = tl.arange(0, BLOCK)
    if MASKED:  # keeps a NaN of allowed keys away from masked keys
        allowed = tl.load(key_mask + s.to(tl.int64) * mask_stride_token, mask=s < length, other=0) != 0
        mean = tl.where(allowed, mean, 0.0)
    tl.store(scores + first + s, mean, mask=s < length)


@functools.cache
def _device(index: int) -> tuple[int, bool]:
    """Number of SMs, and whether programmatic dependent launch is supported (Hopper and later)."""
    properties = torch.cuda.get_device_properties(index)
    return properties.multi_processor_count, properties.major >= 9


@functools.lru_cache(maxsize=1024)
def _first(
    whole: bool,
    tiles: int,
    heads: int,
    block: int,
    overlap: bool,
    kv_heads: int,
    group: int,
    dim: int,
    size: int,
    align: int,
    masked: bool,
    varlen: bool,
) -> Bound:
    """split_kernel or whole_kernel with its constexpr parameters."""
    width, chunk = columns(dim, size)
    constants = {
        "KV_HEADS": kv_heads,
        "GROUP": group,
        "TILES": tiles,
        "HEADS": heads,
        "PADDED": max(16, triton.next_power_of_2(heads)),
        "DIM": dim,
        "WIDTH": width,
        "CHUNK": chunk,
        "BLOCK": block,
        "STAGES": 3,
        "ALIGN": align,
        "MASKED": masked,
        "VARLEN": varlen,
        # float32: split into three bfloat16, six products, as accurate as float32 (TF32: 11 bits)
        "PRECISION": "bf16x6" if size == 4 and not INTERPRETED else "ieee",
        "UPCAST": INTERPRETED,  # Triton's interpreter computes bfloat16 on raw bits
    }
    return whole_kernel.bind(8, **constants) if whole else split_kernel.bind(4, OVERLAP=overlap, **constants)


@functools.lru_cache(maxsize=1024)
def _mean(heads: int, splits: int, block: int, overlap: bool, varlen: bool) -> Bound:
    """mean_kernel with its constexpr parameters. splits: a power of two, at least the number of splits."""
    padded = min(32, triton.next_power_of_2(heads))
    constants = {"ALL_HEADS": heads, "PADDED": padded, "SPLITS": splits, "BLOCK": block}
    return mean_kernel.bind(4, overlap, VARLEN=varlen, OVERLAP=overlap, **constants)


def scores(
    query: Tensor, key: Tensor, scale: float | None, key_mask: Tensor | None, plan: Plan | None = None
) -> Tensor:
    batch, longest, *_ = key.shape
    out = torch.empty((batch, longest), dtype=torch.float32, device=query.device)
    if batch:
        _run(out, query, key, key.stride(), key_mask, None, longest, scale, plan)
    return out


def scores_varlen(
    query: Tensor, key: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float | None, plan: Plan | None = None
) -> Tensor:
    out = query.new_zeros(len(key), dtype=torch.float32)  # tokens of no item score 0
    longest = min(max_seqlen, len(key))
    if len(query) and longest:
        _run(out, query, key, (0, *key.stride()), None, cu_seqlens.contiguous(), longest, scale, plan)
    return out


def _run(
    out: Tensor,
    query: Tensor,
    key: Tensor,
    key_strides: tuple[int, ...],
    key_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    longest: int,
    scale: float | None,
    plan: Plan | None,
) -> None:
    """key_strides: of item, token, head and column."""
    batch, heads, dim = query.shape
    kv_heads, size, tokens = key.shape[-2], key.element_size(), out.numel()
    multiprocessors, overlap = _device(query.get_device()) if query.is_cuda else (1, False)
    group = heads // kv_heads
    plan = plan or Plan.of(kv_heads, group, longest, dim, size, multiprocessors)
    of_item, of_token, of_head, _ = key_strides
    align = math.gcd(16 // size, of_item, of_token, of_head)
    query_item, query_head, _ = query.stride()
    mask_item = mask_token = 0
    if key_mask is not None:
        key_mask = key_mask.view(torch.uint8)
        mask_item, mask_token = key_mask.stride()
    strides = query_item, query_head, of_item // align, of_token // align, of_head // align, mask_item, mask_token
    scale = (dim**-0.5 if scale is None else scale) * math.log2(math.e)
    shape = kv_heads, group, dim, size, align, key_mask is not None, cu_seqlens is not None
    first = _first(plan.whole, plan.tiles, plan.heads, plan.block, overlap, *shape)
    with torch.cuda.device_of(query):
        if plan.whole:
            first.launch((batch,), (query, key, key_mask, cu_seqlens, out), (scale, tokens, longest, *strides))
            return
        splits = plan.splits
        logits = torch.empty((heads, tokens), dtype=torch.float32, device=out.device)
        sums = torch.empty((batch, heads, 2, splits), dtype=torch.float32, device=out.device)
        tensors, numbers = (query, key, key_mask, cu_seqlens, logits, sums), (scale, tokens, longest, splits, plan.span)
        first.launch((batch * kv_heads * plan.tiles, splits), tensors, (*numbers, *strides))
        block = 32 if longest <= 4096 else 128
        mean = _mean(heads, 1 << (splits - 1).bit_length(), block, overlap, cu_seqlens is not None)
        mean.launch((batch * -(-longest // block),), (logits, sums, cu_seqlens, out), (tokens, longest, splits))
