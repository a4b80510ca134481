"""LLaVA-PruMerge: top tokens by [CLS] attention, each merged with its nearest neighbours."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from .. import _checks
from ..ops import scatter_mean
from . import _merge
from ._cosine import cosine, unit
from ._rank import descending, inverse
from .base import Method, Pool, Selection, option

BLOCK = 1 << 24  # max cosines computed at once: 128 MiB in float64


@dataclass(frozen=True)
class PruMerge(Method):
    """k - 1 tokens of largest [CLS] attention, plus one row for all other tokens.

    With attention a and features x, the row of a picked token is x_i + sum of a_j x_j over the `neighbours` tokens
    whose keys are most similar to its own, picked or not. The last row is the sum of a_j x_j over all tokens that are
    not picked. Attention and keys are those of the encoder's last layer, all heads as one. The sums are not normalised,
    as in the official code.

    plus=True (PruMerge+): a quarter of the tokens is picked by attention; the others are evenly spread over the
    remaining tokens. The official number of tokens depends on the image; here it is k, including the last row. That row
    takes the position of the first token that is not picked. An item that keeps all its tokens is unchanged.
    """

    name: ClassVar[str] = "prumerge"
    paper: ClassVar[str] = (
        "LLaVA-PruMerge: Adaptive Token Reduction for Efficient Large Multimodal Models, arXiv 2403.15388"
    )
    signals: ClassVar[frozenset[str]] = frozenset({"attention", "keys"})
    encoder_attention: ClassVar[str] = "last"
    scope: ClassVar[str] = "crop"
    merges: ClassVar[bool] = True
    nested: ClassVar[bool] = False

    plus: bool = option(False, "PruMerge+: three quarters of the tokens evenly spread")
    neighbours: int = option(32, "tokens merged into each one that is picked")

    def __post_init__(self) -> None:
        _checks.flag(self.name, "plus", self.plus)
        _checks.integer(self.name, "neighbours", self.neighbours, 1)

    def pick(self, pool: Pool) -> Selection:
        usable = pool.finite("scores", "keys")
        ranked, number = descending(pool.scores, usable), usable.sum(1, keepdim=True)
        place = torch.arange(pool.tokens, device=pool.device)
        rank = inverse(ranked)
        kept = number.clamp(max=pool.k)
        # One slot is reserved for the row of all others, if there are others and more than one slot.
        picks = torch.where((kept > 1) & (number > kept), kept - 1, kept)
        best = (picks + 2) // 4 if self.plus else picks  # by attention, rounded half up
        best = torch.where(picks > 0, best.clamp(min=1), 0)
        left = usable & (rank >= best)
        index, many, spread = left.cumsum(1) - 1, number - best, picks - best
        # The j-th of `spread` evenly spaced tokens has index floor(j many / spread) among the `many` tokens left.
        turn = (index * spread + many - 1) // many.clamp(min=1)
        even = left & (turn < spread) & (turn * many // spread.clamp(min=1) == index)
        slot = torch.where(rank < best, rank, best + turn)
        picked = (usable & (rank < best)) | even
        others = usable & ~picked
        first = others & (others.cumsum(1) == 1) & (picks < kept)  # position of the row of all others
        slot = torch.where(first, picks, slot)
        order = torch.cat([ranked[:, : pool.k], ranked[:, :1]], 1)  # +1 slot: tokens without a slot write there
        order = order.scatter_(1, torch.where(picked | first, slot, pool.k), place.expand_as(slot))[:, : pool.k]
        merges = number > kept
        return self.around(pool, order, torch.where(picks < kept, picks, -1), usable, merges)

    def around(self, pool: Pool, order: Tensor, behind: Tensor, usable: Tensor, merges: Tensor) -> Selection:
        """The Selection of `order`, with assignment, weight and sources.

        merges: (B, 1) bool, whether the item merges at all. behind: (B, 1), slot of the row of all others, -1: none.
        Picks are in the slots before it, unusable tokens in the slots after it. The first source of slot `behind` is
        its own token; `merge` recognises the slot by that.
        """
        slots, tokens = torch.arange(pool.k, device=order.device), pool.tokens
        own = order.new_full((pool.batch, tokens + 1), -1).scatter_(1, order, slots.expand_as(order))[:, :tokens]
        assignment = torch.where(usable & (own < 0), behind, own).masked_fill(~pool.present, -1)
        near = self.nearby(pool, order, usable)
        near = torch.where(((slots == behind) | ~merges)[..., None], -1, near)
        near[..., 0] = torch.where(slots == behind, order, near[..., 0])
        return Selection(order, assignment, torch.where(usable, pool.scores, 0).float(), near)

    def nearby(self, pool: Pool, order: Tensor, usable: Tensor) -> Tensor:
        """(B, k, neighbours) int64: usable tokens most similar by key to each slot's token; -1 past their number."""
        x = unit(torch.where(usable[..., None], pool.keys, 0))
        position = torch.arange(pool.tokens, device=pool.device)
        near, step = [], max(1, BLOCK // max(1, pool.batch * pool.tokens))
        for part in order.split(step, 1):
            allowed = usable[:, None] & (part[..., None] != position) & usable.gather(1, part)[..., None]
            value = cosine(_merge.rows(x, part), x).masked_fill_(~allowed, -math.inf)
            value, index = value.sort(dim=-1, descending=True, stable=True)
            value, index = value[..., : self.neighbours], index[..., : self.neighbours]
            index = index.masked_fill(value == -math.inf, -1)
            near.append(pad(index, (0, self.neighbours - index.shape[2]), value=-1))
        return torch.cat(near, 1)

    def merge(self, features: Tensor, selection: Selection) -> Tensor:
        order, sources, weight = selection.order, selection.sources, selection.weight
        assert sources is not None  # `pick` sets sources, weight and assignment
        assert weight is not None
        assert selection.assignment is not None
        finite = features.isfinite().all(-1)
        x = torch.where(finite[..., None], features, 0).double() * weight.double()[..., None]
        near = torch.zeros_like(x[:, :1])
        for column in sources.unbind(-1):  # fixed summation order: bits do not depend on the batch
            near = near + _merge.rows(x, column)
        mean, mass = scatter_mean(features.float(), selection.assignment, order.shape[1], weight)
        all_others = ((sources[..., 0] == order) & (order >= 0))[..., None]
        rows = torch.where(all_others, mean.double() * mass[..., None], _merge.rows(features, order).double() + near)
        return rows.float().to(features.dtype)
