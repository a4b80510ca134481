"""STS, "structure to semantics": repulsion-based selection before the LLM, attention top-k inside it."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from .. import _checks
from ..ops import repulsion_select, repulsion_select_varlen
from . import _packed
from ._budget import (
    Budget,
    check_after,
    check_amount,
    check_layer,
    everything,
    prompt_after,
    prompt_total,
    python_numbers,
    round_half_up,
    shares_of,
    take,
)
from .base import SCOPES, Cut, Method, Plan, Pool, Selection, option

ANCHORS = ("mean", "first", "saliency")


@dataclass(frozen=True)
class STSConfig:
    """Token budget and options of STS.

    Give either `budget`, or `keep` and/or `keep_after`. Each is a number of tokens (int) or a share of tokens (float).

    Args:
        budget: visual tokens of one image or clip, averaged over the LLM's layers: STS's advertised budget. With
            p = prune_layer and L layers, ``keep = budget * L / (p + (L - p) * rho)`` tokens enter the LLM, and `rho` of
            them remain from layer p on. Example: budget 128 gives 192 and 64 for p = L / 2 and rho = 1/3. An image of
            fewer than `keep` tokens keeps all of them before layer p; stage 2 then keeps more, so that the average
            still is the budget.
        keep: tokens of each image that stage 1 passes to the LLM. Without `keep_after`, stage 2 keeps `rho` of them.
            With ``keep_after=1.0`` or ``rho=1.0``, only stage 1 runs.
        keep_after: visual tokens of a prompt, all images together, that stage 2 keeps from layer prune_layer on. A
            float is a share of all visual tokens of the prompt before pruning. Without `keep`, only stage 2 runs.
        prune_layer: layers 0 .. prune_layer - 1 run on the tokens kept by stage 1; layer prune_layer - 1 gives the
            scores; layers from prune_layer on run on the tokens kept by stage 2. None: the model family's default.
        rho: share of stage 1's tokens that stage 2 keeps. Not used if `keep_after` is given.
        eps: eps of `repulsion_select`, in units of features squared.
        anchor: first pick of stage 1. "mean": the token nearest the mean. "first": token 0. "saliency": the token with
            the largest attention in the vision encoder.
        scope: candidates of one selection. "image": all tokens of an image or clip. "crop": the tokens of each crop,
            tile or frame, with an even part of the image's budget.

    Raises:
        TypeError, ValueError: bad value, conflicting options, or no budget.
    """

    budget: int | float | None = None
    keep: int | float | None = None
    keep_after: int | float | None = None
    prune_layer: int | None = None
    rho: float = 1 / 3
    eps: float = 1e-6
    anchor: str = "mean"
    scope: str = "image"

    def __post_init__(self) -> None:
        python_numbers(self, "budget", "keep", "keep_after", "prune_layer")
        for name in ("budget", "keep", "keep_after"):
            check_amount("STSConfig", name, getattr(self, name))
        if self.budget is None and self.keep is None and self.keep_after is None:
            raise ValueError("STSConfig: give budget, keep or keep_after, for example STSConfig(budget=128)")
        if self.budget is not None and (self.keep is not None or self.keep_after is not None):
            raise ValueError("STSConfig: give either budget, or keep and keep_after; budget solves for the other two")
        if self.prune_layer is not None:
            _checks.integer("STSConfig", "prune_layer", self.prune_layer, 1)
        _checks.share("STSConfig", "rho", self.rho)
        _checks.eps("STSConfig", self.eps)
        for name, allowed in (("anchor", ANCHORS), ("scope", SCOPES)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"STSConfig: {name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")

    def plan(self, layers: int, default_prune_layer: int | None = None) -> "STSPlan":
        """Fits the configuration to an LLM of `layers` layers.

        If prune_layer is None, it becomes `default_prune_layer` if that is below `layers`, else half the layers.

        Raises:
            ValueError: prune_layer is out of range for the LLM.
        """
        layer = self.prune_layer
        if layer is None:
            deep_enough = default_prune_layer is not None and default_prune_layer < layers
            layer = default_prune_layer if deep_enough else max(1, layers // 2)
        else:
            check_layer("STSConfig", "prune_layer", layer, layers)
        return STSPlan(replace(self, prune_layer=layer), layers)


@dataclass(frozen=True)
class STSPlan:
    """A configuration fitted to an LLM. Computes the tokens kept by each stage."""

    config: STSConfig
    layers: int

    @property
    def prune_layer(self) -> int:
        assert self.config.prune_layer is not None  # STSConfig.plan sets it
        return self.config.prune_layer

    def keep(self, tokens: int) -> int:
        """Tokens that stage 1 keeps of an image of `tokens` tokens."""
        config = self.config
        if config.budget is None:
            return tokens if config.keep is None else take(config.keep, tokens)
        budget = take(config.budget, tokens)
        if budget == tokens:
            return tokens
        shallow, deep = self.prune_layer, self.layers - self.prune_layer
        return min(tokens, max(1, round_half_up(budget * self.layers / (shallow + deep * config.rho))))

    def keep_after(self, images: Sequence[int]) -> int:
        """Visual tokens that stage 2 keeps in a prompt. images: tokens of each image before pruning."""
        config = self.config
        kept = [self.keep(tokens) for tokens in images]
        if not sum(kept):
            return 0
        if config.keep_after is not None:
            wanted = config.keep_after
            after = wanted if isinstance(wanted, int) else max(1, round_half_up(wanted * sum(images)))
        else:
            after = sum(map(self._share_after, images, kept))
        return min(sum(kept), after)

    def _share_after(self, tokens: int, kept: int) -> int:
        """Tokens of one image that stage 2 keeps, without `keep_after`. kept: its tokens after stage 1."""
        config = self.config
        if not kept:
            return 0
        if config.budget is None:
            return max(1, round_half_up(config.rho * kept))
        total = take(config.budget, tokens) * self.layers
        left = (total - self.prune_layer * kept) / (self.layers - self.prune_layer)
        return min(kept, max(1, round_half_up(left)))

    def average(self, kept: int, after: int) -> float:
        """Visual tokens averaged over the layers: `kept` before layer prune_layer, `after` from that layer on."""
        return (self.prune_layer * kept + (self.layers - self.prune_layer) * after) / self.layers


@contextmanager
def _named(method: str) -> Iterator[None]:
    """Re-raises errors of STSConfig with the method's name in the message."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise type(error)(str(error).replace("STSConfig", method)) from None


