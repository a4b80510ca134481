"""FasterVLM and DivPrune: attended tokens first, then the most diverse of the others."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from ..ops import farthest_select, nearest
from . import _adaptive
from ._rank import descending
from .base import Pool, Selection, option


@dataclass(frozen=True)
class FasterVLMDivPrune(_adaptive.Mixing):
    """int(k r) tokens of largest [CLS] attention (attention received where an encoder has no [CLS]), at least one; then
    the token whose nearest pick, those by attention among them, is furthest away in 1 - cosine. Each crop keeps its own
    share.

    The paper takes two separate selections of a and k - a tokens together. Here the second starts from the first, so
    no token comes twice. mixing="adaptive" or "inverse" takes r from the erank of each item, around attention_ratio.
    """

    name: ClassVar[str] = "fastervlm_divprune"
    paper: ClassVar[str] = "Sec. 4.3 of AgilePruner, arXiv 2603.01236"
    site: ClassVar[str] = "projected"
    scope: ClassVar[str] = "crop"
    nested: ClassVar[bool] = False

    attention_ratio: float = option(0.5, "share of the tokens kept by attention (r)")

    def __post_init__(self):
        super().__post_init__()
        _adaptive.share(self.name, "attention_ratio", self.attention_ratio)

    def pick(self, pool: Pool) -> Selection:
        usable = pool.finite("features", "scores")
        ranked, number = descending(pool.scores, usable), usable.sum(1, keepdim=True)
        if self.mixing == "fixed":
            attended = torch.full_like(number, int(pool.k * self.attention_ratio))
        else:
            attended = (pool.k * self.shares(self.attention_ratio, pool, usable)).long()[:, None]
        attended = attended.clamp(min=1)
        first = ranked[:, : pool.k]
        row = first[..., None].expand(-1, -1, pool.features.shape[2])
        _, cosine = nearest(pool.features, pool.features.gather(1, row), num_keys=torch.minimum(attended, number)[:, 0])
        # Squared distances of unit rows, as the op's own; a negative one marks what is kept already.
        place = torch.arange(pool.tokens, device=pool.device)
        rank = torch.empty_like(ranked).scatter_(1, ranked, place.expand_as(ranked))
        start = torch.where(usable & (rank >= attended), (2 - 2 * cosine).clamp(min=0), -1.0)
        diverse = farthest_select(pool.features, pool.k, start=start, metric="cosine", num_tokens=pool.count)
        slot = place[: pool.k]
        order = torch.where(slot < attended, first, diverse.gather(1, (slot - attended).clamp(min=0)))
        return Selection(torch.where(number > pool.k, order, first))
