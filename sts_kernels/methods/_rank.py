"""Ranking of tokens by score."""

import math

import torch
from torch import Tensor


def descending(scores: Tensor, present: Tensor) -> Tensor:
    """(B, N) int64: tokens by descending score, ties by index; then tokens with a non-finite score by index.

    Absent tokens come last. `present` (B, N) must be a prefix mask: each row's first tokens.
    """
    usable = present & scores.isfinite()
    return scores.masked_fill(~usable, -math.inf).sort(dim=1, descending=True, stable=True).indices


def inverse(order: Tensor) -> Tensor:
    """(B, N) int64: rank of each token, for a permutation `order` (B, N) of the tokens."""
    rank = torch.arange(order.shape[1], device=order.device)
    return torch.empty_like(order).scatter_(1, order, rank.expand_as(order))


def first_of(mask: Tensor) -> Tensor:
    """(B,) int64: lowest index where `mask` (B, N) is True; 0 if there is none."""
    return mask.to(torch.uint8).argmax(1)
