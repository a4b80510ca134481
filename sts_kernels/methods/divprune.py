"""DivPrune: max-min diversity in cosine distance."""

import math
from dataclasses import dataclass
from typing import ClassVar

from ..ops import farthest_select, nearest
from .base import Method, Pool, Selection


@dataclass(frozen=True)
class DivPrune(Method):
    """Greedy max-min selection in the distance 1 - cosine.

    The first pick is the token whose nearest neighbour is farthest (op `nearest`). Each further pick is the token whose
    nearest pick is farthest (op `farthest_select`).

    Two differences to the official code: no token is picked twice, and a zero row has cosine 0 to every other row.

    Cost: B N (2 N + 3 k) C flops in float32, and a float32 copy of the features. No N x N matrix is stored.
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
