"""`last_query_scores` over items of different lengths packed into one tensor."""

import itertools

import torch

from .. import _checks
from .._registry import define_op, ops
from .._transforms import stack_offsets
from .last_query_scores import check, in_rows, item_scores

_OP = "last_query_scores_varlen"


def _check(
    query: torch.Tensor, key: torch.Tensor, cu_seqlens: torch.Tensor, max_seqlen: int, scale: float | None
) -> None:
    check(_OP, query, key, scale, "(T, Hkv, D)")
    _checks.tensor(_OP, "cu_seqlens", cu_seqlens, _checks.INTEGER, "(B+1,)")
    if cu_seqlens.shape[0] != query.shape[0] + 1:
        raise ValueError(
            f"{_OP}: cu_seqlens must have shape (B+1,) = ({query.shape[0] + 1},), got {tuple(cu_seqlens.shape)}"
        )
    _checks.same_device(_OP, "cu_seqlens", cu_seqlens, query, "query")
    _checks.integer(_OP, "max_seqlen", max_seqlen, 0)


def _check_values(key: torch.Tensor, cu_seqlens: torch.Tensor, max_seqlen: int) -> None:
    starts = cu_seqlens.tolist()
    lengths = [end - start for start, end in itertools.pairwise(starts)]
    if starts[0] != 0 or starts[-1] != key.shape[0] or min(lengths, default=0) < 0:
        raise ValueError(f"{_OP}: cu_seqlens must rise from 0 to {key.shape[0]}, the number of keys, got {starts}")
    if (longest := max(lengths, default=0)) > max_seqlen:
        raise ValueError(
            f"{_OP}: max_seqlen must be at least {longest}, the length of the longest item, got {max_seqlen}"
        )


def _fake(
    query: torch.Tensor, key: torch.Tensor, cu_seqlens: torch.Tensor, max_seqlen: int, scale: float | None = None
) -> torch.Tensor:
    _check(query, key, cu_seqlens, max_seqlen, scale)
    return query.new_empty((key.shape[0],), dtype=torch.float32)


def _vmap(
    query: torch.Tensor, key: torch.Tensor, cu_seqlens: torch.Tensor, max_seqlen: int, *scale: float | None
) -> torch.Tensor:
    lanes, tokens = key.shape[:2]
    if lanes == 0:
        return query.new_empty((0, tokens), dtype=torch.float32)
    for offsets in cu_seqlens.unbind():
        if _checks.values_readable(offsets):
            _check_values(key[0], offsets, max_seqlen)
    query = torch.nn.functional.pad(query, (0, 0, 0, 0, 0, 1)).flatten(0, 1)[:-1]  # a row per item between lanes
    packed = stack_offsets(cu_seqlens, tokens)
    out = last_query_scores_varlen(in_rows(query), in_rows(key.flatten(0, 1)), packed, max_seqlen, *scale)
    # Items between lanes hold the tokens of no item.
    token = torch.arange(tokens, device=key.device)
    inside = (token >= cu_seqlens[:, :1]) & (token < cu_seqlens[:, -1:])
    return torch.where(inside, out.unflatten(0, (lanes, tokens)), 0.0)


def _triton(
    query: torch.Tensor, key: torch.Tensor, cu_seqlens: torch.Tensor, max_seqlen: int, scale: float | None = None
) -> torch.Tensor:
    from . import _last_query_scores_triton as kernels

    _check(query, key, cu_seqlens, max_seqlen, scale)
    return kernels.scores_varlen(query, key, cu_seqlens, max_seqlen, scale)


@define_op(
    "last_query_scores_varlen(Tensor query, Tensor key, Tensor cu_seqlens, SymInt max_seqlen, float? scale=None) "
    "-> Tensor",
    fake=_fake,
    triton=_triton,
    vmap=_vmap,
)
def last_query_scores_varlen_reference(
    query: torch.Tensor, key: torch.Tensor, cu_seqlens: torch.Tensor, max_seqlen: int, scale: float | None = None
) -> torch.Tensor:
    _check(query, key, cu_seqlens, max_seqlen, scale)
    # The reference reads the offsets back to the host; the kernels do not.
    starts = cu_seqlens.cpu()
    _check_values(key, starts, max_seqlen)
    out = query.new_empty((key.shape[0],), dtype=torch.float32)
    for item, (start, end) in enumerate(itertools.pairwise(starts.tolist())):
        if end > start:
            out[start:end] = item_scores(query[item], key[start:end], scale)
    return out


def last_query_scores_varlen(
    query: torch.Tensor, key: torch.Tensor, cu_seqlens: torch.Tensor, max_seqlen: int, scale: float | None = None
) -> torch.Tensor:
    """`last_query_scores` over packed items, as in flash_attn_varlen_func (STS Eq. 6).

    Args:
        query: (B, Hq, D) float32, float16 or bfloat16, one row per item, after rotary embedding.
        key: (T, Hkv, D) of the same dtype, the keys of all items, concatenated, after rotary embedding. Hkv divides Hq.
            Any strides, but D must be contiguous.
        cu_seqlens: (B+1,) int32 or int64, FlashAttention's prefix sums: item b is rows cu_seqlens[b]:cu_seqlens[b+1].
            Items may be empty.
        max_seqlen: at least the length of the longest item. The host needs this number to launch without a sync.
        scale: multiplies the dot products; None: 1 / sqrt(D).

    Returns:
        (T,) float32, the scores of item b at cu_seqlens[b]:cu_seqlens[b+1]. Each item sums to 1. NaN, accuracy and
        gradients as in `last_query_scores`; the same input gives the same output, bit for bit.

    Raises:
        TypeError, ValueError: wrong dtype, shape, device, strides or scale; on the CPU, offsets that do not rise from 0
        to T, or an item longer than max_seqlen. On a GPU such an item scores 0, and so does a token of no item. The
        score of a token of several items is undefined. No memory out of bounds is read or written. STS_KERNELS_CHECK=1
        raises instead, at the cost of a sync.
        NotImplementedError: forward-mode AD or torch.func differentiates `query` or `key`.

    Cost:
        as `last_query_scores`, with T for B S.
    """
    _check(query, key, cu_seqlens, max_seqlen, scale)
    if _checks.values_readable(cu_seqlens):
        _check_values(key, cu_seqlens, max_seqlen)
    return ops.last_query_scores_varlen.default(query, key, cu_seqlens, max_seqlen, scale)
