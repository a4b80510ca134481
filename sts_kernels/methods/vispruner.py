"""VisPruner: top tokens by [CLS] attention, then the others with near-duplicates removed in rounds."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .. import _checks
from ..ops import dedup_select
from . import _adaptive
from ._cosine import cosine, unit
from ._rank import descending
from .base import Pool, Selection, option

STEP = 8  # max tokens removed per round


@dataclass(frozen=True)
class VisPruner(_adaptive.Mixing):
    """int(k r) tokens by [CLS] attention; near-duplicates are removed from the others until k tokens are left.

    An encoder without [CLS] uses the attention received. Duplicates are removed in rounds over a list of the others,
    ordered by attention. Each token at an even list position is matched with the most similar token at an odd one. The
    8 tokens at even positions with the largest similarity are removed. Each crop keeps its own share, as in the
    official code.

    The official code cannot run rounds on an odd or a short list; here they remove as many tokens as there are. The
    diverse picks depend on the last bits of the cosines.

    mixing="adaptive" or "inverse" (AdaVTP 4.3) computes r from the erank of each item, around important_ratio. Its
    cosines are computed in float64 and rounded to float32.
    """

    name: ClassVar[str] = "vispruner"
    paper: ClassVar[str] = (
        "Beyond Text-Visual Attention: Exploiting Visual Cues for Effective Token Pruning in VLMs, arXiv 2412.01818"
    )
    scope: ClassVar[str] = "crop"
    nested: ClassVar[bool] = False

    important_ratio: float = option(0.5, "share of the tokens kept by attention (r)")

    def __post_init__(self) -> None:
        super().__post_init__()
        _checks.between(self.name, "important_ratio", self.important_ratio, 0, 1)

    def pick(self, pool: Pool) -> Selection:
        usable = pool.finite("features", "scores")
        if pool.k == pool.tokens:
            return Selection(descending(pool.scores, usable))
        ranked, number = descending(pool.scores, usable), usable.sum(1, keepdim=True)
        place = torch.arange(pool.tokens, device=pool.device)
        listed = ranked.masked_fill(place >= number, -1)
        if self.mixing == "fixed":
            most = int(pool.k * self.important_ratio)
            order = ranked[:, :most]
            if most < pool.k:
                diverse = dedup_select(pool.features, listed[:, most:], pool.k - most, STEP)
                order = torch.cat([order, diverse], 1)
        else:
            important = (pool.k * self.shares(self.important_ratio, pool, usable)).long()[:, None]
            order = mixed(pool.features, listed, important, pool.k)
        return Selection(torch.where(number > pool.k, order, ranked[:, : pool.k]))


def mixed(features: Tensor, listed: Tensor, important: Tensor, k: int) -> Tensor:
    """(B, k) int64: the first `important` (B, 1) tokens of each list, then the survivors of `dedup_select`'s rounds.

    Unlike `dedup_select`, `important` may differ between items. listed: (B, N), -1 past the item's tokens. The caller
    discards the result of items with at most k tokens.
    """
    tokens = listed.shape[1]
    place = torch.arange(tokens, device=listed.device)
    x = torch.where((listed >= 0)[..., None], features.gather(1, listed.clamp(min=0)[..., None].expand_as(features)), 0)
    similarity = unit(x)
    similarity = cosine(similarity, similarity)  # indexed by list position
    left, keep = (listed >= 0).sum(1, keepdim=True) - important, k - important
    rest = (place + important).clamp(max=tokens - 1)
    half = (tokens + 1) // 2
    pair = place[:half]
    # A list of at least 16 tokens loses STEP per round, a shorter one half of its tokens: 15, 7, 3, 1.
    for _ in range((tokens - k + STEP - 1) // STEP + 4):
        even, odd = rest[:, ::2], rest[:, 1::2]
        evens, odds = (left + 1) // 2, left // 2
        met = similarity.gather(1, even[..., None].expand(-1, -1, tokens))
        met = met.gather(2, odd[:, None].expand(-1, half, -1)).masked_fill_((pair[: odd.shape[1]] >= odds)[:, None], -2)
        by_closest = met.amax(-1).masked_fill(pair >= evens, -3).sort(dim=1, descending=True, stable=True).indices
        remove = torch.minimum(left - keep, evens).clamp(0, STEP)
        survivors = even.gather(1, by_closest)
        stay = torch.where(
            place < evens - remove,
            survivors.gather(1, (place + remove).clamp(max=half - 1)),
            odd.gather(1, (place - evens + remove).clamp(0, odd.shape[1] - 1)),
        )
        rest = torch.where(remove > 0, stay, rest)
        left = left - remove
    slot = place[:k]
    chosen = torch.where(slot < important, slot, rest.gather(1, (slot - important).clamp(min=0)))
    return listed.gather(1, chosen)
