"""Stage 1 of STS over items of different lengths packed into one tensor."""

import itertools

import torch

from .. import _checks
from .._registry import define_op
from .._transforms import stack_offsets
from .repulsion_select import repulsion_select_reference

_OP = "repulsion_select_varlen"


def _check(features, cu_seqlens, cu_budgets, total_k, eps, anchor):
    _checks.features(_OP, features, "(T, C)")
    _checks.tensor(_OP, "cu_seqlens", cu_seqlens, _checks.INTEGER, "(B+1,)", 1)
    items = cu_seqlens.shape[0] - 1
    if items < 0:
        raise ValueError(
            f"{_OP}: cu_seqlens must have shape (B+1,), so at least one element, got {tuple(cu_seqlens.shape)}"
        )
    _checks.same_device(_OP, "cu_seqlens", cu_seqlens, features)
    _checks.index_vector(_OP, "cu_budgets", cu_budgets, items + 1, "(B+1,)", features)
    _checks.integer(_OP, "total_k", total_k, 0, features.shape[0], " (the number of tokens)")
    _checks.eps(_OP, eps)
    if anchor is not None:
        _checks.index_vector(_OP, "anchor", anchor, items, "(B,)", features)


def _offsets(name, values, total, what):
    if values[0] != 0 or values[-1] != total or any(b < a for a, b in itertools.pairwise(values)):
        raise ValueError(f"{_OP}: {name} must rise from 0 to {total}, {what}, got {values}")


def _check_values(features, cu_seqlens, cu_budgets, total_k, anchor):
    if not all(_checks.values_readable(v) for v in (cu_seqlens, cu_budgets, anchor) if v is not None):
        return
    starts, budgets = cu_seqlens.tolist(), cu_budgets.tolist()
    _offsets("cu_seqlens", starts, features.shape[0], "the number of tokens")
    _offsets("cu_budgets", budgets, total_k, "total_k")
    anchors = [0] * (len(starts) - 1) if anchor is None else anchor.tolist()
    for item, first in enumerate(anchors):
        count, budget = starts[item + 1] - starts[item], budgets[item + 1] - budgets[item]
        if budget > count:
            raise ValueError(f"{_OP}: cu_budgets must give item {item} at most its {count} tokens, got {budget}")
        if budget and not 0 <= first < count:
            raise ValueError(f"{_OP}: anchor[{item}] must be between 0 and {count - 1}, got {first}")


def _fake(features, cu_seqlens, cu_budgets, total_k, eps=1e-6, anchor=None):
    _check(features, cu_seqlens, cu_budgets, total_k, eps, anchor)
    return features.new_empty((total_k,), dtype=torch.int64)


def _vmap(features, cu_seqlens, cu_budgets, total_k, eps=1e-6, anchor=None):
    lanes, tokens = features.shape[:2]
    for lane in range(lanes):
        first = None if anchor is None else anchor[lane]
        _check_values(features[lane], cu_seqlens[lane], cu_budgets[lane], total_k, first)
    if anchor is not None:
        anchor = torch.nn.functional.pad(anchor, (0, 1)).flatten()[:-1]  # one per item between lanes
    packed = stack_offsets(cu_seqlens, tokens), stack_offsets(cu_budgets, total_k)
    out = repulsion_select_varlen(features.flatten(0, 1), *packed, total_k * lanes, eps, anchor)
    return out.unflatten(0, (lanes, total_k))


@define_op(
    "repulsion_select_varlen(Tensor features, Tensor cu_seqlens, Tensor cu_budgets, SymInt total_k, float eps=1e-6, "
    "Tensor? anchor=None) -> Tensor",
    fake=_fake,
    vmap=_vmap,
    discrete=True,
)
def repulsion_select_varlen_reference(features, cu_seqlens, cu_budgets, total_k, eps=1e-6, anchor=None):
    _check(features, cu_seqlens, cu_budgets, total_k, eps, anchor)
    # The reference reads the offsets back to the host; the compiled kernels do not.
    starts, budgets = cu_seqlens.tolist(), cu_budgets.tolist()
    _check_values(features, cu_seqlens.cpu(), cu_budgets.cpu(), total_k, None if anchor is None else anchor.cpu())
    out = features.new_empty((total_k,), dtype=torch.int64)
    for item in range(len(starts) - 1):
        budget = budgets[item + 1] - budgets[item]
        if budget:
            tokens = features[None, starts[item] : starts[item + 1]]
            first = None if anchor is None else anchor[item : item + 1]
            out[budgets[item] : budgets[item + 1]] = repulsion_select_reference(tokens, budget, eps, first)[0]
    return out


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
    _check_values(features, cu_seqlens, cu_budgets, total_k, anchor)
    return torch.ops.sts_kernels.repulsion_select_varlen.default(features, cu_seqlens, cu_budgets, total_k, eps, anchor)
