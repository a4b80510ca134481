"""Max-min greedy selection: farthest point sampling under any distance."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ._rank import first_of

LAST_RESORT = -1.0  # below every distance: tokens with a NaN or infinity


def farthest(distance: Callable[[Tensor], Tensor], first: Tensor, usable: Tensor, k: int) -> Tensor:
    """(B, k) int64: from `first` on, the token whose nearest pick is furthest away; the lowest index among equals.

    Args:
        distance: of (B,) tokens to all: (B, N) float32, at least 0. No NaN.
        first: (B,) int64. Where it is not usable, the lowest usable token is first.
        usable: (B, N) bool, present tokens without a NaN or infinity. The others come last, by index, so that padding
            comes after all that is present.
    """
    order = torch.empty((usable.shape[0], k), dtype=torch.int64, device=usable.device)
    token = torch.where(usable.gather(1, first[:, None])[:, 0], first, first_of(usable))
    nearest = torch.full(usable.shape, math.inf, device=usable.device)
    taken = torch.zeros_like(usable)
    for step in range(k):
        order[:, step] = token
        own = token[:, None]
        nearest = torch.minimum(nearest, distance(token))
        taken = taken.scatter(1, own, True)
        token = torch.where(usable, nearest, LAST_RESORT).masked_fill(taken, -math.inf).argmax(1)
    return order


def usable_rows(features: Tensor, present: Tensor) -> tuple[Tensor, Tensor]:
    """Features (B, N, C) in float32, and usable (B, N): present, no NaN or infinity. Rows of the others are zero."""
    usable = present & features.isfinite().all(-1)
    return torch.where(usable[..., None], features, 0).float().contiguous(), usable
