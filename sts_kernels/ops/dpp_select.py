"""Greedy MAP inference of a determinantal point process: CDPruner's selection."""

import math

import torch

from .. import _checks
from .._registry import define_op, ops
from .._transforms import fold
from ._selection import check_padded, check_padded_values, check_token_values, counts
from ._unit_rows import unit_rows

# A unit row's squared distance to the span of the picks counts as 0 below this: unit rows are rounded to float32. Also
# in csrc/common/dpp_rule.h.
IN_SPAN = 1e-10


def _check(
    features: torch.Tensor, quality: torch.Tensor, k: int, floor: float, num_tokens: torch.Tensor | None
) -> None:
    op = "dpp_select"
    check_padded(op, features, k, num_tokens=num_tokens)
    check_token_values(op, "quality", quality, _checks.FLOATING, features)
    _checks.between(op, "floor", floor, 0, 1)


def _fake(
    features: torch.Tensor, quality: torch.Tensor, k: int, floor: float = 1e-7, num_tokens: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    _check(features, quality, k, floor, num_tokens)
    batch = features.shape[0]
    return (
        features.new_empty((batch, k), dtype=torch.int64),
        features.new_empty((batch, k), dtype=torch.float32),
    )


@define_op(
    "dpp_select(Tensor features, Tensor quality, SymInt k, float floor=1e-7, Tensor? num_tokens=None) "
    "-> (Tensor, Tensor)",
    fake=_fake,
    vmap=fold(lambda *arguments: dpp_select(*arguments)),
)
def dpp_select_reference(
    features: torch.Tensor, quality: torch.Tensor, k: int, floor: float = 1e-7, num_tokens: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    _check(features, quality, k, floor, num_tokens)
    check_padded_values("dpp_select", features, num_tokens=num_tokens)
    batch, tokens, channels = features.shape
    position = torch.arange(tokens, device=features.device)
    present = position < counts(features, num_tokens)[:, None]
    usable = features.isfinite().all(-1) & quality.isfinite() & present
    # The Cholesky rows of L are q times those of c. So a gain is q^2 times the squared distance of the unit row to the
    # span of the picks. Square roots of gains are compared: q^2 may be out of float32's range.
    # Sums are float64: a rounding error is divided by the small distance of a pick, and in float32 it would soon reach
    # the gains left.
    x = unit_rows(torch.where(usable[..., None], features.float(), 0.0)).double()
    distance = (x != 0).any(-1).double()  # squared
    x = x * torch.where(distance > 0, 1 / x.square().sum(-1).sqrt(), 0.0)[..., None]
    size = torch.where(usable, quality.float(), 0.0).abs()
    # Order of the tokens after the last gain: by quality, unusable tokens last.
    rest = torch.where(usable, quality.float() + 0.0, -math.inf)  # -0 equals 0
    left = present.clone()
    factor = x.new_zeros((batch, k, tokens))
    order = features.new_empty((batch, k), dtype=torch.int64)
    gain = torch.empty_like(order, dtype=torch.float32)
    least = None
    for step in range(k):
        value = torch.where(left, size * distance.float().sqrt(), -1.0)
        best, token = value.max(-1).values, _first_largest(value, left)
        if least is None:
            least = math.sqrt(floor) * best
            filling = best < 0  # False everywhere
        filling = filling | ~(best > least)
        token = torch.where(filling, _first_largest(rest, left), token)
        token = torch.where(left.any(-1), token, -1)
        order[:, step] = token
        gain[:, step] = torch.where(filling, 0.0, best.square())
        row = token.clamp(min=0)[:, None]
        left.scatter_(1, row, False)
        # The next Cholesky row, (c_j - sum_s e_s[j] e_s) / e_j. All tokens are summed in one order, so equal ones tie.
        own = factor[:, :step].gather(2, row[:, None].expand(-1, step, 1))
        cosine = (x * x.gather(1, row[..., None].expand(-1, 1, channels))).sum(-1)
        residual = cosine - (factor[:, :step] * own).sum(1)
        pivot = distance.gather(1, row).sqrt()
        residual = torch.where(filling[:, None], 0.0, residual / torch.where(pivot > 0, pivot, 1.0))
        factor[:, step] = residual
        distance = distance - residual.square()
        distance = torch.where(distance < IN_SPAN, 0.0, distance)
    return order, gain


def _first_largest(value: torch.Tensor, left: torch.Tensor) -> torch.Tensor:
    """(B,): argmax of value (B, N) over the tokens left, lowest index among ties."""
    largest = torch.where(left, value, -math.inf).amax(-1, keepdim=True)
    return (left & (value == largest)).int().argmax(-1)


def dpp_select(
    features: torch.Tensor,
    quality: torch.Tensor,
    k: int,
    floor: float = 1e-7,
    num_tokens: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keeps `k` tokens of each item by greedy MAP inference of the DPP of L_ij = q_i c_ij q_j (CDPruner).

    c_ij is the cosine of tokens i and j, q_i the quality of token i, S the tokens picked so far. Each step picks the
    token with the largest gain ``det L_{S + i} / det L_S``. The gain is q_i^2 times the squared distance of the unit
    row of i to the span of S.

    Args:
        features: (B, N, C) float32, float16 or bfloat16, N and C at least 1. Any strides; unless the channels are
            contiguous a contiguous copy is made. A zero row has cosine 0 to every token and gain 0.
        quality: (B, N) float32, float16 or bfloat16, any strides. The gain does not depend on its sign.
        k: tokens to keep, 1 <= k <= N.
        floor: 0 to 1. Once the largest gain is at most `floor` times the first gain, the remaining picks go by quality,
            largest first. 1: all picks do.
        num_tokens: (B,) int64 or int32, 0 to N: only the first num_tokens[b] tokens of item b count. None: all do.

    Returns:
        order: (B, k) int64 token indices, distinct, in pick order. The first k' are the result for k = k'. Positions
            past num_tokens[b] are -1.
        gain: (B, k) float32, the gain of each pick, non-increasing; 0 for picks by quality and past num_tokens[b]. As
            long as no pick goes by quality, the logarithms of the first t gains sum to log det L of the first t picks.
            On the CPU gains below 1e-38 times the largest q_i^2 lose accuracy or count as 0. Only a `floor` as small
            reaches them.

        A squared distance to the span below 1e-10 counts as 0, so tokens beyond the rank of the kernel, and duplicates
        of picks, go by quality. Ties in gain or quality go to the lowest index. A token with a NaN or infinity in its
        row or quality is picked only when no other is left. The same input gives the same output, bit for bit, whatever
        else is in the batch. The gains have no gradient: requires_grad is False.

    Raises:
        TypeError, ValueError: wrong dtype, shape, device, k or floor; on the CPU, values of `num_tokens` out of range.
        On a GPU an item with such a value comes out as -1 throughout; STS_KERNELS_CHECK=1 raises instead, at the cost
        of a sync.

    Cost:
        2 B k N C + B k^2 N flops in float64, and scratch of (C + 2 k) N floats per item. No (N, N) matrix.
    """
    _check(features, quality, k, floor, num_tokens)
    check_padded_values("dpp_select", features, num_tokens=num_tokens)
    return ops.dpp_select.default(features, quality, k, floor, num_tokens)
