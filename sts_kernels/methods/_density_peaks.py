"""Density peaks clustering (DPC-KNN), of PolyMorphic 3.2 and of SparseVLM's recycling: tokens in dense places, far from
denser ones, are centers; every other token belongs to its nearest center.
"""

import math

import torch
from torch import Tensor

from ..ops import knn_density, nearest
from ._rank import descending


def density_peaks(
    features: Tensor, clusters: int, neighbors: int | None = None, num_tokens: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Centers of each item, best first, and the cluster of each token.

    With distances D_ij = |x_i - x_j| / sqrt(C): density rho_i = exp(-mean of D^2 over the `neighbors` nearest tokens,
    itself included); delta_i is the distance to the nearest token that is strictly denser, and larger than any other
    for the densest. The centers are the tokens of largest rho * delta. Equal values go to the lowest index.

    Args:
        features: (B, N, C).
        clusters: 1 to N. neighbors: at least 1; None: `clusters`, as in SparseVLM's code.
        num_tokens: (B,), tokens of each item.

    Returns:
        centers (B, clusters) int64; past an item's own tokens they may be anything. assignment (B, N) int64: clusters,
        -1 for absent tokens and for those with a NaN or infinity that are no centers; such a token is a center only
        where no finite one is left. No float is summed in an order that depends on the batch.
    """
    (batch, tokens, _), device = features.shape, features.device
    present = torch.ones(batch, tokens, dtype=torch.bool, device=device)
    if num_tokens is not None:
        present = torch.arange(tokens, device=device) < num_tokens[:, None]
    usable = present & features.isfinite().all(-1)
    x, square = of_unit_spread(features, usable)
    density = knn_density(x, min(clusters if neighbors is None else neighbors, tokens), num_tokens)
    _, squared = nearest(x, x, "euclidean", -density, -density, num_keys=num_tokens)
    # The logarithm of rho * delta, up to a constant of the item. The densest token has no denser one: infinity.
    score = density.double().log() * square + 0.5 * squared.double().log()
    score = score.clamp(torch.finfo(score.dtype).min, torch.finfo(score.dtype).max).masked_fill(~usable, math.nan)
    centers = descending(score, present)[:, :clusters]
    rows = x.gather(1, centers[..., None].expand(-1, -1, x.shape[2]))
    count = None if num_tokens is None else num_tokens.clamp(max=clusters)
    assignment, _ = nearest(x, rows, "euclidean", num_keys=count)
    own = torch.arange(clusters, device=device).expand(batch, -1)
    return centers, assignment.scatter(1, centers, own).masked_fill(~present, -1)


def of_unit_spread(features: Tensor, usable: Tensor) -> tuple[Tensor, Tensor]:
    """Features divided by a power of two near their standard deviation, and its square (B, 1) in float64.

    A density of features that spread wide or hardly at all would round to 0 or 1 in float32. A power of two scales
    without rounding.
    """
    x = torch.where(usable[..., None], features, 0).double()
    count = usable.sum(1)[:, None, None].clamp(min=1)
    deviation = torch.where(usable[..., None], x - x.sum(1, keepdim=True) / count, 0)
    spread = (deviation.square().mean(-1, keepdim=True).sum(1, keepdim=True) / count).sqrt()
    largest = x.abs().amax((1, 2), keepdim=True)
    spread = spread.clamp(min=largest / 2**14)  # else a common offset would overflow float16
    scale = torch.ldexp(torch.ones_like(spread), spread.float().frexp().exponent)
    return features / scale.to(features.dtype), scale[:, 0].square()
