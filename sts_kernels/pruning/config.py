"""What STS keeps: the configuration a user writes, and the budget rule it solves (STS, section 5.1)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from .. import _checks

ANCHORS = ("mean", "first", "saliency")
SCOPES = ("image", "crop")


def _amount(name: str, value) -> None:
    """A number of tokens (int) or a share of them (float up to 1)."""
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"STSConfig: {name} must be a number of tokens (int) or a share of them (float), got {value!r}")
    if isinstance(value, int) and value < 1:
        raise ValueError(f"STSConfig: {name} must be at least 1 token, got {value}")
    if isinstance(value, float) and not 0 < value <= 1:
        raise ValueError(
            f"STSConfig: {name} as a share must be above 0 and at most 1.0, got {value}; a number of tokens is an int"
        )


def _take(amount: int | float, tokens: int) -> int:
    """`amount`, an int or a share, of `tokens`: at least one, at most all."""
    wanted = amount if isinstance(amount, int) else _round(amount * tokens)
    return min(tokens, max(1, wanted))


def _round(value: float) -> int:
    return math.floor(value + 0.5)


@dataclass(frozen=True)
class STSConfig:
    """How many visual tokens STS keeps, and where.

    Give either `budget`, or `keep` and/or `keep_after`. Each is a number of tokens (int) or a share of them (float).

    Args:
        budget: the average over the LLM's layers of the visual tokens of one image (or clip): STS's advertised budget.
            With p = prune_layer of L layers, ``keep = budget * L / (p + (L - p) * rho)`` before layer p and `rho` of
            that from it on: 128 gives 192 and 64 where p is half of L. Where the image has fewer tokens than `keep`,
            all of them stay before layer p and `keep_after` makes up for it, so that the average still is the budget.
        keep: tokens of each image that stage 1 passes to the LLM. Alone it leaves `rho` of them after stage 2;
            with ``keep_after=1.0`` or ``rho=1.0`` stage 1 works alone.
        keep_after: visual tokens of a prompt, over all its images together, that stage 2 leaves from prune_layer on.
            A share is one of all its visual tokens. Alone, stage 2 works alone (LLM-only).
        prune_layer: layers 0 .. prune_layer - 1 run on all that stage 1 kept; the score is taken in layer
            prune_layer - 1; layers from prune_layer on run on what stage 2 left. None: the model family's default.
        rho: share of stage 1's tokens that stage 2 leaves, where `keep_after` does not say.
        eps: of `repulsion_select`, 1e-30 to 1e30, in units of features squared.
        anchor: stage 1's first pick: the token nearest the mean ("mean"), token 0 ("first"), or the one that the
            vision encoder pays most attention ("saliency").
        scope: what tokens repel each other: all of an image or clip ("image"), or the crops, tiles or frames of an
            image each for itself with an even part of its budget ("crop").

    Raises:
        TypeError, ValueError: a value that is none of these, or a combination that says too much or too little.
    """

    budget: int | float | None = None
    keep: int | float | None = None
    keep_after: int | float | None = None
    prune_layer: int | None = None
    rho: float = 1 / 3
    eps: float = 1e-6
    anchor: str = "mean"
    scope: str = "image"

    def __post_init__(self):
        for name in ("budget", "keep", "keep_after"):
            _amount(name, getattr(self, name))
        if self.budget is None and self.keep is None and self.keep_after is None:
            raise ValueError("STSConfig: give budget, keep or keep_after, for example STSConfig(budget=128)")
        if self.budget is not None and (self.keep is not None or self.keep_after is not None):
            raise ValueError("STSConfig: give either budget, or keep and keep_after; budget solves for the other two")
        if self.prune_layer is not None:
            _checks.integer("STSConfig", "prune_layer", self.prune_layer, 1)
        if isinstance(self.rho, bool) or not isinstance(self.rho, int | float):
            raise TypeError(f"STSConfig: rho must be a float, got {self.rho!r}")
        if not 0 < self.rho <= 1:
            raise ValueError(f"STSConfig: rho must be above 0 and at most 1, got {self.rho}")
        _checks.eps("STSConfig", self.eps)
        for name, allowed in (("anchor", ANCHORS), ("scope", SCOPES)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"STSConfig: {name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")

    def plan(self, layers: int, default_prune_layer: int | None = None) -> "STSPlan":
        """Fits the configuration to an LLM of `layers` layers.

        Without a prune_layer of its own it takes `default_prune_layer` where the LLM is that deep, else half the
        layers.

        Raises:
            ValueError: the LLM has no such layer.
        """
        layer = self.prune_layer
        if layer is None:
            deep_enough = default_prune_layer is not None and default_prune_layer < layers
            layer = default_prune_layer if deep_enough else max(1, layers // 2)
        elif layer >= layers:
            raise ValueError(
                f"STSConfig: prune_layer must be at most {layers - 1}, the LLM has {layers} layers, got {layer}"
            )
        return STSPlan(replace(self, prune_layer=layer), layers)


@dataclass(frozen=True)
class STSPlan:
    """A configuration fitted to an LLM: it answers how many tokens each stage keeps."""

    config: STSConfig
    layers: int

    @property
    def prune_layer(self) -> int:
        return self.config.prune_layer

    def keep(self, tokens: int) -> int:
        """Tokens of an image of `tokens` that stage 1 keeps."""
        config = self.config
        if config.budget is None:
            return tokens if config.keep is None else _take(config.keep, tokens)
        budget = _take(config.budget, tokens)
        if budget == tokens:
            return tokens
        shallow, deep = config.prune_layer, self.layers - config.prune_layer
        return min(tokens, max(1, _round(budget * self.layers / (shallow + deep * config.rho))))

    def keep_after(self, images: Sequence[int]) -> int:
        """Visual tokens that stage 2 leaves of a prompt whose images have these numbers of tokens."""
        config = self.config
        kept = [self.keep(tokens) for tokens in images]
        if not sum(kept):
            return 0
        if config.keep_after is not None:
            wanted = config.keep_after
            after = wanted if isinstance(wanted, int) else max(1, _round(wanted * sum(images)))
        else:
            after = sum(map(self._share_after, images, kept))
        return min(sum(kept), after)

    def _share_after(self, tokens: int, kept: int) -> int:
        """One image's part of the tokens left by stage 2."""
        config = self.config
        if not kept:
            return 0
        if config.budget is None:
            return max(1, _round(config.rho * kept))
        total = _take(config.budget, tokens) * self.layers
        left = (total - config.prune_layer * kept) / (self.layers - config.prune_layer)
        return min(kept, max(1, _round(left)))

    def average(self, kept: int, after: int) -> float:
        """Visual tokens averaged over the layers: `kept` before prune_layer, `after` from it on."""
        return (self.prune_layer * kept + (self.layers - self.prune_layer) * after) / self.layers


def split_evenly(total: int, capacities: Sequence[int]) -> list[int]:
    """Splits `total` into parts as even as the capacities allow; earlier parts take the odd ones."""
    parts, left, open_parts = [0] * len(capacities), min(total, sum(capacities)), len(capacities)
    for index in sorted(range(len(capacities)), key=lambda i: (capacities[i], -i)):
        parts[index] = min(capacities[index], left // open_parts)
        left, open_parts = left - parts[index], open_parts - 1
    return parts
