"""Base class of pruning methods: token selection before the LLM, and the plan of cuts inside the LLM."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from .. import _checks
from . import _merge, _packed
from ._budget import Budget, take
from ._pool import ABSENT, ARGUMENTS, Pool

__all__ = ["Budget", "Cut", "Inside", "Method", "Plan", "Pool", "Selection", "option"]

SCOPES, POSITIONS = ("image", "crop"), ("original", "contiguous")  # values of `Method.scope` and `Method.positions`
ATTRIBUTES: dict[str, tuple[str | None, ...]] = {  # of Method, and their values
    "site": ("encoder", "projected", None),
    "encoder_attention": ("features", "last"),
    "scope": SCOPES,
    "positions": POSITIONS,
}


@dataclass(frozen=True, eq=False)
class Selection:
    """Tokens kept by a method, for a padded batch or for packed items. Indices are relative to the item.

    Attributes:
        order: (B, k) int64: kept tokens in pick order, -1 past the item's count. Packed: (sum of budgets,), items
            concatenated.
        assignment: (B, N) int64, packed (T,): the slot of `order` that each token is merged into. -1: dropped. None:
            nothing is merged.
        weight: (B, N) float32, packed (T,): weight of each token in its slot. None: 1.
        sources: (B, k, M) int64, packed (sum of budgets, M): further tokens merged into each slot, -1: none. For
            methods that merge one token into several slots. None: no further tokens.
        method: the method whose `merge` computes the rows. None: the weighted mean.
    """

    order: Tensor
    assignment: Tensor | None = None
    weight: Tensor | None = None
    sources: Tensor | None = None
    method: "Method | None" = field(default=None, repr=False)


@dataclass(frozen=True)
class Cut:
    """Pruning inside the LLM, between layers `layer` - 1 and `layer` (0-based).

    Attributes:
        layer: the first layer that runs on the kept tokens.
        keep: maps the token counts of a prompt's images before any pruning to the visual tokens kept in the prompt.
            May return 0. Invariant: at most the tokens kept by the previous cut.
        queries: source of the scores. "last": attention of the prompt's last token. "raters": attention of the text
            tokens weighted by `Method.raters`. "keys": L1 norms of the tokens' keys. "text": no scores; `select`
            compares hidden states. All but "last" need text after the last image.
        score_from: "layer": attention in layer `layer` - 1. "next": query and key projections of layer `layer` on the
            hidden states that enter it.
        select: picks the tokens and assigns merged tokens. None: top-k by score.
        recycled: like `keep`, the number of kept tokens that are merged from dropped tokens. They are the last picks of
            `select` and are placed after the last kept visual token. None: 0; a merged row stays at its pick's place.
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
    """Input of `Cut.select`: G prompts with n visual tokens each and up to M text tokens after the last image.

    Attributes:
        k: visual tokens to keep, 1 <= k < n.
        recycled: value of `Cut.recycled`.
        visual: (G, n, C) hidden states of the visual tokens that enter layer `Cut.layer`.
        text: (G, M, C) hidden states of the text after the last image.
        text_mask: (G, M) bool, False: padding.
        scores: (G, n) float32, by `Cut.queries`; None for "text".
        text_scores: (G, M), scores of the text tokens.
        norm: the LLM's final norm.
    """

    k: int
    recycled: int
    visual: Tensor
    text: Tensor
    text_mask: Tensor
    scores: Tensor = ABSENT
    text_scores: Tensor = ABSENT
    norm: Callable[[Tensor], Tensor] = lambda x: x


@dataclass(frozen=True)
class Plan:
    """A method fitted to an LLM. Token counts are pure functions of the images' token counts.

    Attributes:
        layers: number of layers of the LLM.
        keep: maps the tokens of an image to the tokens that enter the LLM.
        cuts: ascending by layer.
    """

    layers: int
    keep: Callable[[int], int]
    cuts: tuple[Cut, ...] = ()

    def average(self, images: Sequence[int]) -> float:
        """Visual tokens of a prompt, averaged over the LLM's layers. images: tokens of each image before pruning."""
        left, start, total = sum(map(self.keep, images)), 0, 0
        for cut in self.cuts:
            total += left * (cut.layer - start)
            left, start = min(left, cut.keep(images)), cut.layer
        return (total + left * (self.layers - start)) / self.layers


def option(default: Any, doc: str) -> Any:
    """Dataclass field for an option of a method: default value and documentation."""
    return field(default=default, metadata={"doc": doc})


