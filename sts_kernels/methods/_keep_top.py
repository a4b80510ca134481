"""Masked top-k over positions: the TopK of STS stage 2 and of other cuts that rank tokens by score."""

import math

import torch

from .. import _checks
from ._rank import inverse


def _check(scores: torch.Tensor, candidates: torch.Tensor, k: int) -> None:
    op = "keep_top"
    _checks.tensor(op, "scores", scores, _checks.SCORES, "(B, S)")
    _checks.tensor(op, "candidates", candidates, (torch.bool,), "(B, S)")
    if candidates.shape != scores.shape:
        raise ValueError(
            f"{op}: candidates must have the shape of scores, {tuple(scores.shape)}, got {tuple(candidates.shape)}"
        )
    _checks.same_device(op, "candidates", candidates, scores, "scores")
    _checks.integer(op, "k", k, 1, scores.shape[1], " (the number of positions)")


def keep_top(scores: torch.Tensor, candidates: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions of the `k` largest scores among the candidates of each row, ascending (STS Eq. 7).

    Args:
        scores: (B, S) float32, float16, bfloat16 or float64, any strides; larger is better.
        candidates: (B, S) bool mask of the positions that may be kept, such as the visual tokens.
        k: positions to keep, 1 <= k <= S.

    Returns:
        positions (B, k) int64, ascending, and valid (B, k) bool. A row with fewer than k candidates keeps all of them;
        its remaining slots hold -1 and False. Ties go to the lowest position; NaN counts as the lowest score. No
        gradient. Nothing is read back to the host.

    Raises:
        TypeError, ValueError: wrong dtype, shape, device or k.

    Cost:
        one stable sort of (B, S).
    """
    _check(scores, candidates, k)
    positions = _ranked(scores, candidates)[:, :k]
    valid = torch.arange(k, device=scores.device) < candidates.sum(1, keepdim=True)
    past_the_end = scores.shape[1]
    positions = positions.masked_fill(~valid, past_the_end).sort(dim=1).values
    return positions.masked_fill(~valid, -1), valid


def best_of(scores: torch.Tensor, candidates: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    """(B, S) bool mask of the `count[b]` largest scores among the candidates of each row; ties and NaN as `keep_top`.

    count: (B,) int64, any values. A row with fewer candidates keeps all of them. Shapes do not depend on `count`.
    """
    return candidates & (inverse(_ranked(scores, candidates)) < count[:, None])


def _ranked(scores: torch.Tensor, candidates: torch.Tensor) -> torch.Tensor:
    """(B, S) int64: positions by descending score; non-candidates last."""
    lowest = torch.finfo(scores.dtype).min
    scores = scores.detach().nan_to_num(nan=lowest, posinf=math.inf, neginf=lowest).masked_fill(~candidates, -math.inf)
    return scores.sort(dim=1, descending=True, stable=True).indices