@dataclass(frozen=True)
class STS(Method):
    """Two stages: greedy repulsion before the LLM, top-k by attention inside it.

    Stage 1 (Eq. 3-5, Algorithm 1) is the op `repulsion_select`. Stage 2 (Eq. 6-7), after the first `prune_layer`
    layers, keeps the visual tokens with the most attention from the prompt's last token.

    The paper's ablations: rho=1.0 runs stage 1 only (STS-S); llm_only=True runs stage 2 only. `layers` with `ratios` is
    Algorithm 1's set of prune layers.
    """

    name: ClassVar[str] = "sts"
    paper: ClassVar[str] = "Stage-Aware Visual Token Pruning from Structure to Semantics, arXiv 2606.03569"
    signals: ClassVar[frozenset[str]] = frozenset({"features"})
    takes: ClassVar[tuple[str, ...]] = ("budget", "keep", "layers", "ratios")

    eps: float = option(1e-6, "of the repulsion 1 / (d + eps), in units of features squared")
    anchor: str = option("mean", "first pick: mean (nearest the mean), first, or saliency (largest attention)")
    rho: float = option(1 / 3, "share of stage 1's tokens that stage 2 leaves; 1.0: stage 1 alone")
    prune_layer: int | None = option(None, "layers before stage 2; None: the model family's, else half of them")
    keep_after: int | float | None = option(None, "tokens of a prompt, over all its images, that stage 2 leaves")
    llm_only: bool = option(False, "stage 2 alone: all tokens enter the LLM")

    def __post_init__(self) -> None:
        _checks.flag(self.name, "llm_only", self.llm_only)
        python_numbers(self, "keep_after")
        with _named(self.name):
            self._config(keep=1.0)
        if self.anchor == "saliency":
            object.__setattr__(self, "signals", self.signals | {"attention"})

    @classmethod
    def of(cls, config: STSConfig) -> tuple["STS", Budget]:
        """(method, budget) equivalent to `config`, except for its scope, which is an option of the integration."""
        method = cls(config.eps, config.anchor, config.rho, config.prune_layer, config.keep_after)
        return method, Budget(budget=config.budget, keep=config.keep)

    def _config(self, **given: Any) -> STSConfig:
        own = ("eps", "anchor", "rho", "prune_layer", "keep_after")
        return STSConfig(**{**{name: getattr(self, name) for name in own}, **given})

    def make_plan(self, budget: Budget, layers: int, default_layer: int | None) -> Plan:
        if budget.ratios is None and budget.layers is not None and len(budget.layers) > 1:
            raise ValueError(f"{self.name}: layers must come with ratios where they are several, got {budget.layers}")
        if self.llm_only and budget.keep is not None:
            raise ValueError(f"{self.name}: keep must be left out with llm_only, all tokens enter the LLM")
        if budget.layers is not None and self.prune_layer is not None:
            raise ValueError(f"{self.name}: give either prune_layer or layers, both name the layer")
        layer = self.prune_layer if budget.layers is None else budget.layers[0]
        with _named(self.name):
            layer = self._config(keep=1.0, prune_layer=layer).plan(layers, default_layer).prune_layer
        if budget.ratios is not None and self.keep_after is not None:
            raise ValueError(f"{self.name}: give either ratios or keep_after, both say what stage 2 leaves")
        if budget.ratios is not None:
            return self._staged(budget, layers, layer)
        if self.llm_only and budget.budget is not None:
            check_after(self.name, budget.budget, layer, layers)
            keep = partial(prompt_after, self.name, budget.budget, layer, layers)
            return Plan(layers, everything, (Cut(layer, keep),))
        if budget.budget is None and budget.keep is None and self.keep_after is None:
            other = "layers and ratios" if self.llm_only else "keep"
            raise ValueError(f"{self.name}: give budget or {other}, for example budget=128")
        with _named(self.name):
            solved = self._config(budget=budget.budget, keep=budget.keep, prune_layer=layer).plan(layers)
        alone = self.keep_after == 1.0 if isinstance(self.keep_after, float) else self.rho == 1 and not self.keep_after
        return Plan(layers, solved.keep, () if alone else (Cut(layer, solved.keep_after),))

    def _staged(self, budget: Budget, layers: int, layer: int) -> Plan:
        """The plan of explicit `ratios` (and `layers`), after stage 1's `keep`."""
        places = (layer,) if budget.layers is None else tuple(budget.layers)
        ratios = budget.ratios or ()
        if len(places) != len(ratios):
            raise ValueError(f"{self.name}: ratios must have one number without layers, got {len(ratios)}")
        keep = everything if budget.keep is None else partial(take, budget.keep)
        keeps = [keep, *shares_of(ratios)]
        cuts = (Cut(place, partial(prompt_total, keeps[: i + 2])) for i, place in enumerate(places))
        return Plan(layers, keep, tuple(cuts))

    def pick(self, pool: Pool) -> Selection:
        anchor = None
        if self.anchor == "first":
            anchor = torch.zeros_like(pool.count)
        elif self.anchor == "saliency":
            anchor = _most_salient(pool.scores, pool.present)
        return Selection(repulsion_select(pool.features, pool.k, self.eps, anchor, pool.num_tokens))

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
        """As `Method.select_packed`, with one op call for all items.

        Items of equal length and budget run `repulsion_select`, others `repulsion_select_varlen`.
        """
        device = _packed.check(self.name, self.signals, lengths, budgets, features, scores, text, keys)
        total = sum(budgets)
        if not total:
            return Selection(torch.empty(0, dtype=torch.int64, device=device), method=self)
        assert features is not None  # as checked
        anchor = self._packed_anchor(lengths, features, scores)
        if min(lengths) == max(lengths) and min(budgets) == max(budgets):
            items = features.unflatten(0, (len(lengths), lengths[0]))
            order = repulsion_select(items, budgets[0], self.eps, anchor).flatten()
        else:
            cu_seqlens, cu_budgets = (
                _packed.host(_packed.offsets(values), device, torch.int32) for values in (lengths, budgets)
            )
            order = repulsion_select_varlen(
                features, cu_seqlens, cu_budgets, total, self.eps, anchor, max_seqlen=max(lengths)
            )
        return Selection(order, method=self)

    def _packed_anchor(self, lengths: list[int], features: Tensor, scores: Tensor | None) -> Tensor | None:
        if self.anchor == "mean":
            return None
        if self.anchor == "first":
            return torch.zeros(len(lengths), dtype=torch.int64, device=features.device)
        assert scores is not None  # as checked
        parts = [part[None] for part in scores.split(lengths)]
        best = [
            _most_salient(part, torch.ones_like(part, dtype=torch.bool)) if part.shape[1] else part.new_zeros(1).long()
            for part in parts
        ]
        return torch.cat(best)


def _most_salient(scores: Tensor, present: Tensor) -> Tensor:
    """(B,) int64: the present token of largest finite score."""
    return scores.masked_fill(~(present & scores.isfinite()), -torch.inf).argmax(1)
