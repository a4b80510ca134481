"""Stage 1 of STS: repulsion sampling of a batch of items of equal (or padded) length."""

import math

import torch

from .. import _checks
from .._registry import define_op
from .._transforms import fold
from .repulsion_step import LAST_RESORT, pick, weight


def _check(features, k, eps, anchor, num_tokens):
    op = "repulsion_select"
    _checks.features(op, features)
    batch, tokens, _ = features.shape
    _checks.integer(op, "k", k, 1, tokens, " (the number of tokens)")
    _checks.eps(op, eps)
    if anchor is not None:
        _checks.index_vector(op, "anchor", anchor, batch, "(B,)", features)
    if num_tokens is not None:
        _checks.index_vector(op, "num_tokens", num_tokens, batch, "(B,)", features)


def _check_values(features, anchor, num_tokens):
    tokens, counts = features.shape[1], None
    if num_tokens is not None:
        if not _checks.values_readable(num_tokens):
            return
        counts = num_tokens.tolist()
        for item, count in enumerate(counts):
            if not 0 <= count <= tokens:
                raise ValueError(
                    f"repulsion_select: num_tokens[{item}] must be between 0 and {tokens}, its tokens, got {count}"
                )
    if anchor is not None and _checks.values_readable(anchor):
        for item, value in enumerate(anchor.tolist()):
            count = tokens if counts is None else counts[item]
            if count and not 0 <= value < count:
                raise ValueError(f"repulsion_select: anchor[{item}] must be between 0 and {count - 1}, got {value}")


def _fake(features, k, eps=1e-6, anchor=None, num_tokens=None):
    _check(features, k, eps, anchor, num_tokens)
    return features.new_empty((features.shape[0], k), dtype=torch.int64)


def nearest_to_mean(x: torch.Tensor, usable: torch.Tensor) -> torch.Tensor:
    """Default anchor of each item of x (B, N, C) float32: the usable token nearest the mean of the usable ones, or the
    first token where none is usable."""
    kept = torch.where(usable[..., None], x, 0.0)
    mean = kept.sum(1, keepdim=True) / usable.sum(1).clamp(min=1)[:, None, None]
    sqdist = (kept - mean).square().sum(-1).nan_to_num(LAST_RESORT, LAST_RESORT)  # out of float32's range
    return torch.where(usable, sqdist, math.inf).argmin(-1)


@define_op(
    "repulsion_select(Tensor features, SymInt k, float eps=1e-6, Tensor? anchor=None, Tensor? num_tokens=None) "
    "-> Tensor",
    fake=_fake,
    vmap=fold(lambda *arguments: repulsion_select(*arguments)),
    discrete=True,
)
def repulsion_select_reference(features, k, eps=1e-6, anchor=None, num_tokens=None):
    _check(features, k, eps, anchor, num_tokens)
    _check_values(features, anchor, num_tokens)
    x = features.float().contiguous()  # so that equal tokens are summed in the same order, and tie
    batch, tokens, channels = x.shape
    position = torch.arange(tokens, device=x.device)
    count = torch.full((batch,), tokens, device=x.device) if num_tokens is None else num_tokens.long()
    count = torch.where((count >= 0) & (count <= tokens), count, 0)
    present = position < count[:, None]
    finite = x.isfinite().all(-1)
    token = nearest_to_mean(x, finite & present) if anchor is None else anchor.long()
    token = torch.where((token >= 0) & (token < count), token, -1)
    potential = torch.where(finite, 0.0, LAST_RESORT).masked_fill(~present | (token < 0)[:, None], math.inf)
    # Filled in place: a list of small tensors, each new among large ones that are freed, would hold the heap apart.
    out = features.new_empty((batch, k), dtype=torch.int64)
    for step in range(k):
        out[:, step] = token
        row = token.clamp(min=0)
        centre = x.gather(1, row[:, None, None].expand(-1, 1, channels))
        potential += weight((x - centre).square_().sum(-1), eps)
        potential.masked_fill_(position == row[:, None], math.inf)
        token = pick(potential)
    return out


def repulsion_select(
    features: torch.Tensor,
    k: int,
    eps: float = 1e-6,
    anchor: torch.Tensor | None = None,
    num_tokens: torch.Tensor | None = None,
) -> torch.Tensor:
    """Keeps `k` tokens of each item that repel each other: stage 1 of STS (Eq. 3-5, Algorithm 1).

    From the anchor on, the token with the smallest potential ``U(i|S) = sum_{j in S} 1 / (|v_i - v_j|^2 + eps)`` to the
    tokens S picked so far is picked next.

    Args:
        features: (B, N, C) float32, float16 or bfloat16, N and C at least 1. Any strides; unless the channels are
            contiguous a contiguous copy is made. Squared distances beyond float32's range count as infinite.
        k: tokens to keep, 1 <= k <= N.
        eps: 1e-30 to 1e30, in units of features squared; the repulsion of a duplicate is 1 / eps.
        anchor: (B,) int64 or int32, the first pick of each item. None: the token nearest the mean of the item's
            finite tokens.
        num_tokens: (B,) int64 or int32, 0 to N: only the first num_tokens[b] rows of item b count. None: all do.

    Returns:
        (B, k) int64 token indices, distinct, in the order picked; the first k' of them are the result for k'. Positions
        past num_tokens[b] are -1. Equal potentials go to the lowest index. A token with a NaN or infinity is picked
        only when no finite one is left, and repels none. The same input gives the same output, bit for bit, whatever
        else is in the batch. Indices have no gradient, as those of argmax: requires_grad is False.

    Raises:
        TypeError, ValueError: wrong dtype, shape, device, k or eps; values of `anchor` or `num_tokens` out of range
        where they can be read: on the CPU. On a GPU an item with such a value comes out as -1 throughout, and
        STS_KERNELS_CHECK=1 makes it an error at the price of a sync.

    Cost:
        about 3 B k N C flops. On a GPU one launch runs all k picks, and nothing is read back to the host; scratch of
        (N, N) floats for as many items as fit 256 MiB up to 8192 tokens, and about the size of the features above. On
        the CPU picked tokens are left out, 3 B k (N - k / 2) C flops, with scratch of (C / 64 + 46) N floats an item;
        where two thirds or more of at most 724 tokens are picked, of (C / 64 + N + 16) N.
    """
    _check(features, k, eps, anchor, num_tokens)
    _check_values(features, anchor, num_tokens)
    return torch.ops.sts_kernels.repulsion_select.default(features, k, eps, anchor, num_tokens)
