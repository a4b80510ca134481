"""What a pruning method is: the tokens it selects before the LLM, and the numbers that it leaves inside it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from .. import _checks
from . import _merge, _packed
from ._budget import Budget, take
from ._pool import Pool

__all__ = ["Budget", "Cut", "Method", "Plan", "Pool", "Selection", "option"]


@dataclass(frozen=True, eq=False)
class Selection:
    """Tokens that a method keeps, of a padded batch or of packed items.

    Attributes:
        order: (B, k) int64 in the order picked, -1 past an item's own count. Packed: (sum of budgets,), the picks of
            one item after the other, counted within the item.
        assignment: (B, N) int64, packed (T,): the slot of `order` each token is merged into, counted within the item;
            -1: dropped. None: nothing is merged.
        weight: (B, N) float32, packed (T,): the weight of each token in its slot. None: 1.
        method: whose arithmetic `merge` uses. None: the weighted mean.
    """

    order: Tensor
    assignment: Tensor | None = None
    weight: Tensor | None = None
    method: "Method | None" = field(default=None, repr=False)


@dataclass(frozen=True)
class Cut:
    """Pruning inside the LLM, before its layer `layer`: behind `layer` layers.

    Attributes:
        layer: the first layer that runs on what is left.
        keep: visual tokens of a prompt left, from the numbers of tokens its images had before any pruning. May be 0.
            Never more than are left of the cut before.
        queries: whose attention scores the tokens: the "last" token of the prompt, or the "raters" of `Method.raters`.
        score_from: the attention of layer `layer` - 1 itself ("layer"), or that of query and key of the "next" layer on
            the hidden states so far.
    """

    layer: int
    keep: Callable[[Sequence[int]], int]
    queries: str = "last"
    score_from: str = "layer"

    @property
    def scoring_layer(self) -> int:
        """The layer whose query and key score the tokens."""
        return self.layer if self.score_from == "next" else self.layer - 1


@dataclass(frozen=True)
class Plan:
    """A method fitted to an LLM of `layers` layers: a pure function of numbers of tokens.

    Attributes:
        layers: of the LLM.
        keep: tokens of an image of n that enter the LLM.
        cuts: ascending by layer.
    """

    layers: int
    keep: Callable[[int], int]
    cuts: tuple[Cut, ...] = ()

    def average(self, images: Sequence[int]) -> float:
        """Visual tokens of a prompt whose images have these numbers of tokens, averaged over the LLM's layers."""
        left, start, total = sum(map(self.keep, images)), 0, 0
        for cut in self.cuts:
            total += left * (cut.layer - start)
            left, start = min(left, cut.keep(images)), cut.layer
        return (total + left * (self.layers - start)) / self.layers


def option(default, doc: str):
    """A dataclass field that is an option of a method, with its documentation."""
    return field(default=default, metadata={"doc": doc})


