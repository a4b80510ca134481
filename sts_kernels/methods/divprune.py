"""DivPrune: the most diverse tokens."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..ops import nearest
from ._greedy import farthest, usable_rows
from .base import Method, Pool, Selection


@dataclass(frozen=True)
class DivPrune(Method):
    """Max-min diversity of 1 - cosine: first the token whose nearest neighbour is furthest away, then the token whose
    nearest pick is furthest away.

    Two differences to the official code: a token is picked once, and a zero row has cosine 0 to every other. Cosines
    to picks are products in float64, rounded to float32: the order of summation, which depends on the batch and the
    device, is lost in the rounding, and equal tokens tie.

    Cost: 2 B N (N + k) C flops and a float64 copy of the features. Nothing N x N is stored.
    """

    name: ClassVar[str] = "divprune"
    paper: ClassVar[str] = (
        "DivPrune: Diversity-based Visual Token Pruning for Large Multimodal Models, arXiv 2503.02175"
    )
    site: ClassVar[str] = "projected"
    signals: ClassVar[frozenset[str]] = frozenset({"features"})

    def pick(self, pool: Pool) -> Selection:
        x, usable = usable_rows(pool.features, pool.present)
        x = unit(x.double())

        def distance(token):
            picked = x.gather(1, token[:, None, None].expand(-1, 1, x.shape[2]))
            return 1 - cosine(x, picked)[..., 0]

        _, largest = nearest(pool.features, pool.features, exclude_self=True, num_keys=pool.count)
        loneliest = largest.masked_fill(~usable, math.inf).argmin(1)
        return Selection(farthest(distance, loneliest, usable, pool.k))


def unit(x: Tensor) -> Tensor:
    """Rows of length one; a zero row stays zero."""
    norm = x.norm(dim=-1, keepdim=True)
    return x / torch.where(norm > 0, norm, 1.0)


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """(B, M, K) float32 in [-1, 1]: cosines of unit rows (B, M, C) and (B, K, C) in float64."""
    return (a @ b.mT).float().clamp_(-1, 1)
