"""Max-min selection over items of different lengths packed into one tensor."""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from .._registry import define_op, ops
from ._selection import by_item, check_packed, check_packed_values, vmap_packed
from .farthest_select import check_values_and_metric, farthest_select_reference

_OP = "farthest_select_varlen"


def _check(
    features: Tensor,
    cu_seqlens: Tensor,
    cu_budgets: Tensor,
    total_k: int,
    anchor: Tensor | None,
    quality: Tensor | None,
    start: Tensor | None,
    metric: str,
    max_seqlen: int | None,
) -> None:
    check_packed(_OP, features, cu_seqlens, cu_budgets, total_k, anchor, max_seqlen)
    check_values_and_metric(_OP, features, quality, start, metric)


def _fake(
    features: Tensor,
    cu_seqlens: Tensor,
    cu_budgets: Tensor,
    total_k: int,
    anchor: Tensor | None = None,
    quality: Tensor | None = None,
    start: Tensor | None = None,
    metric: str = "euclidean",
    max_seqlen: int | None = None,
) -> Tensor:
    _check(features, cu_seqlens, cu_budgets, total_k, anchor, quality, start, metric, max_seqlen)
    return features.new_empty((total_k,), dtype=torch.int64)


def _vmap(
    features: Tensor,
    cu_seqlens: Tensor,
    cu_budgets: Tensor,
    total_k: int,
    anchor: Tensor | None = None,
    quality: Tensor | None = None,
    start: Tensor | None = None,
    metric: str = "euclidean",
    max_seqlen: int | None = None,
) -> Tensor:
    def call(tokens: list[Any], cu_seqlens: Tensor, cu_budgets: Tensor, total_k: int, anchor: Tensor | None) -> Tensor:
        x, weight, before = tokens
        return farthest_select_varlen(x, cu_seqlens, cu_budgets, total_k, anchor, weight, before, metric, max_seqlen)

    tokens = [features, quality, start]
    check_values = partial(check_packed_values, _OP, max_seqlen=max_seqlen)
    return vmap_packed(check_values, call, tokens, cu_seqlens, cu_budgets, total_k, anchor)


@define_op(
    "farthest_select_varlen(Tensor features, Tensor cu_seqlens, Tensor cu_budgets, SymInt total_k, "
    'Tensor? anchor=None, Tensor? quality=None, Tensor? start=None, str metric="euclidean", '
    "SymInt? max_seqlen=None) -> Tensor",
    fake=_fake,
    vmap=_vmap,
    discrete=True,
)
def farthest_select_varlen_reference(
    features: Tensor,
    cu_seqlens: Tensor,
    cu_budgets: Tensor,
    total_k: int,
    anchor: Tensor | None = None,
    quality: Tensor | None = None,
    start: Tensor | None = None,
    metric: str = "euclidean",
    max_seqlen: int | None = None,
) -> Tensor:
    _check(features, cu_seqlens, cu_budgets, total_k, anchor, quality, start, metric, max_seqlen)
    first = None if anchor is None else anchor.cpu()
    check_packed_values(_OP, features, cu_seqlens.cpu(), cu_budgets.cpu(), total_k, first, max_seqlen)

    def select(tokens: list[Any], budget: int, anchor: Tensor | None) -> Tensor:
        x, weight, before = tokens
        return farthest_select_reference(x, budget, anchor, weight, before, metric)

    return by_item(select, [features, quality, start], cu_seqlens, cu_budgets, total_k, anchor)


def farthest_select_varlen(
    features: Tensor,
    cu_seqlens: Tensor,
    cu_budgets: Tensor,
    total_k: int,
    anchor: Tensor | None = None,
    quality: Tensor | None = None,
    start: Tensor | None = None,
    metric: str = "euclidean",
    max_seqlen: int | None = None,
) -> Tensor:
    """`farthest_select` over packed items, each with its own length and its own budget.

    Args:
        features: (T, C) float32, float16 or bfloat16: the tokens of all items, concatenated. Any strides; unless the
            channels are contiguous a contiguous copy is made.
        cu_seqlens: (B+1,) int32 or int64, FlashAttention's prefix sums: item b is rows cu_seqlens[b]:cu_seqlens[b+1].
            Items may be empty, and so may all be: T = 0.
        cu_budgets: (B+1,) int32 or int64, prefix sums of the budgets. The budget of an item is the number of
            tokens to keep, 0 to its length.
        total_k: cu_budgets[-1]. The host needs this number to size the result without a sync.
        anchor: (B,) int64 or int32, the first pick of each item, an index within the item. None: as in
            `farthest_select`. Ignored for items of budget 0.
        quality, start: (T,), as in `farthest_select`.
        metric: "euclidean" or "cosine".
        max_seqlen: as in `repulsion_select_varlen`.

    Returns:
        (total_k,) int64: the picks of item b at cu_budgets[b]:cu_budgets[b+1], in pick order, as indices within the
        item. The contract of `farthest_select` holds for each item.

    Raises:
        TypeError, ValueError: wrong dtype, shape, device, total_k, metric or max_seqlen; invalid offsets, budgets,
        anchors or lengths, as in `repulsion_select_varlen`.

    Cost:
        as `farthest_select` for each item; on a GPU as in `repulsion_select_varlen`.
    """
    _check(features, cu_seqlens, cu_budgets, total_k, anchor, quality, start, metric, max_seqlen)
    check_packed_values(_OP, features, cu_seqlens, cu_budgets, total_k, anchor, max_seqlen)
    return ops.farthest_select_varlen.default(
        features, cu_seqlens, cu_budgets, total_k, anchor, quality, start, metric, max_seqlen
    )
