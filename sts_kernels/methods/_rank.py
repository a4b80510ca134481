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


def first_of(mask: Tensor) -> Tensor:
    """(B,) int64: lowest index where `mask` (B, N) is True; 0 if there is none."""
    return mask.to(torch.uint8).argmax(1)
