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

__all__ = ["Budget", "Cut", "Inside", "Method", "Plan", "Pool", "Selection", "option"]


@dataclass(frozen=True, eq=False)
class Selection:
    """Tokens that a method keeps, of a padded batch or of packed items.

    Attributes:
        order: (B, k) int64 in the order picked, -1 past an item's own count. Packed: (sum of budgets,), the picks of
            one item after the other, counted within the item.
        assignment: (B, N) int64, packed (T,): the slot of `order` each token is merged into, counted within the item;
            -1: dropped. None: nothing is merged.
        weight: (B, N) float32, packed (T,): the weight of each token in its slot. None: 1.
        sources: (B, k, M) int64, packed (sum of budgets, M): tokens that a slot takes up beside those assigned to it,
            counted within the item, -1: none. For methods that merge a token into several slots. None: there are none.
        method: whose arithmetic `merge` uses. None: the weighted mean.
    """

    order: Tensor
    assignment: Tensor | None = None
    weight: Tensor | None = None
    sources: Tensor | None = None
    method: "Method | None" = field(default=None, repr=False)


@dataclass(frozen=True)
class Cut:
    """Pruning inside the LLM, before its layer `layer`: behind `layer` layers.

    Attributes:
        layer: the first layer that runs on what is left.
        keep: visual tokens of a prompt left, from the numbers of tokens its images had before any pruning. May be 0.
            Never more than are left of the cut before.
        queries: what scores the tokens: attention of the "last" token of the prompt, or of the "raters" of
            `Method.raters`; the L1 norms of their "keys"; "text": nothing does, `select` compares hidden states.
            All but "last" need text behind the last image.
        score_from: the attention of layer `layer` - 1 itself ("layer"), or query and key of the "next" layer on the
            hidden states so far.
        select: picks the tokens, and says what is merged into them. None: the tokens of largest score.
        recycled: how many of `keep` are merged from dropped tokens, and go behind the last token that is kept; they are
            the last of `select`'s picks. None: none, every merged token stays at the place of its pick.
    """

    layer: int
    keep: Callable[[Sequence[int]], int]
    queries: str = "last"
    score_from: str = "layer"
    select: "Callable[[Inside], Selection] | None" = None
    recycled: Callable[[Sequence[int]], int] | None = None

    @property
    def scoring_layer(self) -> int:
        """The layer whose query and key score the tokens."""
        return self.layer if self.score_from == "next" else self.layer - 1


