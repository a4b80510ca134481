"""Cosines in float64, rounded to float32: the order of summation depends on the batch, and is lost in the rounding."""

import torch
from torch import Tensor


def unit(x: Tensor) -> Tensor:
    """Rows of length one; a zero row stays zero."""
    norm = x.norm(dim=-1, keepdim=True)
    return x / torch.where(norm > 0, norm, 1.0)


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """(B, M, K) float32 in [-1, 1], of unit rows (B, M, C) and (B, K, C) in float64."""
    return (a @ b.mT).float().clamp_(-1, 1)
