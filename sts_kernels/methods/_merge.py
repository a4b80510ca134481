"""Rows of the tokens kept, with the tokens merged into them."""

import torch
from torch import Tensor

from ..ops import scatter_mean


def rows(features: Tensor, order: Tensor) -> Tensor:
    """(B, k, C): the rows of features (B, N, C) at order (B, k), zero at -1."""
    picked = features.gather(1, order.clamp(min=0)[..., None].expand(-1, -1, features.shape[2]))
    return torch.where((order >= 0)[..., None], picked, 0)


def weighted_mean(features: Tensor, order: Tensor, assignment: Tensor | None, weight: Tensor | None) -> Tensor:
    """(B, k, C) in the dtype of `features`: the weighted mean of the tokens assigned to each slot; the kept row where
    nothing of weight is. A token with a NaN or infinity is merged into nothing.

    One product with the one-hot matrix of the assignment, (B, k, N), accumulated in float64: the order of summation,
    which depends on the batch and the device, is lost when the mean is rounded to float32.
    """
    kept = rows(features, order)
    if assignment is None:
        return kept
    share, mass = slot_sums(features, order.shape[1], assignment, weight)
    mean = (share / mass.clamp(min=torch.finfo(torch.float64).tiny)[..., None]).float().to(features.dtype)
    return torch.where(((order >= 0) & (mass > 0))[..., None], mean, kept)


def slot_sums(features: Tensor, k: int, assignment: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor]:
    """Weighted sums (B, k, C) and weights (B, k) of the finite tokens of each slot, in float64."""
    finite = features.isfinite().all(-1)
    one_hot = (assignment[:, None] == torch.arange(k, device=features.device)[:, None]) & finite[:, None]
    one_hot = one_hot.double() if weight is None else torch.where(one_hot, weight.double()[:, None], 0.0)
    return one_hot @ torch.where(finite[..., None], features, 0).double(), one_hot.sum(-1)


def others(features: Tensor, selection) -> Tensor:
    """(B, k, C) float32: of each slot the weighted mean of the tokens merged into the kept one, which does not count;
    zero where there are none, or the slot is not used."""
    order, k = selection.order, selection.order.shape[1]
    tokens = features.shape[1]
    kept = order.new_zeros((order.shape[0], tokens + 1), dtype=torch.bool)  # one more, for slots that are not used
    kept = kept.scatter_(1, torch.where(order < 0, tokens, order), True)[:, :tokens]
    mean, _ = scatter_mean(features.float(), selection.assignment.masked_fill(kept, -1), k, selection.weight)
    return torch.where((order >= 0)[..., None], mean, 0)
