"""PolyMorphic: merges tokens of low attention before the LLM, and tokens of low text alignment inside it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from .. import _checks
from . import _packed
from ._budget import (
    Budget,
    check_after,
    early_layers,
    entering,
    everything,
    prompt_total,
    prune_layers,
    round_half_up,
    shares_of,
    solved,
    take,
)
from ._density_peaks import density_peaks
from ._rank import descending, inverse
from ._raters import alignment, raters
from .base import Cut, Inside, Method, Plan, Pool, Selection, option


@dataclass(frozen=True)
class PolyMorphic(Method):
    """Keeps the best tokens and merges all others into cluster means, before the LLM and at each prune layer.

    Stage 1 (Sec. 3.2), before the LLM: of the k tokens that enter the LLM, `retained` parts are the tokens of largest
    attention. The other `merged` parts are means of clusters of all other tokens (density peaks).

    Stage 2 (Sec. 3.3), after each prune layer, does the same with the tokens' alignment to the raters (Eq. 9-12). It
    uses the hidden states that enter the next layer: M = softmax over text tokens of V T^T / sqrt(C). The raters are
    the text tokens of above-average alignment. A mean takes the position of its cluster center.

    With `budget`, factor * budget tokens enter the LLM, and each prune layer keeps the same share of the tokens before
    it. `keep` alone, or factor=1, runs stage 1 only. `llm_only` runs stage 2 only. `layers` with `ratios` set all
    counts explicitly. The prune layers come after 3, 7 and 16 layers (3, 7, 13 of 28).
    """

    name: ClassVar[str] = "polymorphic"
    paper: ClassVar[str] = "PolyMorphic: Plug-and-Play Visual Token Compression for Scalable VLMs, ICLR 2026 submission"
    signals: ClassVar[frozenset[str]] = frozenset({"features", "attention"})
    takes: ClassVar[tuple[str, ...]] = ("budget", "keep", "layers", "ratios")
    merges: ClassVar[bool] = True
    nested: ClassVar[bool] = False

    retained: float = option(5.4, "parts of the tokens left that are kept as they are")
    merged: float = option(1.0, "parts of the tokens left that are means of clusters")
    density_neighbors: int | None = option(None, "nearest tokens of a density (K_nn); None: as many as clusters")
    factor: float = option(2.0, "budgets of tokens that enter the LLM, where a budget is given (K_f)")
    llm_only: bool = option(False, "stage 2 alone: all tokens enter the LLM")

    def __post_init__(self) -> None:
        for name in ("retained", "merged", "factor"):
            _checks.number(self.name, name, getattr(self, name))
        for name in ("retained", "merged"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{self.name}: {name} must be at least 0 and finite, got {getattr(self, name)}")
        if not self.retained + self.merged:
            raise ValueError(f"{self.name}: retained or merged must be above 0, got 0 and 0")
        if not 1 <= self.factor < float("inf"):
            raise ValueError(f"{self.name}: factor must be at least 1 and finite, got {self.factor}")
        if self.density_neighbors is not None:
            _checks.integer(self.name, "density_neighbors", self.density_neighbors, 1)
        _checks.flag(self.name, "llm_only", self.llm_only)

    def split(self, k: int) -> int:
        """Number of the k tokens that are kept unmerged: round(k retained / (retained + merged))."""
        return min(k, round_half_up(k * self.retained / (self.retained + self.merged)))

    # --- numbers ---

    def make_plan(self, budget: Budget, layers: int, default_layer: int | None) -> Plan:
        if self.llm_only and budget.keep is not None:
            raise ValueError(f"{self.name}: keep must be left out with llm_only, all tokens enter the LLM")
        places = prune_layers(self.name, budget, layers, early_layers)
        if budget.budget is not None:
            return self._solved(budget.budget, places, layers)
        keep = everything if budget.keep is None else partial(take, budget.keep)
        if budget.ratios is None:
            if budget.keep is None:
                raise ValueError(f"{self.name}: give budget or keep, for example budget=128")
            if budget.layers is not None:
                raise ValueError(f"{self.name}: layers must come with ratios where keep is given")
            return Plan(layers, keep)
        keeps = [keep, *shares_of(budget.ratios)]
        return self._plan(keep, [partial(prompt_total, keeps[: i + 2]) for i in range(len(places))], places, layers)

    def _solved(self, amount: int | float, places: tuple[int, ...], layers: int) -> Plan:
        factor = None if self.llm_only else float(self.factor)
        if factor is not None and factor >= layers / places[0]:
            raise ValueError(
                f"{self.name}: factor must be below {layers / places[0]:.3g}, {places[0]} of {layers} layers run on "
                f"all tokens that enter the LLM, got {factor}"
            )
        if factor is None:
            check_after(self.name, amount, places[0], layers)
        keeps = [partial(solved, self.name, amount, factor, places, layers, i + 1) for i in range(len(places))]
        totals = [partial(prompt_total, keeps[: i + 1]) for i in range(len(places))]
        return self._plan(partial(entering, factor, amount), totals, places, layers)

    def _plan(
        self,
        keep: Callable[[int], int],
        totals: Sequence[Callable[[Sequence[int]], int]],
        places: Sequence[int],
        layers: int,
    ) -> Plan:
        cuts = (Cut(p, total, "text", select=self.select_inside) for p, total in zip(places, totals, strict=True))
        return Plan(layers, keep, tuple(cuts))

    # --- stage 1 ---

    def pick(self, pool: Pool) -> Selection:
        finite = pool.features.isfinite().all(-1)
        ranked = descending(pool.scores.masked_fill(~finite, torch.nan), pool.present)
        return self._consolidated(pool.features, ranked, pool.k, pool.count)

    def _consolidated(self, features: Tensor, ranked: Tensor, k: int, count: Tensor) -> Selection:
        """Selection of k slots per item: the first tokens of `ranked` (B, N), then cluster centers of the others.

        An item of fewer than k tokens is split as if k were its number of tokens.
        """
        tokens, device = ranked.shape[1], ranked.device
        slot = torch.arange(tokens, device=device)
        retained = _packed.host([self.split(size) for size in range(k + 1)], device)[count.clamp(max=k)][:, None]
        rank = inverse(ranked)
        assignment = torch.where(rank < torch.minimum(retained, count[:, None]), rank, -1)
        clusters = k - self.split(k)
        if not clusters:
            return Selection(ranked[:, :k], assignment)
        others = (rank >= retained) & (rank < count[:, None])
        width = tokens - self.split(k)  # max number of others over the items
        where = (~others).to(torch.int8).sort(dim=1, stable=True).indices
        rest = features.gather(1, where[:, :width, None].expand(-1, -1, features.shape[2]))
        centers, members = density_peaks(rest, clusters, self.density_neighbors, count - retained[:, 0])
        home = inverse(where).clamp(max=width - 1)
        cluster = members.gather(1, home)
        assignment = torch.where(others & (cluster >= 0), cluster + retained, assignment)
        of_cluster = (slot[:k] - retained).clamp(0, clusters - 1)
        order = torch.where(slot[:k] < retained, ranked[:, :k], where.gather(1, centers).gather(1, of_cluster))
        return Selection(order, assignment)

    # --- stage 2 ---

    def select_inside(self, inside: Inside) -> Selection:
        aligned = alignment(inside.visual, inside.text, inside.text_mask, inside.visual.shape[-1] ** -0.5)
        score = (aligned * raters(aligned, inside.text_mask)[:, None]).sum(-1)
        finite = inside.visual.isfinite().all(-1)
        present = torch.ones_like(finite)
        ranked = descending(score.masked_fill(~finite, torch.nan), present)
        picked = self._consolidated(inside.visual, ranked, inside.k, present.sum(1))
        return Selection(picked.order, picked.assignment, method=self)
