"""Cosines in float64, rounded to float32: the rounding hides a summation order that depends on the batch."""

import torch
from torch import Tensor


def unit(x: Tensor) -> Tensor:
    """L2-normalised rows in float64; zero rows stay zero."""
    x = x.double()
    norm = x.norm(dim=-1, keepdim=True)
    return x / torch.where(norm > 0, norm, 1.0)


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """Cosines (B, M, K) float32 in [-1, 1] of float64 unit rows (B, M, C) and (B, K, C)."""
    return (a @ b.mT).float().clamp_(-1, 1)
