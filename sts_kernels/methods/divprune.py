"""DivPrune: the most diverse tokens."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..ops import farthest_select, nearest
from .base import Method, Pool, Selection


@dataclass(frozen=True)
class DivPrune(Method):
    """Max-min diversity of 1 - cosine: first the token whose nearest neighbour is furthest away (the op `nearest`),
    then the token whose nearest pick is furthest away (`farthest_select`).

    Two differences to the official code: a token is picked once, and a zero row has cosine 0 to every other.

    Cost: B N (2 N + 3 k) C flops in float32, and a float32 copy of the features. Nothing N x N is stored.
    """

    name: ClassVar[str] = "divprune"
    paper: ClassVar[str] = (
        "DivPrune: Diversity-based Visual Token Pruning for Large Multimodal Models, arXiv 2503.02175"
    )
    site: ClassVar[str] = "projected"
    signals: ClassVar[frozenset[str]] = frozenset({"features"})

    def pick(self, pool: Pool) -> Selection:
        x = pool.features
        usable = pool.present & x.isfinite().all(-1)
        _, largest = nearest(x, x, exclude_self=True, num_keys=pool.count)
        loneliest = largest.masked_fill(~usable, math.inf).argmin(1)
        return Selection(farthest_select(x, pool.k, loneliest, metric="cosine", num_tokens=pool.count))


def unit(x: Tensor) -> Tensor:
    """Rows of length one; a zero row stays zero."""
    norm = x.norm(dim=-1, keepdim=True)
    return x / torch.where(norm > 0, norm, 1.0)


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """(B, M, K) float32 in [-1, 1]: cosines of unit rows (B, M, C) and (B, K, C) in float64."""
    return (a @ b.mT).float().clamp_(-1, 1)
