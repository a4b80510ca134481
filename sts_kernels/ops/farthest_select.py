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
    """Potential, whose argmin is picked: -quality * sqdist, without -0."""
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
        usable &= start >= 0  # False for NaN
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
    else:  # without a start all distances are equal: the quality decides
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

    Each step picks the token with the largest ``quality_i * min_{j in S} d_ij``. S are the tokens picked so far and
    ``d_ij = |x_i - x_j|^2``. With an anchor this is farthest point sampling. DivPrune is metric="cosine" with the token
    whose nearest neighbour is farthest as the anchor: ``anchor = nearest(x, x, exclude_self=True)[1].argmin(1)``.

    Args:
        features: (B, N, C) float32, float16 or bfloat16, N and C at least 1. Any strides; unless the channels are
            contiguous a contiguous copy is made.
        k: tokens to keep, 1 <= k <= N.
        anchor: (B,) int64 or int32, the first pick of each item. None: the token with the largest quality, or with
            `start` the largest quality * start. Without both, the first finite token.
        quality: (B, N) float32, float16 or bfloat16, finite and at least 0. None: 1.
        start: (B, N) float32, float16 or bfloat16: d of each token to its nearest token already kept, at least 0;
            infinity: no token is kept. Negative: the token itself is already kept. None: no token is kept yet. Without
            an anchor and with `start` infinite, tokens of a quality above 1 tie in the first pick, for their products
            are beyond float32's range. Where no token is kept, None lets the quality decide.
        metric: "euclidean", or "cosine": rows are divided by their length first, so that d = 2 - 2 cosine. A zero row
            has cosine 0 to every token.
        num_tokens: (B,) int64 or int32, 0 to N: only the first num_tokens[b] rows of item b count. None: all do.

    Returns:
        (B, k) int64 token indices, distinct, in pick order. The first k' are the result for k = k'. Positions past
        num_tokens[b] are -1. Ties go to the lowest index; values of d or quality * d beyond float32's range tie. A
        token that is not the anchor is picked only when no other is left, by index, if its row has a NaN or infinity,
        its quality is negative or not finite, or its start is negative or NaN. A pick with a NaN or infinity is near no
        token. The same input gives the same output, bit for bit, whatever else is in the batch. No gradient.

    Raises:
        TypeError, ValueError: wrong dtype, shape, device, k or metric; on the CPU, values of `anchor` or `num_tokens`
        out of range. On a GPU an item with such a value comes out as -1 throughout; STS_KERNELS_CHECK=1 raises instead,
        at the cost of a sync.

    Cost:
        as `repulsion_select`: about 3 B k N C flops; nothing is read back to the host. metric="cosine" adds a float32
        copy of the features.
    """
    _check(features, k, anchor, quality, start, metric, num_tokens)
    check_padded_values(_OP, features, anchor, num_tokens)
    return ops.farthest_select.default(features, k, anchor, quality, start, metric, num_tokens)
