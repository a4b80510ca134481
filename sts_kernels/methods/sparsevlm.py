"""SparseVLM: top visual tokens by attention of relevant text tokens; the best dropped tokens are recycled as means."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from .. import _checks
from ._budget import Budget, check_after, early_layers, everything, prompt_total, prune_layers, shares_of, take
from ._density_peaks import density_peaks
from ._rank import descending
from ._raters import alignment, raters
from .base import Cut, Inside, Method, Plan, Selection, option

TABLES = {192: (300, 200, 110), 128: (303, 110, 36), 96: (238, 48, 26), 64: (66, 30, 17)}  # of TABLE_TOKENS
TABLE_TOKENS = 576


@dataclass(frozen=True)
class SparseVLM(Method):
    """At each prune layer, keeps the visual tokens with the most attention from the rater text tokens.

    Raters are the text tokens after the image whose mean over visual tokens of softmax(V T^T) is above average; V and T
    are the embeddings that enter the LLM. The attention is that of the layer before the cut, mean over heads and
    raters. Of the n dropped tokens, the best m = int(recycle n) + 1 are recycled: clustered into
    int(m / per_cluster) + 1 means (density peaks, as many neighbours as clusters). The means follow the last visual
    token and count as visual tokens from then on. Position ids become contiguous.

    With `budget`, the i-th prune layer keeps ratio^i of the prompt's visual tokens. The ratio is solved so that the
    average over the layers, including recycled tokens, is the budget. `retained_tokens` takes the official tables
    instead, as shares of 576 tokens; their averages are 206.5, 145.4, 114.1 and 82.3. The prune layers come after 3, 7
    and 16 layers (3, 7, 13 of 28).

    Differences to the official code: batches are supported; densities have no random noise; an image of fewer tokens
    than the table's count keeps all of them; if no text token is above average, all are raters.
    """

    name: ClassVar[str] = "sparsevlm"
    paper: ClassVar[str] = (
        "SparseVLM: Visual Token Sparsification for Efficient Vision-Language Model Inference, arXiv 2410.04417"
    )
    site: ClassVar[None] = None
    positions: ClassVar[str] = "contiguous"
    takes: ClassVar[tuple[str, ...]] = ("budget", "layers", "ratios")

    retained_tokens: int | None = option(None, "an official table: 192, 128, 96 or 64, without a budget or ratios")
    recycle: float = option(0.3, "share of the dropped tokens that is recycled; 0: none (tau)")
    per_cluster: int = option(10, "recycled tokens of a cluster (1 / theta)")

    def __post_init__(self) -> None:
        if self.retained_tokens not in (None, *TABLES):
            known = ", ".join(map(str, TABLES))
            raise ValueError(f"{self.name}: retained_tokens must be one of {known}, got {self.retained_tokens!r}")
        _checks.between(self.name, "recycle", self.recycle, 0, 1)
        _checks.integer(self.name, "per_cluster", self.per_cluster, 1)

    # --- numbers ---

    def recycled(self, dropped: int) -> tuple[int, int]:
        """(recycled tokens, clusters made of them) for a number of dropped tokens."""
        if not self.recycle or not dropped:
            return 0, 0
        best = min(dropped, int(dropped * self.recycle) + 1)
        return best, min(best, best // self.per_cluster + 1)

    def make_plan(self, budget: Budget, layers: int, default_layer: int | None) -> Plan:
        places = prune_layers(self.name, budget, layers, early_layers)
        if self.retained_tokens is not None and (budget.budget is not None or budget.ratios is not None):
            other = "budget" if budget.budget is not None else "ratios"
            raise ValueError(f"{self.name}: give either retained_tokens or {other}, both say how many tokens stay")
        if budget.budget is not None:
            check_after(self.name, budget.budget, places[0], layers)
            counts = partial(self._of_budget, budget.budget, places, layers)
        else:
            ratios = budget.ratios
            if ratios is None and self.retained_tokens is not None:
                ratios = [count / TABLE_TOKENS for count in TABLES[self.retained_tokens]]
            if ratios is None:
                raise ValueError(f"{self.name}: give budget, ratios or retained_tokens, for example budget=192")
            if len(ratios) != len(places):
                raise ValueError(
                    f"{self.name}: retained_tokens must have one number for each of the layers {list(places)}, "
                    f"got {len(ratios)}"
                )
            counts = partial(self._of_shares, shares_of(ratios))
        cuts = (
            Cut(
                place,
                partial(_kept, counts, i),
                "raters",
                select=self.select_inside,
                recycled=partial(_recycled, counts, i),
            )
            for i, place in enumerate(places)
        )
        return Plan(layers, everything, tuple(cuts))

    def chain(self, tokens: int, wanted: Sequence[int]) -> list[tuple[int, int]]:
        """(kept tokens, clusters) at each prune layer; kept <= wanted. tokens: visual tokens before the first one."""
        counts = []
        for want in wanted:
            kept = min(want, tokens)
            clusters = self.recycled(tokens - kept)[1] if kept else 0
            counts.append((kept, clusters))
            tokens = kept + clusters
        return counts

    def _of_shares(self, shares: Any, images: Sequence[int]) -> list[tuple[int, int]]:
        return self.chain(sum(images), [prompt_total(shares[: i + 1], images) for i in range(len(shares))])

    def _of_budget(self, amount: int | float, places: tuple[int, ...], layers: int, images: Sequence[int]) -> Any:
        return _solved(self, sum(images), sum(take(amount, tokens) for tokens in images), places, layers)

    # --- tokens ---

    def raters(
        self, visual: Tensor, text: Tensor, visual_mask: Tensor | None = None, text_mask: Tensor | None = None
    ) -> Tensor:
        if text_mask is None:
            text_mask = torch.ones_like(text[..., 0], dtype=torch.bool)
        aligned = alignment(visual, text, text_mask, 1.0)
        return raters(aligned if visual_mask is None else aligned * visual_mask[..., None], text_mask)

    def select_inside(self, inside: Inside) -> Selection:
        present = torch.ones_like(inside.scores, dtype=torch.bool)
        finite = inside.visual.isfinite().all(-1)
        ranked = descending(inside.scores.masked_fill(~finite, torch.nan), present)
        kept, tokens = inside.k - inside.recycled, ranked.shape[1]
        if not inside.recycled:
            return Selection(ranked[:, : inside.k], method=self)
        best, _ = self.recycled(tokens - kept)
        spare = ranked[:, kept : kept + best]
        rows = inside.visual.gather(1, spare[..., None].expand(-1, -1, inside.visual.shape[2]))
        centers, members = density_peaks(rows, inside.recycled)
        assignment = torch.full_like(ranked, -1).scatter(1, ranked[:, :kept], present[:, :kept].cumsum(1) - 1)
        assignment = assignment.scatter(1, spare, torch.where(members >= 0, members + kept, -1))
        return Selection(torch.cat([ranked[:, :kept], spare.gather(1, centers)], dim=1), assignment, method=self)


def _kept(counts: Any, index: int, images: Sequence[int]) -> int:
    return sum(counts(images)[index]) if sum(images) else 0


def _recycled(counts: Any, index: int, images: Sequence[int]) -> int:
    return counts(images)[index][1] if sum(images) else 0


@functools.lru_cache(maxsize=4096)
def _solved(method: SparseVLM, tokens: int, wanted: int, places: tuple[int, ...], layers: int) -> list[tuple[int, int]]:
    """The chain whose average over the layers is nearest to `wanted` from below, recycled tokens counted.

    The i-th prune layer keeps ratio^i of the prompt's `tokens`; bisection over the ratio.
    """
    if wanted == tokens:
        return method.chain(tokens, [tokens] * len(places))
    ends = [*places[1:], layers]

    def chain(ratio: float) -> list[tuple[int, int]]:
        return method.chain(tokens, [take(ratio ** (i + 1), tokens) for i in range(len(places))])

    def total(counts: list[tuple[int, int]]) -> int:
        left = sum(sum(c) * (end - place) for c, place, end in zip(counts, places, ends, strict=True))
        return tokens * places[0] + left

    low, high, least = 1e-9, 1.0, total(chain(1e-9))
    if least > (wanted + 0.5) * layers:
        raise ValueError(
            f"{method.name}: budget must be at least {-(-least // layers)} of a prompt's {tokens} tokens, {places[0]} "
            f"of {layers} layers run on all of them and recycled ones follow, got {wanted}"
        )
    for _ in range(60):
        ratio = (low + high) / 2
        low, high = (ratio, high) if total(chain(ratio)) <= wanted * layers else (low, ratio)
    return chain(low)
