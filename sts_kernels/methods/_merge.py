"""Rows of the kept tokens, and means of the tokens merged into them."""

from typing import Any

import torch
from torch import Tensor

from ..ops.scatter_mean import scatter_mean


def rows(features: Tensor, order: Tensor) -> Tensor:
    """Gathers features (B, N, C) at order (B, k): (B, k, C), zero rows at -1."""
    picked = features.gather(1, order.clamp(min=0)[..., None].expand(-1, -1, features.shape[2]))
    return torch.where((order >= 0)[..., None], picked, 0)


def weighted_mean(features: Tensor, order: Tensor, assignment: Tensor | None, weight: Tensor | None) -> Tensor:
    """(B, k, C) in the dtype of `features`: weighted mean of the tokens assigned to each slot.

    A slot of total weight 0 gets its kept token's row. Tokens with a NaN or infinity are left out of the means.
    """
    kept = rows(features, order)
    if assignment is None:
        return kept
    mean, mass = scatter_mean(features, assignment, order.shape[1], weight)
    return torch.where(((order >= 0) & (mass > 0))[..., None], mean, kept)


def others(features: Tensor, selection: Any) -> Tensor:
    """(B, k, C) float32: weighted mean of the tokens merged into each slot, the kept token excluded.

    Zero for slots without merged tokens and for unused slots.
    """
    order, k = selection.order, selection.order.shape[1]
    tokens = features.shape[1]
    kept = order.new_zeros((order.shape[0], tokens + 1), dtype=torch.bool)  # +1 column: unused slots write there
    kept = kept.scatter_(1, torch.where(order < 0, tokens, order), True)[:, :tokens]
    mean, _ = scatter_mean(features.float(), selection.assignment.masked_fill(kept, -1), k, selection.weight)
    return torch.where((order >= 0)[..., None], mean, 0)
