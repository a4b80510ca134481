"""Stage 1 of STS over items of different lengths packed into one tensor."""

from functools import partial
from typing import Any

import torch

from .. import _checks
from .._registry import define_op, ops
from ._selection import by_item, check_packed, check_packed_values, vmap_packed
from .repulsion_select import repulsion_select_reference

_OP = "repulsion_select_varlen"


def _check(
    features: torch.Tensor,
    cu_seqlens: torch.Tensor,
    cu_budgets: torch.Tensor,
    total_k: int,
    eps: float,
    anchor: torch.Tensor | None,
    max_seqlen: int | None,
) -> None:
    check_packed(_OP, features, cu_seqlens, cu_budgets, total_k, anchor, max_seqlen)
    _checks.eps(_OP, eps)


def _fake(
    features: torch.Tensor,
    cu_seqlens: torch.Tensor,
    cu_budgets: torch.Tensor,
    total_k: int,
    eps: float = 1e-6,
    anchor: torch.Tensor | None = None,
    max_seqlen: int | None = None,
) -> torch.Tensor:
    _check(features, cu_seqlens, cu_budgets, total_k, eps, anchor, max_seqlen)
    return features.new_empty((total_k,), dtype=torch.int64)


def _vmap(
    features: torch.Tensor,
    cu_seqlens: torch.Tensor,
    cu_budgets: torch.Tensor,
    total_k: int,
    eps: float = 1e-6,
    anchor: torch.Tensor | None = None,
    max_seqlen: int | None = None,
) -> torch.Tensor:
    def call(
        tokens: list[Any], cu_seqlens: torch.Tensor, cu_budgets: torch.Tensor, total_k: int, anchor: torch.Tensor | None
    ) -> torch.Tensor:
        return repulsion_select_varlen(tokens[0], cu_seqlens, cu_budgets, total_k, eps, anchor, max_seqlen)

    check_values = partial(check_packed_values, _OP, max_seqlen=max_seqlen)
    return vmap_packed(check_values, call, [features], cu_seqlens, cu_budgets, total_k, anchor)


@define_op(
    "repulsion_select_varlen(Tensor features, Tensor cu_seqlens, Tensor cu_budgets, SymInt total_k, float eps=1e-6, "
    "Tensor? anchor=None, SymInt? max_seqlen=None) -> Tensor",
    fake=_fake,
    vmap=_vmap,
    discrete=True,
)
def repulsion_select_varlen_reference(
    features: torch.Tensor,
    cu_seqlens: torch.Tensor,
    cu_budgets: torch.Tensor,
    total_k: int,
    eps: float = 1e-6,
    anchor: torch.Tensor | None = None,
    max_seqlen: int | None = None,
) -> torch.Tensor:
    _check(features, cu_seqlens, cu_budgets, total_k, eps, anchor, max_seqlen)
    first = None if anchor is None else anchor.cpu()
    check_packed_values(_OP, features, cu_seqlens.cpu(), cu_budgets.cpu(), total_k, first, max_seqlen)

    def select(tokens: list[Any], budget: int, anchor: torch.Tensor | None) -> torch.Tensor:
        return repulsion_select_reference(tokens[0], budget, eps, anchor)

    return by_item(select, [features], cu_seqlens, cu_budgets, total_k, anchor)


def repulsion_select_varlen(
    features: torch.Tensor,
    cu_seqlens: torch.Tensor,
    cu_budgets: torch.Tensor,
    total_k: int,
    eps: float = 1e-6,
    anchor: torch.Tensor | None = None,
    max_seqlen: int | None = None,
) -> torch.Tensor:
    """`repulsion_select` over packed items, each with its own length and its own budget (STS Algorithm 1).

    Args:
        features: (T, C) float32, float16 or bfloat16: the tokens of all items one after another. Any strides; unless
            the channels are contiguous a contiguous copy is made.
        cu_seqlens: (B+1,) int32 or int64, FlashAttention's prefix sums: item b is rows cu_seqlens[b] to
            cu_seqlens[b+1]. Items may be empty.
        cu_budgets: (B+1,) int32 or int64, prefix sums of the tokens each item keeps, at most its length; may be 0.
        total_k: cu_budgets[-1], which the host must know to size the result without a sync.
        eps: 1e-30 to 1e30, in units of features squared.
        anchor: (B,) int64 or int32, the first pick of each item, counted within the item. None: the token nearest the
            mean of the item's finite tokens. Ignored for items with no budget.
        max_seqlen: int at least 1, or None: an upper bound on the length of an item, which the host knows without a
            sync. It changes no result. On a GPU it saves memory and launches, see Cost.

    Returns:
        (total_k,) int64: the picks of item b, counted within the item and in the order picked, at
        cu_budgets[b]:cu_budgets[b+1]. All that `repulsion_select` promises holds for each item.

    Raises:
        TypeError, ValueError: wrong dtype, shape, device, total_k, eps or max_seqlen; offsets, budgets or anchors that
        do not fit, and items longer than max_seqlen, where the numbers can be read: on the CPU. On a GPU an item that
        does not fit comes out as -1 throughout: offsets, budgets or anchor out of range, more tokens than max_seqlen,
        or rows or places in the result that begin before the end of an item in front of it. The other items come out
        right. STS_KERNELS_CHECK=1 makes it an error at the price of a sync. The reference reads the offsets on every
        device.

    Cost:
        as `repulsion_select` for each item. On a GPU all items of up to 8192 tokens are run together: one launch for
        the distances of all, one for the picks of all. Their weights, 4 n^2 bytes for an item of n tokens, take at
        most 512 MiB at a time; items that do not fit are run after the others. The host knows bounds alone: it takes
        4 T m bytes, 512 MiB at most, m the smallest of T, 8192 and max_seqlen, and enqueues up to 1 + T m / 2^26 such
        rounds, of which those that find nothing to do take some microseconds. Longer items are run last. On compute
        capability 9.0 scratch also holds a copy of the features.
    """
    _check(features, cu_seqlens, cu_budgets, total_k, eps, anchor, max_seqlen)
    check_packed_values(_OP, features, cu_seqlens, cu_budgets, total_k, anchor, max_seqlen)
    return ops.repulsion_select_varlen.default(features, cu_seqlens, cu_budgets, total_k, eps, anchor, max_seqlen)
