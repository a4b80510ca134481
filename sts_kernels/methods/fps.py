"""Farthest point sampling."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from .. import _checks
from ._greedy import farthest, usable_rows
from .base import Method, Pool, Selection, option


@dataclass(frozen=True)
class FPS(Method):
    """From `anchor` on, the token whose nearest pick is furthest away, in squared Euclidean distance.

    Cost: 3 B k N C flops in float32, k reads of the features.
    """

    name: ClassVar[str] = "fps"
    paper: ClassVar[str] = "FPSPruner, App. C of AgilePruner, arXiv 2603.01236"
    signals: ClassVar[frozenset[str]] = frozenset({"features"})

    anchor: int = option(0, "first pick; an item that lacks this token starts at its lowest finite one")

    def __post_init__(self):
        _checks.integer(self.name, "anchor", self.anchor, 0)

    def pick(self, pool: Pool) -> Selection:
        x, usable = usable_rows(pool.features, pool.present)

        def distance(token):
            centre = x.gather(1, token[:, None, None].expand(-1, 1, x.shape[2]))
            return (x - centre).square_().sum(-1)

        first = torch.full((pool.batch,), self.anchor if self.anchor < pool.tokens else 0, device=pool.device)
        return Selection(farthest(distance, first, usable, pool.k))
