"""LLaVA-PruMerge: the tokens that the vision encoder attends to, each with its neighbours merged into it."""

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
from ._rank import descending
from .base import Method, Pool, Selection, option

BLOCK = 1 << 24  # cosines at a time: 128 MiB in float64


@dataclass(frozen=True)
class PruMerge(Method):
    """k - 1 tokens of largest [CLS] attention a, each plus the sum of a_j x_j over the `neighbours` tokens most similar
    to it by key, picked or not; and one row for all others, the sum of a_j x_j over them. Attention and keys are those
    of the encoder's last layer with all heads as one. The sums are not divided, as in the official code.

    With plus=True (PruMerge+) a quarter of the tokens is by attention, and the others are evenly spread over the tokens
    left. The official number of tokens depends on the image; here it is k, the row of all others included. That row has
    the place of the first token that is not picked. An item that keeps all its tokens stays as it is.
    """

    name: ClassVar[str] = "prumerge"
    paper: ClassVar[str] = (
        "LLaVA-PruMerge: Adaptive Token Reduction for Efficient Large Multimodal Models, arXiv 2403.15388"
    )
    signals: ClassVar[frozenset[str]] = frozenset({"attention", "keys"})
    encoder_attention: ClassVar[str] = "last"
    scope: ClassVar[str] = "crop"
    nested: ClassVar[bool] = False

    plus: bool = option(False, "PruMerge+: three quarters of the tokens evenly spread")
    neighbours: int = option(32, "tokens merged into each one that is picked")

    def __post_init__(self) -> None:
        if not isinstance(self.plus, bool):
            raise TypeError(f"{self.name}: plus must be True or False, got {self.plus!r}")
        _checks.integer(self.name, "neighbours", self.neighbours, 1)

    def pick(self, pool: Pool) -> Selection:
        usable = pool.finite("scores", "keys")
        ranked, number = descending(pool.scores, usable), usable.sum(1, keepdim=True)
        place = torch.arange(pool.tokens, device=pool.device)
        rank = torch.empty_like(ranked).scatter_(1, ranked, place.expand_as(ranked))
        kept = number.clamp(max=pool.k)
        # The last row is of all others, where there are others.
        picks = torch.where((kept > 1) & (number > kept), kept - 1, kept)
        best = (picks + 2) // 4 if self.plus else picks  # by attention, rounded half up
        best = torch.where(picks > 0, best.clamp(min=1), 0)
        left = usable & (rank >= best)
        index, many, spread = left.cumsum(1) - 1, number - best, picks - best
        # The i-th of the tokens left is the j-th of the even ones where i = floor(j many / spread).
        turn = (index * spread + many - 1) // many.clamp(min=1)
        even = left & (turn < spread) & (turn * many // spread.clamp(min=1) == index)
        slot = torch.where(rank < best, rank, best + turn)
        picked = (usable & (rank < best)) | even
        others = usable & ~picked
        first = others & (others.cumsum(1) == 1) & (picks < kept)  # its place is that of the row of all others
        slot = torch.where(first, picks, slot)
        order = torch.cat([ranked[:, : pool.k], ranked[:, :1]], 1)  # one slot more, for tokens that take none
        order = order.scatter_(1, torch.where(picked | first, slot, pool.k), place.expand_as(slot))[:, : pool.k]
        merges = number > kept
        return self.around(pool, order, torch.where(picks < kept, picks, -1), usable, merges)

    def around(self, pool: Pool, order: Tensor, behind: Tensor, usable: Tensor, merges: Tensor) -> Selection:
        """What is merged into the tokens of `order`. merges: (B, 1), whether anything is. behind: (B, 1), the slot of
        all others, -1: there is none. Picks stand before it, tokens that are not usable after it. Its first source is
        its own token."""
        slots, tokens = torch.arange(pool.k, device=order.device), pool.tokens
        own = order.new_full((pool.batch, tokens + 1), -1).scatter_(1, order, slots.expand_as(order))[:, :tokens]
        assignment = torch.where(usable & (own < 0), behind, own).masked_fill(~pool.present, -1)
        near = self.nearby(pool, order, usable)
        near = torch.where(((slots == behind) | ~merges)[..., None], -1, near)
        near[..., 0] = torch.where(slots == behind, order, near[..., 0])
        return Selection(order, assignment, torch.where(usable, pool.scores, 0).float(), near)

    def nearby(self, pool: Pool, order: Tensor, usable: Tensor) -> Tensor:
        """(B, k, neighbours) int64: the usable tokens most similar to each slot's own, -1 where there are fewer."""
        x = unit(torch.where(usable[..., None], pool.keys, 0).double())
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
        assert sources is not None  # these three as `pick` makes them
        assert weight is not None
        assert selection.assignment is not None
        finite = features.isfinite().all(-1)
        x = torch.where(finite[..., None], features, 0).double() * weight.double()[..., None]
        near = torch.zeros_like(x[:, :1])
        for column in sources.unbind(-1):  # in one order, whatever the batch
            near = near + _merge.rows(x, column)
        mean, mass = scatter_mean(features.float(), selection.assignment, order.shape[1], weight)
        all_others = ((sources[..., 0] == order) & (order >= 0))[..., None]
        rows = torch.where(all_others, mean.double() * mass[..., None], _merge.rows(features, order).double() + near)
        return rows.float().to(features.dtype)
