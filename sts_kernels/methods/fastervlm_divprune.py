"""FasterVLM and DivPrune: top tokens by attention first, then max-min selection among the others."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .. import _checks
from ..ops import farthest_select, farthest_select_varlen, nearest
from . import _adaptive, _packed
from ._rank import descending, inverse
from .base import Pool, Selection, option


@dataclass(frozen=True)
class FasterVLMDivPrune(_adaptive.Mixing):
    """max(1, int(k r)) tokens by [CLS] attention, then max-min selection in the distance 1 - cosine.

    An encoder without [CLS] uses the attention received. The max-min selection starts from the tokens picked by
    attention: each further pick is the token whose nearest pick is farthest. Each crop keeps its own share.

    The paper joins two separate selections of a and k - a tokens. Here the second starts from the first, so no token
    is picked twice. mixing="adaptive" or "inverse" computes r from the erank of each item, around attention_ratio.
    """

    name: ClassVar[str] = "fastervlm_divprune"
    paper: ClassVar[str] = "Sec. 4.3 of AgilePruner, arXiv 2603.01236"
    site: ClassVar[str] = "projected"
    scope: ClassVar[str] = "crop"
    nested: ClassVar[bool] = False

    attention_ratio: float = option(0.5, "share of the tokens kept by attention (r)")

    def __post_init__(self) -> None:
        super().__post_init__()
        _checks.between(self.name, "attention_ratio", self.attention_ratio, 0, 1)

    def pick(self, pool: Pool) -> Selection:
        first, attended, start = self.begin(pool)
        diverse = farthest_select(pool.features, pool.k, start=start, metric="cosine", num_tokens=pool.count)
        return Selection(joined(first, attended, diverse))

    def begin(self, pool: Pool) -> tuple[Tensor, Tensor, Tensor]:
        """Selection by attention, and the start of the max-min selection.

        Returns:
            first: (B, k), tokens by descending attention.
            attended: (B, 1), how many of `first` are kept; k if the item has at most k usable tokens.
            start: (B, N), squared distance of unit rows to the nearest attended token; -1: excluded from max-min.
        """
        usable = pool.finite("features", "scores")
        ranked, number = descending(pool.scores, usable), usable.sum(1, keepdim=True)
        if self.mixing == "fixed":
            attended = torch.full_like(number, int(pool.k * self.attention_ratio))
        else:
            attended = (pool.k * self.shares(self.attention_ratio, pool, usable)).long()[:, None]
        attended = torch.where(number > pool.k, attended.clamp(min=1), pool.k)
        first = ranked[:, : pool.k]
        row = first[..., None].expand(-1, -1, pool.features.shape[2])
        _, cosine = nearest(pool.features, pool.features.gather(1, row), num_keys=torch.minimum(attended, number)[:, 0])
        return first, attended, torch.where(usable & (inverse(ranked) >= attended), (2 - 2 * cosine).clamp(min=0), -1.0)

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
        """As `Method.select_packed`, with one call of `farthest_select_varlen` for all items."""
        device = _packed.check(self.name, self.signals, lengths, budgets, features, scores, text, keys)
        starts, slots = _packed.offsets(lengths), _packed.offsets(budgets)
        if not slots[-1]:
            return Selection(torch.empty(0, dtype=torch.int64, device=device), method=self)
        with torch.no_grad():
            begun, start = [], torch.full((starts[-1],), -1.0, device=device)
            for items, pool in _packed.pools(device, lengths, budgets, features, scores, None, None):
                first, attended, distance = self.begin(pool)
                begun.append((items, first, attended))
                for i, row in zip(items, distance, strict=True):
                    start[starts[i] : starts[i + 1]] = row
            cu_seqlens, cu_budgets = (_packed.host(values, device, torch.int32) for values in (starts, slots))
            assert features is not None  # as checked
            sizes = cu_seqlens, cu_budgets, slots[-1]
            diverse = farthest_select_varlen(features, *sizes, start=start, metric="cosine", max_seqlen=max(lengths))
            order = torch.empty_like(diverse)
            for items, first, attended in begun:
                rows = joined(first, attended, _packed.batch(diverse, items, slots, first.shape[1]))
                for i, row in zip(items, rows, strict=True):
                    order[slots[i] : slots[i + 1]] = row
        return Selection(order, method=self)


def joined(first: Tensor, attended: Tensor, diverse: Tensor) -> Tensor:
    """(B, k): the first `attended` (B, 1) entries of `first` (B, k), then the first entries of `diverse` (B, k)."""
    slot = torch.arange(first.shape[1], device=first.device)
    return torch.where(slot < attended, first, diverse.gather(1, (slot - attended).clamp(min=0)))
