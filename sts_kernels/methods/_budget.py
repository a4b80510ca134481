"""Numbers of tokens: what a user asks for, and the arithmetic that all methods share. Host integers only."""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from .. import _checks


def check_amount(op: str, name: str, value) -> None:
    """A number of tokens (int) or a share of them (float up to 1)."""
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{op}: {name} must be a number of tokens (int) or a share of them (float), got {value!r}")
    if isinstance(value, int) and value < 1:
        raise ValueError(f"{op}: {name} must be at least 1 token, got {value}")
    if isinstance(value, float) and not 0 < value <= 1:
        raise ValueError(
            f"{op}: {name} as a share must be above 0 and at most 1.0, got {value}; a number of tokens is an int"
        )


def check_share(op: str, name: str, value) -> None:
    """A float above 0 and at most 1."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{op}: {name} must be a float, got {value!r}")
    if not 0 < value <= 1:
        raise ValueError(f"{op}: {name} must be above 0 and at most 1, got {value}")


def round_half_up(value: float) -> int:
    return math.floor(value + 0.5)


def take(amount: int | float, tokens: int) -> int:
    """`amount`, an int or a share, of `tokens`: at least one, at most all; of an amount of 0, or of no tokens, none."""
    if not amount:
        return 0
    wanted = amount if isinstance(amount, int) else round_half_up(amount * tokens)
    return min(tokens, max(1, wanted))


def everything(tokens: int) -> int:
    """The `keep` of a plan that prunes nothing before the LLM."""
    return tokens


def split_evenly(total: int, capacities: Sequence[int]) -> list[int]:
    """Splits `total` into parts as even as the capacities allow; earlier parts take the odd ones."""
    parts, left, open_parts = [0] * len(capacities), min(total, sum(capacities)), len(capacities)
    for index in sorted(range(len(capacities)), key=lambda i: (capacities[i], -i)):
        parts[index] = min(capacities[index], left // open_parts)
        left, open_parts = left - parts[index], open_parts - 1
    return parts


@dataclass(frozen=True)
class Budget:
    """How many visual tokens a user asks for. The options are the same for all methods: an int is a number of tokens,
    a float a share of them. `Method.plan` checks them, so that an error names the method.

    Args:
        budget: visual tokens of one image, averaged over the LLM's layers.
        keep: tokens of each image that enter the LLM.
        layers: where the LLM prunes: behind its first `layers[i]` layers, ascending.
        ratios: what each prune layer leaves of an image: a share of its original tokens, or a number of tokens. 0 drops
            them all.
    """

    budget: int | float | None = None
    keep: int | float | None = None
    layers: Sequence[int] | None = None
    ratios: Sequence[float | int] | None = None

    def check(self, method: str, takes: Sequence[str], layers: int) -> None:
        """Raises TypeError or ValueError for values that are none, options that `method` does not take (it takes
        `takes`), combinations that say too much, and layers that an LLM of `layers` layers lacks."""
        for name in ("budget", "keep", "layers", "ratios"):
            if getattr(self, name) is not None and name not in takes:
                raise ValueError(f"{method}: {name} is not an option of this method, give {' or '.join(takes)}")
        check_amount(method, "budget", self.budget)
        check_amount(method, "keep", self.keep)
        if self.budget is not None and (self.keep is not None or self.ratios is not None):
            other = "keep" if self.keep is not None else "ratios"
            raise ValueError(f"{method}: give either budget or {other}; budget solves for the rest")
        if self.layers is not None:
            _check_layers(method, self.layers, layers)
        if self.ratios is not None:
            _check_ratios(method, self.ratios)
        if self.layers is not None and self.ratios is not None and len(self.layers) != len(self.ratios):
            raise ValueError(
                f"{method}: ratios must have one number for each of the {len(self.layers)} layers, "
                f"got {len(self.ratios)}"
            )


def check_layer(method: str, name: str, value, layers: int) -> None:
    """A layer that something can be pruned behind, in an LLM of `layers` layers."""
    _checks.integer(method, name, value, 1)
    if value >= layers:
        raise ValueError(f"{method}: {name} must be at most {layers - 1}, the LLM has {layers} layers, got {value}")


def _check_layers(method: str, values, layers: int) -> None:
    if isinstance(values, str) or not isinstance(values, Sequence):
        raise TypeError(f"{method}: layers must be a list of ints, got {values!r}")
    for value in values:
        check_layer(method, "layers", value, layers)
    if not values or any(b <= a for a, b in itertools.pairwise(values)):
        raise ValueError(f"{method}: layers must name at least one layer and ascend, got {list(values)}")


def _check_ratios(method: str, values) -> None:
    if isinstance(values, str) or not isinstance(values, Sequence):
        raise TypeError(f"{method}: ratios must be a list of shares (float) or numbers of tokens (int), got {values!r}")
    for value in values:
        if isinstance(value, bool) or value != 0:
            check_amount(method, "ratios", value)


def prompt_total(keeps: Sequence[Callable[[int], int]], images: Sequence[int]) -> int:
    """Visual tokens of a prompt behind several prunings: of each image the smallest of what `keeps` leave of it."""
    return sum(min(keep(tokens) for keep in keeps) for tokens in images)


def shares_of(ratios: Sequence[float | int]) -> list[Callable[[int], int]]:
    return [partial(take, ratio) for ratio in ratios]


def solve_after(method: str, budget: int | float, layer: int, layers: int, tokens: int) -> int:
    """Tokens of an image of `tokens` left behind `layer`, so that the average over the layers is `budget`.

    B = (p N + (L - p) K') / L, solved for K'; N tokens enter the LLM.

    Raises:
        ValueError: the layers before `layer` use up the budget.
    """
    wanted = take(budget, tokens)
    left = round_half_up((wanted * layers - layer * tokens) / (layers - layer))
    if tokens and left < 1:
        least = (layer * tokens + (layers - layer)) / layers
        raise ValueError(
            f"{method}: budget must be at least {math.ceil(least)} of an image's {tokens} tokens, "
            f"{layer} of {layers} layers run on all of them, got {budget}"
        )
    return left


def prompt_after(method: str, budget: int | float, layer: int, layers: int, images: Sequence[int]) -> int:
    """`solve_after` over the images of a prompt."""
    return sum(solve_after(method, budget, layer, layers, tokens) for tokens in images)


def check_after(method: str, budget: int | float, layer: int, layers: int) -> None:
    """Refuses a share that no image can meet, before there is an image."""
    if isinstance(budget, float) and budget <= layer / layers:
        raise ValueError(
            f"{method}: budget must be above {layer / layers:.3g} of the tokens, {layer} of {layers} layers run on all "
            f"of them, got {budget}"
        )