@dataclass(frozen=True)
class Inside:
    """What a cut picks from: G prompts inside the LLM that have n visual tokens each, and M text tokens behind them.

    Attributes:
        k: visual tokens that go on, 1 <= k < n. recycled: as in `Cut`.
        visual: (G, n, C) hidden states as they enter the cut's layer.
        text: (G, M, C) likewise, of the text behind the last image. text_mask: (G, M) bool, False: padding.
        scores: (G, n) float32, by the cut's `queries`; None for "text". text_scores: (G, M).
        norm: the LLM's final norm.
    """

    k: int
    recycled: int
    visual: Tensor
    text: Tensor
    text_mask: Tensor
    scores: Tensor | None = None
    text_scores: Tensor | None = None
    norm: Callable[[Tensor], Tensor] = lambda x: x


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
        signals: of `select`, a subset of features, attention, relevance, keys and text. The argument of attention and
            of relevance is `scores`.
        encoder_attention: where attention and keys come from: the layer that makes the "features", as the mean over
            its heads, or the encoder's "last" layer, all heads as one.
        scope: the tokens of one selection: the whole image ("image"), or each crop, tile or frame ("crop").
        positions: of the tokens left inside the LLM: their "original" ones, or "contiguous" ones.
        takes: the options of `Budget` that the method takes.
        nested: whether the first k' picks of a selection of k are the selection of k'.
        adaptive: whether the tokens of an item say how many of them it keeps; see `counts`.
        synchronises: whether selecting waits for a CUDA device, which a CUDA graph does not allow.
    """

    name: ClassVar[str]
    paper: ClassVar[str]
    site: ClassVar[str | None] = "encoder"
    signals: ClassVar[frozenset[str]] = frozenset()
    encoder_attention: ClassVar[str] = "features"
    scope: ClassVar[str] = "image"
    positions: ClassVar[str] = "original"
    takes: ClassVar[tuple[str, ...]] = ("budget", "keep")
    nested: ClassVar[bool] = True
    adaptive: ClassVar[bool] = False
    synchronises: ClassVar[bool] = False

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
            A method whose number of tokens depends on the tokens has widest(k) slots, N at most, and -1 past the count
            of each item.

        Raises:
            TypeError, ValueError: the message names the method, the argument, what was expected and what came. Values
            of num_tokens out of range are an error on the CPU; on a GPU such an item comes out as -1 throughout.
        """
        if self.site is None:
            raise ValueError(f"{self.name}: prunes inside the LLM only, so there is nothing to select before it")
        pool = Pool.of(self.name, self.signals, k, features, scores, text, keys, num_tokens)
        if not self.adaptive:
            return self.selection(pool)
        counts, width = self.fitted(pool), min(pool.tokens, self.widest(k))
        selection = self.selection(replace(pool, k=width))
        kept = torch.arange(width, device=pool.device) < counts[:, None]
        return replace(selection, order=selection.order.masked_fill(~kept, -1))

    def counts(self, pool: Pool) -> Tensor:
        """(B,) int64: how many tokens each item of an adaptive method keeps when it is asked for pool.k, at most
        widest(pool.k). The method is nested and merges nothing: the first of more picks are the selection of fewer."""
        raise NotImplementedError(f"{self.name}: a method that is adaptive writes counts()")

    def fitted(self, pool: Pool) -> Tensor:
        """(B,) int64: `counts`. An item of no more tokens than it is asked for keeps them all."""
        return torch.where(pool.count <= pool.k, pool.count, torch.minimum(self.counts(pool), pool.count))

    def widest(self, k: int) -> int:
        """The most that `counts` says for a k."""
        raise NotImplementedError(f"{self.name}: a method that is adaptive writes widest()")

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

    def fit_budgets(
        self,
        lengths: list[int],
        budgets: list[int],
        *,
        features: Tensor | None = None,
        scores: Tensor | None = None,
        text: Tensor | None = None,
        keys: Tensor | None = None,
    ) -> list[int]:
        """Budgets for `select_packed` from those asked for: where numbers of tokens depend on the tokens, with one
        read-back; else `budgets` as they are. Arguments as of `select_packed`."""
        if not self.adaptive:
            return budgets
        return _packed.fit_budgets(self, lengths, budgets, features, scores, text, keys)

    def merge(self, features: Tensor, selection: Selection) -> Tensor:
        """The rows (B, k, C) of a padded `selection`: the weighted mean of the tokens assigned to each slot. A method
        that merges in its own way writes this anew. Called through `methods.merge`, which has checked both."""
        return _merge.weighted_mean(features, selection.order, selection.assignment, selection.weight)

    def raters(
        self, visual: Tensor, text: Tensor, visual_mask: Tensor | None = None, text_mask: Tensor | None = None
    ) -> Tensor:
        """Weights of the prompt's text tokens as raters of the visual ones, for cuts with queries="raters".

        Args:
            visual: (B, N, C), the visual tokens as they enter the LLM. visual_mask: (B, N) bool.
            text: (B, M, C), the text tokens behind the last image, likewise. text_mask: (B, M) bool.

        Returns:
            (B, M) float32, at least 0, each row of sum 1: a token's score is the sum over text tokens of weight times
            attention (mean over heads). Masked tokens weigh 0.
        """
        raise NotImplementedError(f"{self.name}: no cut of this method asks for raters")

    def options(self) -> dict[str, Any]:
        """Its options and their values."""
        return {own.name: getattr(self, own.name) for own in fields(self)}
