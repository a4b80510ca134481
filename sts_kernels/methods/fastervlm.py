"""FasterVLM: top-k tokens by [CLS] attention of the vision encoder."""

from dataclasses import dataclass
from typing import ClassVar

from ._rank import descending
from .base import Method, Pool, Selection


@dataclass(frozen=True)
class FasterVLM(Method):
    """Top-k by [CLS] attention (mean over heads) in the encoder's penultimate layer.

    An encoder without a [CLS] token uses the attention received. Each crop keeps its own share, as in the official
    code.
    """

    name: ClassVar[str] = "fastervlm"
    paper: ClassVar[str] = (
        "[CLS] Attention is All You Need for Training-Free Visual Token Pruning: Make VLM Inference Faster, "
        "arXiv 2412.01818"
    )
    signals: ClassVar[frozenset[str]] = frozenset({"attention"})
    scope: ClassVar[str] = "crop"

    def pick(self, pool: Pool) -> Selection:
        return Selection(descending(pool.scores, pool.present)[:, : pool.k])
