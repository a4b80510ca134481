"""VisionZip: top tokens by [CLS] attention, and a few contextual tokens that all others are merged into."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from .. import _checks
from ..ops import nearest
from . import _merge
from ._rank import descending, inverse
from .base import Method, Pool, Selection, option


@dataclass(frozen=True)
class VisionZip(Method):
    """Keeps dominant tokens unchanged and merges the rest into evenly spaced contextual tokens.

    Dominant tokens have the largest [CLS] attention (attention received if the encoder has no [CLS]). Contextual tokens
    are every step-th token of the rest. Each other token of the rest joins the contextual token with the most similar
    key. A contextual row is the token plus the mean of the tokens that joined it (a sum, not a mean), as in the
    official code.

    k tokens are split as dominant : contextual, rounded half up. Each crop keeps its own share.
    """

    name: ClassVar[str] = "visionzip"
    paper: ClassVar[str] = "VisionZip: Longer is Better but Not Necessary in Vision Language Models, arXiv 2412.04467"
    signals: ClassVar[frozenset[str]] = frozenset({"attention", "keys"})
    scope: ClassVar[str] = "crop"
    merges: ClassVar[bool] = True
    nested: ClassVar[bool] = False

    dominant: int = option(54, "part of the tokens kept as they are, against contextual")
    contextual: int = option(10, "part of the tokens that others are merged into, against dominant")

    def __post_init__(self) -> None:
        for name in ("dominant", "contextual"):
            _checks.integer(self.name, name, getattr(self, name), 0)
        if not self.dominant + self.contextual:
            raise ValueError(f"{self.name}: dominant and contextual must not both be 0")

    def pick(self, pool: Pool) -> Selection:
        usable = pool.finite("scores", "keys")
        ranked = descending(pool.scores, usable)
        place = torch.arange(pool.tokens, device=pool.device)
        rank = inverse(ranked)
        number = usable.sum(1, keepdim=True)
        kept = number.clamp(max=pool.k)  # slots filled by usable tokens
        dominant = self.dominant_of(kept)
        contextual = kept - dominant

        # Token i of the rest, in image order, is a contextual token (target) if i is a multiple of step.
        rest = usable & (rank >= dominant)
        index = rest.cumsum(1) - 1
        step = ((number - dominant) // contextual.clamp(min=1)).clamp(min=1)
        target = rest & (index % step == 0) & (index // step < contextual)
        slot = torch.where(target, dominant + index // step, rank)  # valid for kept tokens only

        # Targets overwrite the slots past `dominant`. +1 slot: all other tokens write there.
        order = torch.cat([ranked[:, : pool.k], ranked[:, :1]], 1)
        order = order.scatter_(1, torch.where(target, slot, pool.k), place.expand_as(slot))[:, : pool.k]
        joined = torch.full_like(rank, -1)
        if (most := pool.k - self.dominant_of(pool.k)) > 0:
            slots = (dominant + torch.arange(most, device=pool.device)).clamp(max=pool.k - 1)
            row = order.gather(1, slots)[..., None].expand(-1, -1, pool.keys.shape[2])
            found, _ = nearest(pool.keys, pool.keys.gather(1, row), num_keys=contextual[:, 0])
            joined = torch.where(found >= 0, dominant + found, -1)
        own = target | (rank < dominant) | (pool.present & ~usable & (rank < pool.k))
        return Selection(order, torch.where(own, slot, torch.where(rest, joined, -1)))

    def dominant_of(self, k: Any) -> Any:
        """k dominant / (dominant + contextual), rounded half up. k: an int or an int tensor."""
        parts = self.dominant + self.contextual
        return (2 * k * self.dominant + parts) // (2 * parts)

    def merge(self, features: Tensor, selection: Selection) -> Tensor:
        kept = _merge.rows(features, selection.order)
        return (kept.float() + _merge.others(features, selection)).to(features.dtype)
