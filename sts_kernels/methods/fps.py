"""Farthest point sampling."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from .. import _checks
from ..ops import farthest_select
from ._rank import first_of
from .base import Method, Pool, Selection, option


@dataclass(frozen=True)
class FPS(Method):
    """Farthest point sampling in squared Euclidean distance (op `farthest_select`).

    The first pick is `anchor`. Each further pick is the token whose nearest pick is farthest.

    Cost: 3 B k N C flops in float32.
    """

    name: ClassVar[str] = "fps"
    paper: ClassVar[str] = "FPSPruner, App. C of AgilePruner, arXiv 2603.01236"
    signals: ClassVar[frozenset[str]] = frozenset({"features"})

    anchor: int = option(0, "first pick; an item that lacks this token starts at its lowest finite one")

    def __post_init__(self) -> None:
        _checks.integer(self.name, "anchor", self.anchor, 0)

    def pick(self, pool: Pool) -> Selection:
        usable = pool.present & pool.features.isfinite().all(-1)
        token = self.anchor if self.anchor < pool.tokens else 0
        first = torch.where(usable[:, token], token, first_of(usable))
        return Selection(farthest_select(pool.features, pool.k, anchor=first, num_tokens=pool.count))
