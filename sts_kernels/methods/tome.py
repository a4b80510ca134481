"""ToMe: bipartite soft matching; each round merges up to half of the tokens."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..ops import nearest, scatter_mean
from ._rank import inverse
from .base import Method, Pool, Selection


@dataclass(frozen=True)
class ToMe(Method):
    """Bipartite soft matching at the encoder's output, repeated until k tokens are left.

    In each round, every token at an even position is matched with the token of most similar key at an odd position. The
    most similar pairs merge, at most half of the tokens. Rows and keys of merged tokens are means over all tokens
    merged into them.

    The paper merges r tokens in every layer of the encoder. That changes the encoder's features; a method that selects
    from the encoder's output cannot do that.
    """

    name: ClassVar[str] = "tome"
    paper: ClassVar[str] = "Token Merging: Your ViT But Faster, arXiv 2210.09461"
    signals: ClassVar[frozenset[str]] = frozenset({"keys"})
    scope: ClassVar[str] = "crop"
    merges: ClassVar[bool] = True
    nested: ClassVar[bool] = False

    def pick(self, pool: Pool) -> Selection:
        usable = pool.finite("keys")
        place, keys = torch.arange(pool.tokens, device=pool.device), pool.keys.float()
        # Usable tokens in image order, then unusable, then absent tokens.
        order = (place + pool.tokens * (2 * ~pool.present + (pool.present & ~usable))).argsort(1)
        slot = inverse(order)
        left, length = usable.sum(1), pool.tokens
        while length > pool.k:
            mean, _ = scatter_mean(keys, torch.where(usable, slot, -1), length)
            merged = torch.minimum((left - pool.k).clamp(min=0), left // 2)
            moved, survives = matching(mean, left, merged)
            left, length = left - merged, max(pool.k, (length + 1) // 2)
            stays = survives & (moved < length)
            target = torch.where(stays, moved, length)
            order = order.new_empty((pool.batch, length + 1)).scatter_(1, target, order)[:, :length]
            slot = moved.gather(1, torch.where(usable, slot, 0))
        own = order.new_full((pool.batch, pool.tokens), -1).scatter_(1, order, place[: pool.k].expand_as(order))
        return Selection(order, torch.where(usable, slot, own).masked_fill(~pool.present, -1))


def matching(keys: Tensor, left: Tensor, merged: Tensor) -> tuple[Tensor, Tensor]:
    """One round of bipartite soft matching over the first `left` (B,) rows of keys (B, L, D).

    The `merged` (B,) even rows most similar to an odd row merge into it. New order: surviving even rows, most similar
    first; then odd rows; then the rows past `left`, moved up.

    Returns:
        (B, L) int64, new index of each row (a merged row has its partner's); (B, L) bool, whether the row survives.
    """
    length = keys.shape[1]
    place = torch.arange(length, device=keys.device)
    left, merged = left[:, None], merged[:, None]
    evens = (left + 1) // 2
    partner, value = nearest(keys[:, ::2], keys[:, 1::2], num_keys=left[:, 0] // 2)
    pair = place[: partner.shape[1]]
    ranked = value.masked_fill(pair >= evens, -math.inf).sort(dim=1, descending=True, stable=True).indices
    rank = inverse(ranked)
    goes = rank < merged
    odd = evens - merged + place // 2
    moved = torch.where(place < left, odd, place - merged)
    moved[:, ::2] = torch.where(pair < evens, torch.where(goes, evens - merged + partner, rank - merged), moved[:, ::2])
    moved = torch.where(merged > 0, moved, place)
    survives = torch.ones_like(moved, dtype=torch.bool)
    survives[:, ::2] = ~(goes & (pair < evens))
    return moved, survives
