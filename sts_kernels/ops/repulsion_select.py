"""Stage 1 of STS: repulsion sampling of a batch of items of equal (or padded) length."""

import math

import torch

from .. import _checks
from .._registry import define_op, ops
from .._transforms import fold
from ._selection import LAST_RESORT, check_padded, check_padded_values, counts, greedy
from .repulsion_step import weight

_OP = "repulsion_select"


def _check(
    features: torch.Tensor, k: int, eps: float, anchor: torch.Tensor | None, num_tokens: torch.Tensor | None
) -> None:
    check_padded(_OP, features, k, anchor, num_tokens)
    _checks.eps(_OP, eps)


def _fake(
    features: torch.Tensor,
    k: int,
    eps: float = 1e-6,
    anchor: torch.Tensor | None = None,
    num_tokens: torch.Tensor | None = None,
) -> torch.Tensor:
    _check(features, k, eps, anchor, num_tokens)
    return features.new_empty((features.shape[0], k), dtype=torch.int64)


def nearest_to_mean(x: torch.Tensor, usable: torch.Tensor) -> torch.Tensor:
    """Default anchor of each item of x (B, N, C) float32: the usable token nearest the mean of the usable tokens, or
    the first token if none is usable."""
    kept = torch.where(usable[..., None], x, 0.0)
    mean = kept.sum(1, keepdim=True, dtype=torch.float64) / usable.sum(1).clamp(min=1)[:, None, None]
    sqdist = (kept - mean.float()).square().sum(-1).nan_to_num(LAST_RESORT, LAST_RESORT)  # beyond float32's range
    return torch.where(usable, sqdist, math.inf).argmin(-1)


@define_op(
    "repulsion_select(Tensor features, SymInt k, float eps=1e-6, Tensor? anchor=None, Tensor? num_tokens=None) "
    "-> Tensor",
    fake=_fake,
    vmap=fold(lambda *arguments: repulsion_select(*arguments)),
    discrete=True,
)
def repulsion_select_reference(
    features: torch.Tensor,
    k: int,
    eps: float = 1e-6,
    anchor: torch.Tensor | None = None,
    num_tokens: torch.Tensor | None = None,
) -> torch.Tensor:
    _check(features, k, eps, anchor, num_tokens)
    check_padded_values(_OP, features, anchor, num_tokens)
    x = features.float().contiguous()
    count = counts(x, num_tokens)
    finite = x.isfinite().all(-1)
    present = torch.arange(x.shape[1], device=x.device) < count[:, None]
    token = nearest_to_mean(x, finite & present) if anchor is None else anchor.long()
    potential = torch.zeros_like(finite, dtype=torch.float32).masked_fill(~finite, LAST_RESORT)
    return greedy(x, k, count, potential, token, lambda potential, sqdist, row: potential.add_(weight(sqdist, eps)))


def repulsion_select(
    features: torch.Tensor,
    k: int,
    eps: float = 1e-6,
    anchor: torch.Tensor | None = None,
    num_tokens: torch.Tensor | None = None,
) -> torch.Tensor:
    """Keeps `k` mutually repelling tokens of each item: stage 1 of STS (Eq. 3-5, Algorithm 1).

    The anchor is picked first. Each further step picks the token with the smallest potential
    ``U(i|S) = sum_{j in S} 1 / (|v_i - v_j|^2 + eps)``, where S are the tokens picked so far.

    Args:
        features: (B, N, C) float32, float16 or bfloat16, N and C at least 1. Any strides; unless the channels are
            contiguous a contiguous copy is made. Squared distances beyond float32's range count as infinite.
        k: tokens to keep, 1 <= k <= N.
        eps: 1e-30 to 1e30, in units of features squared; the repulsion of a duplicate is 1 / eps.
        anchor: (B,) int64 or int32, the first pick of each item. None: the token nearest the mean of the item's
            finite tokens. The mean is rounded to float32, with an error of up to 3e-6 of the channel's largest entry.
        num_tokens: (B,) int64 or int32, 0 to N: only the first num_tokens[b] rows of item b count. None: all do.

    Returns:
        (B, k) int64 token indices, distinct, in pick order. The first k' are the result for k = k'. Positions past
        num_tokens[b] are -1. Ties in potential go to the lowest index. A token with a NaN or infinity is picked only
        when no finite token is left, or as the anchor, and repels none. The same input gives the same output, bit for
        bit, whatever else is in the batch. Indices have no gradient, as those of argmax: requires_grad is False.

    Raises:
        TypeError, ValueError: wrong dtype, shape, device, k or eps; on the CPU, values of `anchor` or `num_tokens` out
        of range. On a GPU an item with such a value comes out as -1 throughout; STS_KERNELS_CHECK=1 raises instead, at
        the cost of a sync.

    Cost:
        about 3 B k N C flops. On a GPU one launch runs all k picks, and nothing is read back to the host. GPU scratch
        for N <= 8192: (N, N) floats for as many items as fit 256 MiB, and on compute capability 9.0 a copy of the
        features. For N > 8192: about the size of the features. On the CPU picked tokens are skipped:
        3 B k (N - k / 2) C flops and scratch of (C / 64 + 46) N floats per item, or (C / 64 + N + 16) N if N <= 724
        and k is at least two thirds of N.
    """
    _check(features, k, eps, anchor, num_tokens)
    check_padded_values(_OP, features, anchor, num_tokens)
    return ops.repulsion_select.default(features, k, eps, anchor, num_tokens)