@dataclass(frozen=True)
class Method:
    """A pruning method. A subclass is a frozen dataclass in the file `<name>.py`; its fields are its options.

    A method that prunes before the LLM overrides `pick`; a method that prunes inside the LLM overrides `make_plan`.

    Class attributes:
        name: name of the method and of its file. The default is the name of the class.
        paper: "Title, arXiv id".
        site: where `select` acts. "encoder": input of the projector. "projected": output of the projector. None: no
            selection before the LLM.
        signals: inputs of `select`, a subset of features, attention, relevance, keys and text. Attention and relevance
            are both passed as `scores`.
        encoder_attention: source of attention and keys. "features": the layer that produces the features, mean over
            heads. "last": the encoder's last layer, all heads as one.
        scope: candidates of one selection. "image": the whole image. "crop": each crop, tile or frame.
        positions: position ids of the kept tokens in the LLM, "original" or "contiguous".
        takes: the options of `Budget` that the method accepts.
        merges: whether `select` merges tokens: its Selection has an assignment.
        nested: whether the first k' picks of a selection of k equal the selection of k'.
        adaptive: whether the number of kept tokens depends on the tokens; see `counts`.
        synchronises: whether selecting waits for the CUDA device, which rules out CUDA graph capture.
    """

    name: ClassVar[str]
    paper: ClassVar[str]
    site: ClassVar[str | None] = "encoder"
    signals: ClassVar[frozenset[str]] = frozenset()
    encoder_attention: ClassVar[str] = "features"
    scope: ClassVar[str] = "image"
    positions: ClassVar[str] = "original"
    takes: ClassVar[tuple[str, ...]] = ("budget", "keep")
    merges: ClassVar[bool] = False
    nested: ClassVar[bool] = True
    adaptive: ClassVar[bool] = False
    synchronises: ClassVar[bool] = False

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if not hasattr(cls, "name"):
            cls.name = cls.__name__
        for name, allowed in ATTRIBUTES.items():
            value = getattr(cls, name)
            if value not in allowed:
                raise ValueError(f"{cls.__name__}: {name} must be {' or '.join(map(repr, allowed))}, got {value!r}")
        signals = cls.signals
        if not isinstance(signals, frozenset) or not signals <= ARGUMENTS.keys():
            raise ValueError(f"{cls.__name__}: signals must be a frozenset of {', '.join(ARGUMENTS)}, got {signals!r}")

    def plan(self, budget: Budget, layers: int, default_layer: int | None = None) -> Plan:
        """Fits the method to an LLM of `layers` layers.

        default_layer: the model family's prune layer, for methods without one of their own.

        Raises:
            TypeError, ValueError: bad budget or layer. The message names the method, the option, the expected and the
                given value. A budget that is impossible only for some token counts raises in `Plan.keep` or `Cut.keep`.
        """
        if not isinstance(budget, Budget):
            raise TypeError(f"{self.name}: budget must be a Budget, got {type(budget).__name__}")
        _checks.integer(self.name, "layers", layers, 1)
        budget.check(self.name, self.takes, layers)
        return self.make_plan(budget, layers, default_layer)

    def make_plan(self, budget: Budget, layers: int, default_layer: int | None) -> Plan:
        """`plan` for a checked budget. The default has no cuts, so `budget` and `keep` mean the same."""
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
        """Picks `k` tokens of each item. `signals` lists the tensors that the method needs.

        Args:
            k: tokens to keep, 1 <= k <= N.
            features: (B, N, C) float32, float16 or bfloat16.
            scores: (B, N) float, larger is better: attention received, [CLS] attention or relevance.
            text: (B, M, C) float.
            keys: (B, N, D) float, for methods that match tokens by attention keys.
            num_tokens: (B,) int64 or int32: item b has num_tokens[b] tokens, the rest is padding. None: N each.

        Returns:
            A Selection. Picks are distinct. Slots past num_tokens[b] are -1. Ties go to the lowest index. A token with
            a NaN or infinity in a signal is picked only if no finite token is left. An item's result does not depend on
            the rest of the batch or on its padding. No gradient. Nothing is read back to the host. An adaptive method
            has min(N, widest(k)) slots, -1 past each item's count.

        Raises:
            TypeError, ValueError: the message names the method, the argument, the expected and the given value. A
                num_tokens[b] out of range raises on the CPU; on a GPU, item b is -1 throughout.
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
        """(B,) int64: tokens that each item of an adaptive method keeps for a requested pool.k; at most widest(pool.k).

        Precondition: the method is nested and merges nothing, so `select` may truncate a longer selection.
        """
        raise NotImplementedError(f"{self.name}: a method that is adaptive writes counts()")

    def fitted(self, pool: Pool) -> Tensor:
        """(B,) int64: `counts`, limited to the item's tokens. An item of at most pool.k tokens keeps all of them."""
        return torch.where(pool.count <= pool.k, pool.count, torch.minimum(self.counts(pool), pool.count))

    def widest(self, k: int) -> int:
        """Upper bound of `counts` for a requested k."""
        raise NotImplementedError(f"{self.name}: a method that is adaptive writes widest()")

    def selection(self, pool: Pool) -> Selection:
        """`pick` without gradient, with slots past each item's count set to -1 and `method` filled in."""
        with torch.no_grad():
            picked = self.pick(pool)
            self._check_picked(picked, pool)
            slot = torch.arange(pool.k, device=pool.device)
            order = picked.order.masked_fill(slot >= pool.count[:, None], -1)
            self._check_order(order, pool)
        return replace(picked, order=order, method=self)

    def _check_picked(self, picked: Any, pool: Pool) -> None:
        """Checks types and shapes of what `pick` returned."""
        op = f"{self.name}.pick"
        if not isinstance(picked, Selection):
            raise TypeError(f"{op}: must return a Selection, got {type(picked).__name__}")
        _checks.tensor(op, "order", picked.order, (torch.int64,), "(B, k)")
        if picked.order.shape != (pool.batch, pool.k):
            expected = f"(B, k) = {(pool.batch, pool.k)}"
            raise ValueError(f"{op}: order must have shape {expected}, got {tuple(picked.order.shape)}")
        if (picked.assignment is not None) != self.merges:
            how = "an assignment, for merges is True" if self.merges else "no assignment, for merges is False"
            raise ValueError(f"{op}: the Selection must have {how}")

    def _check_order(self, order: Tensor, pool: Pool) -> None:
        """Checks that each item's picks are distinct tokens of it, if the values are readable."""
        if not _checks.values_readable(order):
            return
        slots = torch.where((order >= 0) & (order < pool.count[:, None]), order, pool.tokens)
        picked = pool.present.new_zeros(pool.batch, pool.tokens + 1).scatter_(1, slots, True)[:, : pool.tokens]
        wrong = picked.sum(1) != pool.count.clamp(max=pool.k)
        if wrong.any():
            item = int(wrong.nonzero()[0])
            tokens = f"distinct tokens of 0 to {int(pool.count[item]) - 1} in item {item}"
            raise ValueError(f"{self.name}.pick: order must hold {tokens}, got {order[item].tolist()}")

    def pick(self, pool: Pool) -> Selection:
        """The method's own rule, on checked input. Slots past an item's count may hold any value."""
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
        """Picks budgets[i] tokens of each packed item i, bit for bit as `select` of that item alone.

        Args:
            lengths, budgets: one host int for each item, 0 <= budget <= length.
            features: (T, C), T = sum(lengths).
            scores: (T,).
            keys: (T, D).
            text: (items, M, C).

        Returns:
            A packed Selection. Nothing is read back to the host. Items of equal length and budget run as one batch.
        """
        if self.site is None:
            raise ValueError(f"{self.name}: prunes inside the LLM only, so there is nothing to select before it")
        selection: Selection = _packed.select(self, lengths, budgets, features, scores, text, keys)
        return selection

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
        """Budgets to pass to `select_packed`, from the requested ones. Same arguments as `select_packed`.

        Adaptive methods: `counts` of each item, with one device-to-host read. Other methods: `budgets` unchanged.
        """
        if not self.adaptive:
            return budgets
        return _packed.fit_budgets(self, lengths, budgets, features, scores, text, keys)

    def merge(self, features: Tensor, selection: Selection) -> Tensor:
        """Rows (B, k, C) of a padded `selection`: weighted mean of the tokens assigned to each slot.

        Methods with another merge rule override it. `methods.merge` checks the arguments before calling it.
        """
        return _merge.weighted_mean(features, selection.order, selection.assignment, selection.weight)

    def raters(
        self, visual: Tensor, text: Tensor, visual_mask: Tensor | None = None, text_mask: Tensor | None = None
    ) -> Tensor:
        """Weights of the prompt's text tokens as raters of the visual tokens, for cuts with queries="raters".

        A visual token's score is the sum over text tokens of weight * attention (mean over heads).

        Args:
            visual: (B, N, C), embeddings of the visual tokens that enter the LLM. visual_mask: (B, N) bool.
            text: (B, M, C), embeddings of the text tokens after the last image. text_mask: (B, M) bool.

        Returns:
            (B, M) float32, non-negative, rows of sum 1. Masked tokens weigh 0.
        """
        raise NotImplementedError(f"{self.name}: no cut of this method asks for raters")

    def options(self) -> dict[str, Any]:
        """Option values by name."""
        return {own.name: getattr(self, own.name) for own in fields(self)}
