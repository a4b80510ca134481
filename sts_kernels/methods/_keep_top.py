"""Choosing the best of a set of candidate positions: the TopK of STS stage 2, and of every method that ranks tokens."""

import math

import torch

from .. import _checks


def _check(scores: torch.Tensor, candidates: torch.Tensor, k: int) -> None:
    op = "keep_top"
    _checks.tensor(op, "scores", scores, (*_checks.FLOATING, torch.float64), "(B, S)", 2)
    _checks.tensor(op, "candidates", candidates, (torch.bool,), "(B, S)", 2)
    if candidates.shape != scores.shape:
        raise ValueError(
            f"{op}: candidates must have the shape of scores, {tuple(scores.shape)}, got {tuple(candidates.shape)}"
        )
    _checks.same_device(op, "candidates", candidates, scores, "scores")
    _checks.integer(op, "k", k, 1, scores.shape[1], " (the number of positions)")


def keep_top(scores: torch.Tensor, candidates: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The `k` best scored candidates of each row, as sorted positions (STS Eq. 7).

    Args:
        scores: (B, S) float32, float16, bfloat16 or float64, any strides; larger is better.
        candidates: (B, S) bool, the positions that may be kept (the visual tokens, say).
        k: how many to keep, 1 <= k <= S.

    Returns:
        positions (B, k) int64, ascending, and valid (B, k) bool. A row with fewer than k candidates keeps them all:
        they come first, the rest of `positions` is -1 and of `valid` False. Equal scores go to the lowest position; a
        NaN counts as the worst score. No gradient; nothing is read back to the host.

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
    """(B, S) bool: the `count[b]` best scored candidates of each row, chosen as `keep_top` does. count: (B,) int64, any
    values: a row of fewer candidates keeps them all. Sizes do not depend on it."""
    ranked = _ranked(scores, candidates)
    place = torch.arange(ranked.shape[1], device=ranked.device).expand_as(ranked)
    rank = torch.empty_like(ranked).scatter_(1, ranked, place)
    return candidates & (rank < count[:, None])


def _ranked(scores: torch.Tensor, candidates: torch.Tensor) -> torch.Tensor:
    """(B, S) int64: positions, best first, those that are no candidates last."""
    lowest = torch.finfo(scores.dtype).min
    scores = scores.detach().nan_to_num(nan=lowest, posinf=math.inf, neginf=lowest).masked_fill(~candidates, -math.inf)
    return scores.sort(dim=1, descending=True, stable=True).indices