@dataclass(frozen=True)
class Method:
    """A pruning method. A subclass is a frozen dataclass in a file of the method's name; its fields are its options.

    A method that prunes before the LLM writes `pick`; one that prunes inside it writes `make_plan`.

    Class attributes:
        name: the file's name.
        paper: "Title, arXiv id".
        site: where `select` acts: at the input of the projector ("encoder"), after it ("projected"); None: nothing
            happens before the LLM.
        signals: of `select`, a subset of features, attention (its argument is `scores`), keys and text.
        scope: the tokens of one selection: the whole image ("image"), or each crop, tile or frame ("crop").
        positions: of the tokens left inside the LLM: their "original" ones, or "contiguous" ones.
        takes: the options of `Budget` that the method takes.
        nested: whether the first k' picks of a selection of k are the selection of k'.
    """

    name: ClassVar[str]
    paper: ClassVar[str]
    site: ClassVar[str | None] = "encoder"
    signals: ClassVar[frozenset[str]] = frozenset()
    scope: ClassVar[str] = "image"
    positions: ClassVar[str] = "original"
    takes: ClassVar[tuple[str, ...]] = ("budget", "keep")
    nested: ClassVar[bool] = True

    def plan(self, budget: Budget, layers: int, default_layer: int | None = None) -> Plan:
        """Fits the method to an LLM of `layers` layers. `default_layer` is the model family's own prune layer, for
        methods that have none.

        Raises:
            TypeError, ValueError: a sentence that names the method, the option, what was expected and what came. Where
            only the number of tokens shows that a budget is impossible, `Plan.keep` and `Cut.keep` raise it.
        """
        if not isinstance(budget, Budget):
            raise TypeError(f"{self.name}: budget must be a Budget, got {type(budget).__name__}")
        _checks.integer(self.name, "layers", layers, 1)
        budget.check(self.name, self.takes, layers)
        return self.make_plan(budget, layers, default_layer)

    def make_plan(self, budget: Budget, layers: int, default_layer: int | None) -> Plan:
        """`plan` of a checked budget. Without cuts all layers run on the same tokens, so `budget` and `keep` agree."""
        amount = budget.keep if budget.budget is None else budget.budget
        if amount is None:
            raise ValueError(f"{self.name}: give budget or keep, for example budget=128")
        return Plan(layers, partial(take, amount))

    def select(
        self,
        *,
        k: int,
        features: Tensor | None = None,
        scores: Tensor | None = None,
        text: Tensor | None = None,
        keys: Tensor | None = None,
        num_tokens: Tensor | None = None,
    ) -> Selection:
        """Picks `k` tokens of each item. `signals` says which of the tensors the method needs.

        Args:
            k: tokens to keep, 1 <= k <= N.
            features: (B, N, C) float32, float16 or bfloat16.
            scores: (B, N) float, larger is better: attention received, or paid by [CLS].
            text: (B, M, C) float.
            keys: (B, N, D) float, for methods that match tokens by attention keys.
            num_tokens: (B,) int64 or int32: only the first num_tokens[b] tokens of item b count. None: all do.

        Returns:
            A Selection. Picks are distinct. Positions past num_tokens[b] are -1. Equal tokens go to the lowest index.
            A token whose signals hold a NaN or infinity is picked only when no finite one is left. An item's result
            does not depend on the rest of the batch or on its padding. No gradient; nothing is read back to the host.

        Raises:
            TypeError, ValueError: the message names the method, the argument, what was expected and what came. Values
            of num_tokens out of range are an error on the CPU; on a GPU such an item comes out as -1 throughout.
        """
        if self.site is None:
            raise ValueError(f"{self.name}: prunes inside the LLM only, so there is nothing to select before it")
        pool = Pool.of(self.name, self.signals, k, features, scores, text, keys, num_tokens)
        return self.selection(pool)

    def selection(self, pool: Pool) -> Selection:
        """`pick`, with what holds for every method applied to it."""
        with torch.no_grad():
            picked = self.pick(pool)
            slot = torch.arange(pool.k, device=pool.device)
            order = picked.order.masked_fill(slot >= pool.count[:, None], -1)
        return replace(picked, order=order, method=self)

    def pick(self, pool: Pool) -> Selection:
        """The method itself, on checked input. Slots past an item's own count may hold anything."""
        raise NotImplementedError(f"{self.name}: a method with a site writes pick()")

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
        """Picks budgets[b] tokens of each of the items packed one after another, bit for bit as `select` of each alone.

        Args:
            lengths, budgets: host ints for each item, 0 <= budget <= length.
            features: (T, C), T the sum of lengths. scores: (T,). keys: (T, D). text: (items, M, C).

        Returns:
            A packed Selection. Nothing is read back to the host; items of equal length and budget run as one batch.
        """
        if self.site is None:
            raise ValueError(f"{self.name}: prunes inside the LLM only, so there is nothing to select before it")
        return _packed.select(self, lengths, budgets, features, scores, text, keys)

    def merge(self, features: Tensor, selection: Selection) -> Tensor:
        """The rows (B, k, C) of a padded `selection`: the weighted mean of the tokens assigned to each slot. A method
        that merges in its own way writes this anew. Called through `methods.merge`, which has checked both."""
        return _merge.weighted_mean(features, selection.order, selection.assignment, selection.weight)

    def raters(
        self, visual: Tensor, text: Tensor, visual_mask: Tensor | None = None, text_mask: Tensor | None = None
    ) -> Tensor:
        """Weights of the prompt's text tokens as raters of the visual ones, for cuts with queries="raters".

        Args:
            visual: (B, N, C), the visual tokens as they enter the layer that scores. visual_mask: (B, N) bool.
            text: (B, M, C), the text tokens behind the last image, likewise. text_mask: (B, M) bool.

        Returns:
            (B, M) float32, at least 0, each row of sum 1: a token's score is the sum over text tokens of weight times
            attention (mean over heads). Masked tokens weigh 0.
        """
        raise NotImplementedError(f"{self.name}: no cut of this method asks for raters")

    def options(self) -> dict[str, Any]:
        """Its options and their values."""
        return {own.name: getattr(self, own.name) for own in fields(self)}
