"""Stage 1 of STS over items of different lengths packed into one tensor."""

from functools import partial

import torch

from .. import _checks
from .._registry import define_op, ops
from ._selection import by_item, check_packed, check_packed_values, vmap_packed
from .repulsion_select import repulsion_select_reference

_OP = "repulsion_select_varlen"


def _check(features, cu_seqlens, cu_budgets, total_k, eps, anchor):
    check_packed(_OP, features, cu_seqlens, cu_budgets, total_k, anchor)
    _checks.eps(_OP, eps)


def _fake(features, cu_seqlens, cu_budgets, total_k, eps=1e-6, anchor=None):
    _check(features, cu_seqlens, cu_budgets, total_k, eps, anchor)
    return features.new_empty((total_k,), dtype=torch.int64)


def _vmap(features, cu_seqlens, cu_budgets, total_k, eps=1e-6, anchor=None):
    def call(tokens, cu_seqlens, cu_budgets, total_k, anchor):
        return repulsion_select_varlen(*tokens, cu_seqlens, cu_budgets, total_k, eps, anchor)

    return vmap_packed(partial(check_packed_values, _OP), call, [features], cu_seqlens, cu_budgets, total_k, anchor)


@define_op(
    "repulsion_select_varlen(Tensor features, Tensor cu_seqlens, Tensor cu_budgets, SymInt total_k, float eps=1e-6, "
    "Tensor? anchor=None) -> Tensor",
    fake=_fake,
    vmap=_vmap,
    discrete=True,
)
def repulsion_select_varlen_reference(features, cu_seqlens, cu_budgets, total_k, eps=1e-6, anchor=None):
    _check(features, cu_seqlens, cu_budgets, total_k, eps, anchor)
    check_packed_values(
        _OP, features, cu_seqlens.cpu(), cu_budgets.cpu(), total_k, None if anchor is None else anchor.cpu()
    )

    def select(tokens, budget, anchor):
        return repulsion_select_reference(*tokens, budget, eps, anchor)

    return by_item(select, [features], cu_seqlens, cu_budgets, total_k, anchor)


def repulsion_select_varlen(
    features: torch.Tensor,
    cu_seqlens: torch.Tensor,
    cu_budgets: torch.Tensor,
    total_k: int,
    eps: float = 1e-6,
    anchor: torch.Tensor | None = None,
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

    Returns:
        (total_k,) int64: the picks of item b, counted within the item and in the order picked, at
        cu_budgets[b]:cu_budgets[b+1]. All that `repulsion_select` promises holds for each item.

    Raises:
        TypeError, ValueError: wrong dtype, shape, device, total_k or eps; offsets, budgets or anchors that do not fit
        where they can be read: on the CPU. On a GPU an item that does not fit comes out as -1 throughout. Items whose
        rows or places in the result overlap, because offsets fall, disturb each other: each of their picks is -1 or an
        index within the item, may repeat, need not repel, and may differ from run to run; the other items come out
        right. STS_KERNELS_CHECK=1 makes both an error at the price of a sync. The reference reads the offsets on every
        device.

    Cost:
        as `repulsion_select` for each item; one kernel launch runs all items.
    """
    _check(features, cu_seqlens, cu_budgets, total_k, eps, anchor)
    check_packed_values(_OP, features, cu_seqlens, cu_budgets, total_k, anchor)
    return ops.repulsion_select_varlen.default(features, cu_seqlens, cu_budgets, total_k, eps, anchor)
