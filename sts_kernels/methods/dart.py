"""DART: keeps the visual tokens least similar to a few pivot tokens."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .. import _checks
from ._budget import Budget, everything, one_cut
from ._cosine import unit
from ._merge import rows
from ._rank import descending
from .base import Cut, Inside, Method, Plan, Selection, option


@dataclass(frozen=True)
class DART(Method):
    """After `prune_layer` layers, drops the visual tokens that duplicate pivot tokens.

    Pivots are the visual and text tokens whose keys in layer `prune_layer` - 1 have the largest L1 norm. In prompt
    order, each pivot takes an equal share of the remaining visual tokens: those of smallest cosine to it. Cosines are
    of hidden states after the LLM's final norm. Kept: the visual pivots and the tokens taken. Position ids stay
    original.

    Two differences to the official code. Pivots act in prompt order, not in the order of a Python set. The number of
    kept tokens is exactly the requested one; earlier pivots take the remainder.
    """

    name: ClassVar[str] = "dart"
    paper: ClassVar[str] = (
        "Stop Looking for Important Tokens in Multimodal Language Models: Duplication Matters More, arXiv 2502.11494"
    )
    site: ClassVar[None] = None
    takes: ClassVar[tuple[str, ...]] = ("budget", "layers", "ratios")

    prune_layer: int | None = option(None, "layers that run on all tokens (the paper's K); None: 2")
    ratio: float = option(0.5, "share of the tokens that stays, without a budget or ratios (the paper's 1 - R)")
    pivots_image: int = option(4, "visual tokens that are pivots")
    pivots_text: int = option(4, "text tokens behind the image that are pivots")

    def __post_init__(self) -> None:
        if self.prune_layer is not None:
            _checks.integer(self.name, "prune_layer", self.prune_layer, 1)
        _checks.share(self.name, "ratio", self.ratio)
        _checks.integer(self.name, "pivots_image", self.pivots_image, 0)
        _checks.integer(self.name, "pivots_text", self.pivots_text, 0)
        if not self.pivots_image + self.pivots_text:
            raise ValueError(f"{self.name}: pivots_image or pivots_text must be at least 1, got 0 and 0")

    def make_plan(self, budget: Budget, layers: int, default_layer: int | None) -> Plan:
        layer, keep = one_cut(self.name, budget, self.prune_layer, self.ratio, layers)
        return Plan(layers, everything, (Cut(layer, keep, queries="keys", select=self.select_inside),))

    def select_inside(self, inside: Inside) -> Selection:
        image, text = min(self.pivots_image, inside.k), min(self.pivots_text, inside.text.shape[1])
        visual = unit(inside.norm(inside.visual))
        chosen = descending(inside.scores, torch.ones_like(inside.scores, dtype=torch.bool))[:, :image]
        beside = descending_of_any(inside.text_scores, inside.text_mask)[:, :text]
        first, second = chosen.sort(dim=1).values, beside.sort(dim=1).values
        pivots = torch.cat([rows(visual, first), unit(inside.norm(rows(inside.text, second)))], dim=1)
        active = torch.cat([torch.ones_like(first, dtype=torch.bool), inside.text_mask.gather(1, second)], dim=1)
        return Selection(least_alike(visual, pivots, chosen, shares(inside.k - image, active), inside.k))


def descending_of_any(scores: Tensor, mask: Tensor) -> Tensor:
    """(B, N) int64: tokens where `mask` is True, by descending score, non-finite scores last; then the others."""
    lowest = torch.finfo(scores.dtype).min
    ranked = scores.nan_to_num(nan=lowest, posinf=lowest, neginf=lowest).masked_fill(~mask, -torch.inf)
    return ranked.sort(dim=1, descending=True, stable=True).indices


def shares(total: int, active: Tensor) -> Tensor:
    """(B, P) int64: `total` split evenly over the pivots that `active` (B, P) marks; earlier ones get the remainder."""
    count = active.sum(1, keepdim=True).clamp(min=1)
    turn = active.cumsum(1) - 1
    return torch.where(active, total // count + (turn < total % count), 0)


def least_alike(visual: Tensor, pivots: Tensor, chosen: Tensor, share: Tensor, k: int) -> Tensor:
    """(B, k) int64 in pick order: `chosen`, then the tokens that each pivot takes, those of smallest cosine first.

    Args:
        visual: (B, N, C) unit rows.
        pivots: (B, P, C) unit rows.
        chosen: (B, Q) int64, tokens kept in any case.
        share: (B, P) int64, tokens that each pivot takes. Invariant: Q + share.sum(1) == k.
    """
    (batch, tokens, _), device = visual.shape, visual.device
    slot, first = torch.arange(tokens, device=device), chosen.shape[1]
    turn = torch.full((batch, tokens), tokens, dtype=torch.int64, device=device)  # pick order of each token
    turn = turn.scatter(1, chosen, slot[:first].expand(batch, -1))
    done = share.new_full((batch, 1), first)
    for number in range(pivots.shape[1]):
        alike = (visual @ pivots[:, number, :, None])[..., 0].float().nan_to_num(nan=2.0)
        order = alike.masked_fill(turn < tokens, 3.0).sort(dim=1, stable=True).indices
        takes = slot < share[:, number, None]
        turn = turn.scatter(1, order, torch.where(takes, done + slot, turn.gather(1, order)))
        done = done + share[:, number, None]
    return turn.sort(dim=1, stable=True).indices[:, :k]
