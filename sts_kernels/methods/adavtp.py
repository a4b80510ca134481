"""AdaVTP: top tokens by attention with similarity suppression, stronger in complex images and at later ranks."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from .. import _checks
from ..ops import suppress_select, suppress_select_varlen
from . import _adaptive, _packed
from ._rank import descending, inverse
from .base import Pool, Selection, option

SLOPE = 0.01  # increase of tau per rank (Eq. 6)
SPACES = ("projected", "encoder")


@dataclass(frozen=True)
class AdaVTP(_adaptive.Adaptive):
    """Greedy selection by attention with suppression of similar tokens.

    Tokens are visited by descending [CLS] attention (attention received if the encoder has no [CLS]). Each token that
    is not suppressed is picked. A pick suppresses all remaining tokens within cosine distance
    tau = min(0.01 rank erank / erank_avg, tau_max) of it; the best rank is 1. If no other token is left, suppressed
    tokens are picked by attention. Each crop keeps its own share.

    The paper leaves three points open. Here ranks count all tokens, not only picks. The defaults of tau_max and
    erank_avg are for LLaVA-1.5. The erank is taken of the features that the distances are taken of.

    count="adaptive" (App. B.5) keeps round(k clip(erank / erank_avg, 0.8, 1.2)) tokens of an item. `select` then has
    1.2 k slots, -1 past each item's count; `fit_budgets` reads the counts back for `select_packed`.
    """

    name: ClassVar[str] = "adavtp"
    paper: ClassVar[str] = "AgilePruner: Attention and Diversity for Adaptive Visual Token Pruning, arXiv 2603.01236"
    site: ClassVar[str] = "projected"
    scope: ClassVar[str] = "crop"

    tau_max: float = option(0.25, "largest cosine distance at which a pick removes tokens")
    space: str = option("projected", "whose features: those that the LLM gets, or those of the encoder")
    count: str = option("fixed", "tokens of an image: fixed, or adaptive (more where it is complex)")

    def __post_init__(self) -> None:
        super().__post_init__()
        _checks.between(self.name, "tau_max", self.tau_max, 0, 2)
        _checks.one_of(self.name, "space", self.space, SPACES)
        _checks.one_of(self.name, "count", self.count, ("fixed", "adaptive"))
        object.__setattr__(self, "site", self.space)
        object.__setattr__(self, "adaptive", self.count == "adaptive")

    def widest(self, k: int) -> int:
        return _adaptive.widest_count(k)

    def counts(self, pool: Pool) -> Tensor:
        complexity = self.measure(pool, pool.finite("features", "scores"))
        return _adaptive.counts_of(complexity, self.erank_avg, pool.k)

    def walk(self, pool: Pool) -> tuple[Tensor, Tensor]:
        """Rank (B, N) int64, 0-based, -1 for unusable tokens; tau (B, N) float32."""
        usable = pool.finite("features", "scores")
        rank = inverse(descending(pool.scores, usable))
        slope = SLOPE * self.measure(pool, usable).double() / self.erank_avg
        tau = ((rank + 1) * slope[:, None]).clamp(max=self.tau_max).float()
        return rank.masked_fill(~usable, -1), tau

    def pick(self, pool: Pool) -> Selection:
        return Selection(suppress_select(pool.features, *self.walk(pool), pool.k, pool.count))

    def select_packed(
        self,
        lengths: list[int],
        budgets: list[int],
        *,
        features: Tensor | None = None,
        scores: Tensor | None = None,
        text: Tensor | None = None,
        keys: Tensor | None = None,
    ) -> Selection:
        """As `Method.select_packed`, with one call of `suppress_select_varlen` for all items."""
        device = _packed.check(self.name, self.signals, lengths, budgets, features, scores, text, keys)
        assert features is not None  # as checked
        total = sum(budgets)
        if not total:
            return Selection(torch.empty(0, dtype=torch.int64, device=device), method=self)
        with torch.no_grad():
            parts: list[Any] = [None] * len(lengths)
            for items, pool in _packed.pools(device, lengths, lengths, features, scores, None, None):
                for i, *part in zip(items, *self.walk(pool), strict=True):
                    parts[i] = part
            rank, tau = (torch.cat(column) for column in zip(*filter(None, parts), strict=True))
            seqlens, slots = (
                _packed.host(_packed.offsets(values), device, torch.int32) for values in (lengths, budgets)
            )
            order = suppress_select_varlen(features, rank, tau, seqlens, slots, total, max_seqlen=max(lengths))
            return Selection(order, method=self)
