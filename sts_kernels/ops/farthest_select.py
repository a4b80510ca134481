"""Max-min selection (farthest point sampling) of a batch of items of equal (or padded) length."""

import torch
from torch import Tensor

from .. import _checks
from .._registry import define_op, ops
from .._transforms import fold
from ._selection import (
    LAST_RESORT,
    check_padded,
    check_padded_values,
    check_token_values,
    counts,
    greedy,
    unit_or_zero,
    unit_sqdist,
)

_OP = "farthest_select"


def check_values_and_metric(
    op: str, features: Tensor, quality: Tensor | None, start: Tensor | None, metric: str
) -> None:
    for name, value in (("quality", quality), ("start", start)):
        if value is not None:
            check_token_values(op, name, value, _checks.FLOATING, features)
    _checks.one_of(op, "metric", metric, ("euclidean", "cosine"))


def _check(
    features: Tensor,
    k: int,
    anchor: Tensor | None,
    quality: Tensor | None,
    start: Tensor | None,
    metric: str,
    num_tokens: Tensor | None,
) -> None:
    check_padded(_OP, features, k, anchor, num_tokens)
    check_values_and_metric(_OP, features, quality, start, metric)


def _fake(
    features: Tensor,
    k: int,
    anchor: Tensor | None = None,
    quality: Tensor | None = None,
    start: Tensor | None = None,
    metric: str = "euclidean",
    num_tokens: Tensor | None = None,
) -> Tensor:
    _check(features, k, anchor, quality, start, metric, num_tokens)
    return features.new_empty((features.shape[0], k), dtype=torch.int64)


def _potential(sqdist: Tensor, quality: Tensor) -> Tensor:
    """What the picks are the argmin of: minus quality times distance, and no -0."""
    value = sqdist.nan_to_num(LAST_RESORT, LAST_RESORT) * quality
    return torch.where(value > 0, -value, 0.0)


@define_op(
    "farthest_select(Tensor features, SymInt k, Tensor? anchor=None, Tensor? quality=None, Tensor? start=None, "
    'str metric="euclidean", Tensor? num_tokens=None) -> Tensor',
    fake=_fake,
    vmap=fold(lambda *arguments: farthest_select(*arguments)),
    discrete=True,
)
def farthest_select_reference(
    features: Tensor,
    k: int,
    anchor: Tensor | None = None,
    quality: Tensor | None = None,
    start: Tensor | None = None,
    metric: str = "euclidean",
    num_tokens: Tensor | None = None,
) -> Tensor:
    _check(features, k, anchor, quality, start, metric, num_tokens)
    check_padded_values(_OP, features, anchor, num_tokens)
    x = features.float().contiguous()
    count = counts(x, num_tokens)
    usable = x.isfinite().all(-1)
    quality = torch.ones_like(usable, dtype=torch.float32) if quality is None else quality.float()
    usable &= quality.isfinite() & (quality >= 0)
    if start is not None:
        start = start.float()
        usable &= start >= 0  # not so where it is NaN
    zero = None
    if metric == "cosine":
        x, zero = unit_or_zero(x)

    def before(sqdist: Tensor) -> Tensor:
        return torch.where(usable, _potential(sqdist, quality), LAST_RESORT)

    def add(potential: Tensor, sqdist: Tensor, row: Tensor) -> Tensor:
        sqdist = sqdist if zero is None else unit_sqdist(sqdist, zero, row)
        weight = _potential(sqdist, quality)
        return torch.where(weight > potential, weight, potential)

    everywhere = torch.full_like(quality, LAST_RESORT)
    potential = before(everywhere if start is None else start)
    if anchor is not None:
        token = anchor.long()
    else:  # without a start all distances are alike, and the quality decides
        position = torch.arange(x.shape[1], device=x.device)
        key = before(torch.ones_like(quality)) if start is None else potential
        token = key.masked_fill(position >= count[:, None], torch.inf).argmin(-1)
    return greedy(x, k, count, potential, token, add)


def farthest_select(
    features: Tensor,
    k: int,
    anchor: Tensor | None = None,
    quality: Tensor | None = None,
    start: Tensor | None = None,
    metric: str = "euclidean",
    num_tokens: Tensor | None = None,
) -> Tensor:
    """Keeps `k` tokens of each item that are far apart: greedy max-min selection, or farthest point sampling.

    The token picked next is the one of the largest ``quality_i * min_{j in S} d_ij`` to the tokens S picked so far,
    where ``d_ij = |x_i - x_j|^2``. FPS is this from a given anchor; DivPrune is this under metric="cosine".

    Args:
        features: (B, N, C) float32, float16 or bfloat16, N and C at least 1. Any strides; unless the channels are
            contiguous a contiguous copy is made.
        k: tokens to keep, 1 <= k <= N.
        anchor: (B,) int64 or int32, the first pick of each item. None: the token of the largest quality, which is the
            first finite token where there is no quality; with `start`, the token of the largest quality * start.
        quality: (B, N) float32, float16 or bfloat16, finite and at least 0. None: 1.
        start: (B, N) float32, float16 or bfloat16: d of each token to what is kept already, at least 0; infinity where
            nothing is. A negative one: the token is kept already. None: nothing is kept yet.
        metric: "euclidean", or "cosine": rows are divided by their length first, so that d = 2 - 2 cosine. A zero row
            has cosine 0 to every token.
        num_tokens: (B,) int64 or int32, 0 to N: only the first num_tokens[b] rows of item b count. None: all do.

    Returns:
        (B, k) int64 token indices, distinct, in the order picked; the first k' of them are the result for k'. Positions
        past num_tokens[b] are -1. Equal values go to the lowest index; d and quality * d beyond float32's range are
        equal. A token with a NaN or infinity, with a quality that is negative or not finite, or with a start that is
        negative or NaN is picked only when no other is left, by index; the NaN or infinity makes no other token near.
        The same input gives the same output, bit for bit, whatever else is in the batch. No gradient.

    Raises:
        TypeError, ValueError: wrong dtype, shape, device, k or metric; values of `anchor` or `num_tokens` out of range
        where they can be read: on the CPU. On a GPU an item with such a value comes out as -1 throughout, and
        STS_KERNELS_CHECK=1 makes it an error at the price of a sync.

    Cost:
        as `repulsion_select`: about 3 B k N C flops; nothing is read back to the host. metric="cosine" adds a float32
        copy of the features.
    """
    _check(features, k, anchor, quality, start, metric, num_tokens)
    check_padded_values(_OP, features, anchor, num_tokens)
    return ops.farthest_select.default(features, k, anchor, quality, start, metric, num_tokens)
