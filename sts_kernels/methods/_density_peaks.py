"""Density peaks clustering (DPC-KNN), used by PolyMorphic 3.2 and by SparseVLM's recycling.

Centers are dense tokens far from denser ones. Every other token joins its nearest center.
"""

import math

import torch
from torch import Tensor

from ..ops import knn_density, nearest
from ._rank import descending


def density_peaks(
    features: Tensor, clusters: int, neighbors: int | None = None, num_tokens: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Cluster centers of each item, best first, and the cluster of each token.

    D_ij = |x_i - x_j| / sqrt(C). Density rho_i = exp(-mean of D_ij^2 over the `neighbors` nearest tokens, i included).
    delta_i is the distance to the nearest strictly denser token, infinite for the densest token. The centers are the
    tokens of largest rho * delta. Ties go to the lowest index.

    Args:
        features: (B, N, C).
        clusters: 1 <= clusters <= N.
        neighbors: at least 1. None: `clusters`, as in SparseVLM's code.
        num_tokens: (B,), tokens of each item. None: N.

    Returns:
        centers (B, clusters) int64; unspecified past an item's token count. assignment (B, N) int64: the cluster, -1
        for padding. A non-finite token becomes a center only if no finite token is left; otherwise its assignment is
        -1. Bits do not depend on the batch: no float sum has a batch-dependent order.
    """
    (batch, tokens, _), device = features.shape, features.device
    present = torch.ones(batch, tokens, dtype=torch.bool, device=device)
    if num_tokens is not None:
        present = torch.arange(tokens, device=device) < num_tokens[:, None]
    usable = present & features.isfinite().all(-1)
    x, square = of_unit_spread(features, usable)
    density = knn_density(x, min(clusters if neighbors is None else neighbors, tokens), num_tokens)
    _, squared = nearest(x, x, "euclidean", -density, -density, num_keys=num_tokens)
    # log(rho * delta) up to a constant per item; +inf for the densest token.
    score = density.double().log() * square + 0.5 * squared.double().log()
    score = score.clamp(torch.finfo(score.dtype).min, torch.finfo(score.dtype).max).masked_fill(~usable, math.nan)
    centers = descending(score, present)[:, :clusters]
    rows = x.gather(1, centers[..., None].expand(-1, -1, x.shape[2]))
    count = None if num_tokens is None else num_tokens.clamp(max=clusters)
    assignment, _ = nearest(x, rows, "euclidean", num_keys=count)
    own = torch.arange(clusters, device=device).expand(batch, -1)
    return centers, assignment.scatter(1, centers, own).masked_fill(~present, -1)


def of_unit_spread(features: Tensor, usable: Tensor) -> tuple[Tensor, Tensor]:
    """Features divided by a power of two near their standard deviation, and the square of that power, (B, 1) float64.

    Without scaling, a very large or very small spread would round the density to 0 or 1 in float32. Dividing by a power
    of two does not round.
    """
    x = torch.where(usable[..., None], features, 0).double()
    count = usable.sum(1)[:, None, None].clamp(min=1)
    deviation = torch.where(usable[..., None], x - x.sum(1, keepdim=True) / count, 0)
    spread = (deviation.square().mean(-1, keepdim=True).sum(1, keepdim=True) / count).sqrt()
    largest = x.abs().amax((1, 2), keepdim=True)
    spread = spread.clamp(min=largest / 2**14)  # else a common offset would overflow float16
    scale = torch.ldexp(torch.ones_like(spread), spread.float().frexp().exponent)
    return features / scale.to(features.dtype), scale[:, 0].square()
