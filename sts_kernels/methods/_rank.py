"""Rankings: of all tokens, best first."""

import math

import torch
from torch import Tensor


def descending(scores: Tensor, present: Tensor) -> Tensor:
    """(B, N) int64: tokens by descending score; equal scores by index; then those whose score is NaN or infinite by
    index; absent tokens last. `present` marks the first tokens of each row."""
    usable = present & scores.isfinite()
    return scores.masked_fill(~usable, -math.inf).sort(dim=1, descending=True, stable=True).indices


def first_of(mask: Tensor) -> Tensor:
    """(B,) int64: the lowest index that `mask` (B, N) marks, 0 where it marks none."""
    return mask.to(torch.uint8).argmax(1)
