"""CDPruner: diverse tokens weighted by their relevance to the prompt."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .. import _checks
from ..ops import dpp_select
from ._cosine import unit
from .base import Method, Pool, Selection, option

FLOOR = 1e-7  # relative to the first gain: a smaller gain means that the rank of L is exhausted
RELEVANCE = ("scores", "text")


@dataclass(frozen=True)
class CDPruner(Method):
    """Greedy MAP of a determinantal point process (DPP) with kernel L_ij = q_i c_ij q_j.

    c is the cosine of features. q is the relevance to the prompt, scaled to 0 .. 1 over each item's tokens. Past the
    rank of L, tokens are picked by q.

    by="scores": relevance is passed as `scores`, larger is more relevant. The official relevance is the negated mean
    cosine of CLIP's image and text embeddings, which needs CLIP's text tower.
    by="text": that relevance is computed here from `keys`, the image embeddings (B, N, D), and `text`, the text
    embeddings (B, M, D). Without keys, `features` are compared with the text. negate=False keeps the sign of the
    cosine, for embeddings in which similar means relevant.

    Each crop keeps its own share, as in the official code.
    """

    name: ClassVar[str] = "cdpruner"
    paper: ClassVar[str] = (
        "Beyond Attention or Similarity: Maximizing Conditional Diversity for Token Pruning in MLLMs, arXiv 2506.10967"
    )
    site: ClassVar[str] = "projected"
    signals: ClassVar[frozenset[str]] = frozenset({"features", "relevance"})
    scope: ClassVar[str] = "crop"

    by: str = option("scores", "relevance: given as scores, or from the cosines to the text")
    negate: bool = option(True, "with by=text: dissimilar means relevant, as in the official code's CLIP space")

    def __post_init__(self) -> None:
        _checks.one_of(self.name, "by", self.by, RELEVANCE)
        _checks.flag(self.name, "negate", self.negate)
        if self.by == "text":
            object.__setattr__(self, "signals", frozenset({"features", "text"}))

    def pick(self, pool: Pool) -> Selection:
        relevance = pool.scores if self.by == "scores" else self.similarity(pool)
        usable = pool.finite("features") & relevance.isfinite()
        quality = scaled(relevance, usable).masked_fill(~usable, math.nan)
        order, _ = dpp_select(pool.features, quality, pool.k, FLOOR, pool.count)
        return Selection(order)

    def similarity(self, pool: Pool) -> Tensor:
        """(B, N) float32: mean cosine to the rows of `text`, negated with negate=True."""
        image, name = (pool.features, "features") if pool.keys is None else (pool.keys, "keys")
        if image.shape[2] != pool.text.shape[2]:
            raise ValueError(
                f"{self.name}: text must have the {image.shape[2]} channels of {name}, got {pool.text.shape[2]}; give "
                "image embeddings of the text's space as keys"
            )
        text = unit(pool.text).mean(1)
        cosine = (unit(image) * text[:, None]).sum(-1).float()
        return -cosine if self.negate else cosine


def scaled(relevance: Tensor, usable: Tensor) -> Tensor:
    """(B, N) float32: (r - min + 1e-6) / (max - min) over the usable tokens of each item; 1 if all r are equal."""
    r = relevance.double()
    low = r.masked_fill(~usable, math.inf).amin(1, keepdim=True)
    high = r.masked_fill(~usable, -math.inf).amax(1, keepdim=True)
    span = high - low
    return torch.where(span > 0, (r - low + 1e-6) / torch.where(span > 0, span, 1.0), 1.0).float()
