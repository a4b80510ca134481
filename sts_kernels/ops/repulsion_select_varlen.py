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
        features: (T, C) float32, float16 or bfloat16: the tokens of all items, concatenated. Any strides; unless the
            channels are contiguous a contiguous copy is made.
        cu_seqlens: (B+1,) int32 or int64, FlashAttention's prefix sums: item b is rows cu_seqlens[b]:cu_seqlens[b+1].
            Items may be empty, and so may all be: T = 0.
        cu_budgets: (B+1,) int32 or int64, prefix sums of the budgets. The budget of an item is the number of
            tokens to keep, 0 to its length.
        total_k: cu_budgets[-1]. The host needs this number to size the result without a sync.
        eps: 1e-30 to 1e30, in units of features squared.
        anchor: (B,) int64 or int32, the first pick of each item, an index within the item. None: the token nearest the
            mean of the item's finite tokens. Ignored for items of budget 0.
        max_seqlen: int at least 1 (0 if T = 0), or None: an upper bound on the length of an item, which the host knows
            without a sync. It changes no result. On a GPU it saves memory and launches, see Cost.

    Returns:
        (total_k,) int64: the picks of item b at cu_budgets[b]:cu_budgets[b+1], in pick order, as indices within the
        item. The contract of `repulsion_select` holds for each item.

    Raises:
        TypeError, ValueError: wrong dtype, shape, device, total_k, eps or max_seqlen; on the CPU, invalid items. An
        item is invalid if its offsets, budget or anchor are out of range, or if it has more than max_seqlen tokens. It
        is also invalid if its rows or its part of the result begin before the end of an earlier item. On a GPU an
        invalid item comes out as -1 throughout and all others come out right; STS_KERNELS_CHECK=1 raises instead, at
        the cost of a sync. The reference reads the offsets on every device.

    Cost:
        as `repulsion_select` for each item. On a GPU items of at most 8192 tokens run in waves, with one launch for the
        distances of a wave and one for its picks. The weights of an item of n tokens take 4 n^2 bytes, those of a wave
        at most 512 MiB. The host knows only bounds: with m = min(T, 8192, max_seqlen) it allocates 4 T m bytes, at most
        512 MiB, and enqueues up to 1 + T m / 2^26 waves. An empty wave takes some microseconds. Longer items run last.
        On compute capability 9.0 scratch also holds a copy of the features.
    """
    _check(features, cu_seqlens, cu_budgets, total_k, eps, anchor, max_seqlen)
    check_packed_values(_OP, features, cu_seqlens, cu_budgets, total_k, anchor, max_seqlen)
    return ops.repulsion_select_varlen.default(features, cu_seqlens, cu_budgets, total_k, eps, anchor, max_seqlen)
