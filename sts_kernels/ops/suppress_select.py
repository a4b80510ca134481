"""Selection by rank with suppression of similar tokens, of a batch of items of equal (or padded) length."""

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

_OP = "suppress_select"
SUPPRESSED = 2.0**23  # added to the rank of a suppressed token: above every rank, sums are exact in float32


def check_rank_and_tau(op: str, features: Tensor, rank: Tensor, tau: Tensor) -> None:
    check_token_values(op, "rank", rank, _checks.INTEGER, features)
    check_token_values(op, "tau", tau, _checks.FLOATING, features)


def _check(features: Tensor, rank: Tensor, tau: Tensor, k: int, num_tokens: Tensor | None) -> None:
    check_padded(_OP, features, k, None, num_tokens)
    check_rank_and_tau(_OP, features, rank, tau)


def _fake(features: Tensor, rank: Tensor, tau: Tensor, k: int, num_tokens: Tensor | None = None) -> Tensor:
    _check(features, rank, tau, k, num_tokens)
    return features.new_empty((features.shape[0], k), dtype=torch.int64)


@define_op(
    "suppress_select(Tensor features, Tensor rank, Tensor tau, SymInt k, Tensor? num_tokens=None) -> Tensor",
    fake=_fake,
    vmap=fold(lambda *arguments: suppress_select(*arguments)),
    discrete=True,
)
def suppress_select_reference(
    features: Tensor, rank: Tensor, tau: Tensor, k: int, num_tokens: Tensor | None = None
) -> Tensor:
    _check(features, rank, tau, k, num_tokens)
    check_padded_values(_OP, features, None, num_tokens)
    x = features.float().contiguous()
    count = counts(x, num_tokens)
    usable = x.isfinite().all(-1) & (rank >= 0) & (rank < SUPPRESSED)
    x, zero = unit_or_zero(x)
    tau = tau.float()

    def add(potential: Tensor, sqdist: Tensor, row: Tensor) -> Tensor:
        near = unit_sqdist(sqdist, zero, row) < 2 * tau.gather(1, row)
        return torch.where(near & (potential < SUPPRESSED), potential + SUPPRESSED, potential)

    potential = torch.where(usable, rank.float(), LAST_RESORT)
    position = torch.arange(x.shape[1], device=x.device)
    token = potential.masked_fill(position >= count[:, None], torch.inf).argmin(-1)
    return greedy(x, k, count, potential, token, add)


def suppress_select(
    features: Tensor,
    rank: Tensor,
    tau: Tensor,
    k: int,
    num_tokens: Tensor | None = None,
) -> Tensor:
    """Keeps `k` tokens of each item by rank; each pick suppresses similar tokens (AdaVTP 4.3; cosine NMS).

    Tokens are visited in ascending rank. A token that is not suppressed is picked. The pick suppresses every remaining
    token with ``1 - cosine < tau[pick]``. When only suppressed tokens are left, they are picked by rank.

    Args:
        features: (B, N, C) float32, float16 or bfloat16, N and C at least 1. Any strides; unless the channels are
            contiguous a contiguous copy is made. A zero row has cosine 0 to every token.
        rank: (B, N) int64 or int32, 0 to 2^23 - 1, the lowest first. Need not be a permutation.
        tau: (B, N) float32, float16 or bfloat16: the threshold of each token, used when it is picked. A NaN suppresses
            no token.
        k: tokens to keep, 1 <= k <= N.
        num_tokens: (B,) int64 or int32, 0 to N: only the first num_tokens[b] rows of item b count. None: all do.

    Returns:
        (B, k) int64 token indices, distinct, in pick order. The first k' are the result for k = k'. Positions past
        num_tokens[b] are -1. Ties in rank go to the lowest index. A token with a NaN or infinity, or with a rank out of
        range, is picked only when no other is left, by index. A token with a NaN or infinity suppresses none. The same
        input gives the same output, bit for bit, whatever else is in the batch. No gradient.

    Raises:
        TypeError, ValueError: wrong dtype, shape, device or k; on the CPU, values of `num_tokens` out of range. On a
        GPU an item with such a value comes out as -1 throughout; STS_KERNELS_CHECK=1 raises instead, at the cost of a
        sync.

    Cost:
        at most as `repulsion_select`, about 3 B k N C flops, and a float32 copy of the features; nothing is read back
        to the host.
    """
    _check(features, rank, tau, k, num_tokens)
    check_padded_values(_OP, features, None, num_tokens)
    return ops.suppress_select.default(features, rank, tau, k, num_tokens)
