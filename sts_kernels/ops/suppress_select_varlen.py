"""Selection by rank with suppression of similar tokens, of items packed into one tensor."""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from .._registry import define_op, ops
from ._selection import by_item, check_packed, check_packed_values, vmap_packed
from .suppress_select import check_rank_and_tau, suppress_select_reference

_OP = "suppress_select_varlen"


def _check(
    features: Tensor,
    rank: Tensor,
    tau: Tensor,
    cu_seqlens: Tensor,
    cu_budgets: Tensor,
    total_k: int,
    max_seqlen: int | None,
) -> None:
    check_packed(_OP, features, cu_seqlens, cu_budgets, total_k, max_seqlen=max_seqlen)
    check_rank_and_tau(_OP, features, rank, tau)


def _fake(
    features: Tensor,
    rank: Tensor,
    tau: Tensor,
    cu_seqlens: Tensor,
    cu_budgets: Tensor,
    total_k: int,
    max_seqlen: int | None = None,
) -> Tensor:
    _check(features, rank, tau, cu_seqlens, cu_budgets, total_k, max_seqlen)
    return features.new_empty((total_k,), dtype=torch.int64)


def _vmap(
    features: Tensor,
    rank: Tensor,
    tau: Tensor,
    cu_seqlens: Tensor,
    cu_budgets: Tensor,
    total_k: int,
    max_seqlen: int | None = None,
) -> Tensor:
    def call(tokens: list[Any], cu_seqlens: Tensor, cu_budgets: Tensor, total_k: int, anchor: Tensor | None) -> Tensor:
        x, order, reach = tokens
        return suppress_select_varlen(x, order, reach, cu_seqlens, cu_budgets, total_k, max_seqlen)

    tokens = [features, rank, tau]
    check_values = partial(check_packed_values, _OP, max_seqlen=max_seqlen)
    return vmap_packed(check_values, call, tokens, cu_seqlens, cu_budgets, total_k)


@define_op(
    "suppress_select_varlen(Tensor features, Tensor rank, Tensor tau, Tensor cu_seqlens, Tensor cu_budgets, "
    "SymInt total_k, SymInt? max_seqlen=None) -> Tensor",
    fake=_fake,
    vmap=_vmap,
    discrete=True,
)
def suppress_select_varlen_reference(
    features: Tensor,
    rank: Tensor,
    tau: Tensor,
    cu_seqlens: Tensor,
    cu_budgets: Tensor,
    total_k: int,
    max_seqlen: int | None = None,
) -> Tensor:
    _check(features, rank, tau, cu_seqlens, cu_budgets, total_k, max_seqlen)
    check_packed_values(_OP, features, cu_seqlens.cpu(), cu_budgets.cpu(), total_k, max_seqlen=max_seqlen)

    def select(tokens: list[Any], budget: int, anchor: Tensor | None) -> Tensor:
        x, order, reach = tokens
        return suppress_select_reference(x, order, reach, budget)

    return by_item(select, [features, rank, tau], cu_seqlens, cu_budgets, total_k)


def suppress_select_varlen(
    features: Tensor,
    rank: Tensor,
    tau: Tensor,
    cu_seqlens: Tensor,
    cu_budgets: Tensor,
    total_k: int,
    max_seqlen: int | None = None,
) -> Tensor:
    """`suppress_select` over packed items, each with its own length and its own budget.

    Args:
        features: (T, C) float32, float16 or bfloat16: the tokens of all items, concatenated. Any strides; unless the
            channels are contiguous a contiguous copy is made.
        rank, tau: (T,), as in `suppress_select`; ranks are compared within an item only.
        cu_seqlens: (B+1,) int32 or int64, FlashAttention's prefix sums: item b is rows cu_seqlens[b]:cu_seqlens[b+1].
            Items may be empty, and so may all be: T = 0.
        cu_budgets: (B+1,) int32 or int64, prefix sums of the budgets. The budget of an item is the number of
            tokens to keep, 0 to its length.
        total_k: cu_budgets[-1]. The host needs this number to size the result without a sync.
        max_seqlen: as in `repulsion_select_varlen`.

    Returns:
        (total_k,) int64: the picks of item b at cu_budgets[b]:cu_budgets[b+1], in pick order, as indices within the
        item. The contract of `suppress_select` holds for each item.

    Raises:
        TypeError, ValueError: wrong dtype, shape, device, total_k or max_seqlen; invalid offsets, budgets or lengths,
        as in `repulsion_select_varlen`.

    Cost:
        as `suppress_select` for each item; on a GPU as in `repulsion_select_varlen`.
    """
    _check(features, rank, tau, cu_seqlens, cu_budgets, total_k, max_seqlen)
    check_packed_values(_OP, features, cu_seqlens, cu_budgets, total_k, max_seqlen=max_seqlen)
    return ops.suppress_select_varlen.default(features, rank, tau, cu_seqlens, cu_budgets, total_k, max_seqlen)
