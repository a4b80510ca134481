"""Removal of duplicates by bipartite rounds: the diverse half of VisPruner."""

import math

import torch

from .. import _checks
from .._registry import define_op, ops
from .._transforms import fold
from ._unit_rows import unit_rows

MOST_LISTED = 8192  # max tokens of a list: their pairwise distances take 256 MiB. Also in csrc/common/dedup_glue.h.


def _check(features: torch.Tensor, order: torch.Tensor, keep: int, step: int) -> None:
    op = "dedup_select"
    _checks.features(op, features)
    _checks.tensor(op, "order", order, _checks.INTEGER, "(B, R)")
    if order.shape[0] != features.shape[0]:
        raise ValueError(f"{op}: order must have shape (B, R) with B = {features.shape[0]}, got {tuple(order.shape)}")
    _checks.same_device(op, "order", order, features)
    if order.shape[1] > MOST_LISTED:
        raise ValueError(f"{op}: order must list at most {MOST_LISTED} tokens an item, got shape {tuple(order.shape)}")
    _checks.integer(op, "keep", keep, 1, order.shape[1], " (the length of order)")
    _checks.integer(op, "step", step, 1)


def _check_values(features: torch.Tensor, order: torch.Tensor) -> None:
    if not _checks.values_readable(order):
        return
    tokens = features.shape[1]
    if order.numel() and not -1 <= order.min() <= order.max() < tokens:
        item, place = ((order < -1) | (order >= tokens)).nonzero()[0].tolist()
        raise ValueError(
            f"dedup_select: order[{item}, {place}] must be between -1 and {tokens - 1}, got {order[item, place].item()}"
        )


def _fake(features: torch.Tensor, order: torch.Tensor, keep: int, step: int = 8) -> torch.Tensor:
    _check(features, order, keep, step)
    return features.new_empty((features.shape[0], keep), dtype=torch.int64)


@define_op(
    "dedup_select(Tensor features, Tensor order, SymInt keep, SymInt step=8) -> Tensor",
    fake=_fake,
    vmap=fold(lambda *arguments: dedup_select(*arguments)),
    discrete=True,
)
def dedup_select_reference(features: torch.Tensor, order: torch.Tensor, keep: int, step: int = 8) -> torch.Tensor:
    _check(features, order, keep, step)
    _check_values(features, order)
    batch, tokens, channels = features.shape
    length = order.shape[1]
    place = torch.arange(length, device=features.device)
    order = order.long()
    spoiled = ((order < -1) | (order >= tokens)).any(-1, keepdim=True)
    present = (order >= 0).cumprod(-1).bool() & ~spoiled
    row = torch.where(present, order, 0)
    x = features.gather(1, row[..., None].expand(-1, -1, channels)).float().contiguous()
    finite = x.isfinite().all(-1) & present
    # rest: positions in `order`. Finite tokens come first, then the others, each in the order of the list.
    rest = torch.where(finite, place, place + length + length * ~present).argsort(-1)
    finite_count, count = finite.sum(-1, keepdim=True), present.sum(-1, keepdim=True)
    x = unit_rows(torch.where(finite[..., None], x, 0.0))
    # |u_i - u_j|^2 = 2 - 2 cosine, by differences: nothing cancels between near-duplicates. A zero row has cosine 0.
    sqdist = x.new_empty((batch, length, length))
    for i in range(length):
        sqdist[:, i] = (x - x[:, i : i + 1]).square_().sum(-1)
    zero = (x == 0).all(-1)
    sqdist.masked_fill_(zero[:, :, None] | zero[:, None], 2.0)
    # Invariant: left <= length. The rounds are those of an item of R tokens.
    left = torch.where(finite_count > keep, finite_count, count.clamp(max=keep))
    while length > keep:
        even, odd = rest[:, :length:2], rest[:, 1:length:2]
        met = sqdist.gather(1, even[..., None].expand(-1, -1, sqdist.shape[2]))
        met = met.gather(2, odd[:, None].expand(-1, even.shape[1], -1))
        met.masked_fill_((2 * place[: odd.shape[1]] + 1 >= left[..., None]), math.inf)
        evens = (left + 1) // 2
        closest = met.amin(-1).masked_fill(place[: even.shape[1]] >= evens, math.inf)
        by_closest = even.gather(1, closest.argsort(stable=True))
        remove = torch.minimum(left - keep, evens).clamp(0, step)
        length = max(length - min(step, length - keep, (length + 1) // 2), keep)
        # The next list: the sorted even tokens from `remove` on, then the odd tokens.
        now = place[:length].expand(batch, -1)
        stay = torch.where(
            now < evens - remove,
            by_closest.gather(1, (now + remove).clamp(max=even.shape[1] - 1)),
            odd.gather(1, (now - evens + remove).clamp(0, odd.shape[1] - 1)),
        )
        rest = torch.where(remove > 0, stay, rest[:, :length])
        left = left - remove
    rest = rest[:, :keep]
    return torch.where(place[:keep] < left, row.gather(1, rest), -1)


def dedup_select(features: torch.Tensor, order: torch.Tensor, keep: int, step: int = 8) -> torch.Tensor:
    """Keeps `keep` of the tokens in `order` by removing duplicates in rounds, as VisPruner does for its diverse tokens.

    Rounds run while more than `keep` tokens are left. A round scores each token at an even position of the list by its
    largest cosine to a token at an odd position. It removes the ``min(step, left - keep, even)`` even tokens with the
    largest scores. The next list holds the remaining even tokens by descending score, then the odd tokens in order.

    Args:
        features: (B, N, C) float32, float16 or bfloat16, N and C at least 1. Any strides; unless the channels are
            contiguous a contiguous copy is made. A zero row has cosine 0 to every token.
        order: (B, R) int64 or int32 token indices, R from 1 to 8192, the most important first. A list ends at its first
            -1. A token that is listed twice counts as two.
        keep: tokens to keep, 1 <= keep <= R.
        step: tokens removed in a round, at least 1. 8 in VisPruner.

    Returns:
        (B, keep) int64: the last list, then -1. A list of at most `keep` tokens, all finite, is returned unchanged.
        Equal cosines are ordered by list position. A token with a NaN or infinity is removed before the first round. If
        fewer than `keep` finite tokens are listed, the removed tokens follow them in list order. The same input gives
        the same output, bit for bit, whatever else is in the batch. Indices have no gradient, as those of argmax:
        requires_grad is False.

        Cosines are compared as 1 - |u_i - u_j|^2 / 2 of unit rows u. The last bits of a cosine can change the pairs of
        all later rounds, so backends that round differently may keep different tokens. If row lengths are powers of two
        and the distances are exact in float32, all backends keep the same tokens.

    Raises:
        TypeError, ValueError: wrong dtype, shape, device, keep or step; on the CPU, values of `order` out of range. On
        a GPU an item with such a value comes out as -1 throughout; STS_KERNELS_CHECK=1 raises instead, at the cost of a
        sync.

    Cost:
        3/2 B R^2 C flops, and scratch of (R + C) R floats per item. The rounds compare B (R^3 - keep^3) / (12 step)
        distances.
    """
    _check(features, order, keep, step)
    _check_values(features, order)
    return ops.dedup_select.default(features, order, keep, step)
