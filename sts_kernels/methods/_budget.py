"""Token budgets: the user's options, and the arithmetic that all methods share. Host integers only."""

import functools
import itertools
import math
import numbers
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from .. import _checks

AMOUNT = "a number of tokens or a share of them, such as 128 or 0.25"


def parse_amount(text: str) -> int | float:
    """Reads a number of tokens, or a share of them, which has a decimal point or an exponent."""
    try:
        return int(text)
    except ValueError:
        return float(text)


def check_amount(op: str, name: str, value: Any) -> None:
    """Checks that `value` is None, a number of tokens (int >= 1) or a share of tokens (float in (0, 1])."""
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


def python_numbers(options: Any, *names: str) -> None:
    """Replaces NumPy's integers and floats in fields of a frozen dataclass by Python's. Other values stay."""
    for name in names:
        value = getattr(options, name)
        if isinstance(value, list | tuple):
            object.__setattr__(options, name, type(value)(map(_python_number, value)))
        else:
            object.__setattr__(options, name, _python_number(value))


def _python_number(value: Any) -> Any:
    if isinstance(value, int | float):  # bool too
        return value
    if isinstance(value, numbers.Integral):
        return int(value)
    return float(value) if isinstance(value, numbers.Real) else value


def round_half_up(value: float) -> int:
    return math.floor(value + 0.5)


def take(amount: int | float, tokens: int) -> int:
    """Resolves `amount`, an int or a share of `tokens`, to a number in [1, tokens]. 0 if amount or tokens is 0."""
    if not amount:
        return 0
    wanted = amount if isinstance(amount, int) else round_half_up(amount * tokens)
    return min(tokens, max(1, wanted))


def everything(tokens: int) -> int:
    """`Plan.keep` of a plan without pruning before the LLM: returns `tokens`."""
    return tokens


def split_evenly(total: int, capacities: Sequence[int]) -> list[int]:
    """Splits `total` as evenly as the capacities allow; earlier parts get the remainder. Caps at sum(capacities)."""
    parts, left = list(capacities), min(total, sum(capacities))
    smallest_first = sorted(range(len(capacities)), key=capacities.__getitem__)
    for done, index in enumerate(smallest_first):
        share, extra = divmod(left, len(capacities) - done)
        if capacities[index] > share:  # no other part is full either
            for turn, other in enumerate(sorted(smallest_first[done:])):
                parts[other] = share + (turn < extra)
            break
        left -= capacities[index]
    return parts


@dataclass(frozen=True)
class Budget:
    """The number of visual tokens to keep. An int is a number of tokens, a float a share of the image's tokens.

    `Method.plan` checks the values, so that an error names the method.

    Args:
        budget: visual tokens of one image, averaged over the LLM's layers.
        keep: tokens of each image that enter the LLM.
        layers: prune layers, ascending: prune after the first `layers[i]` layers of the LLM.
        ratios: tokens of an image kept by each prune layer, as a share of its original tokens or a number of tokens.
            0 drops all of them.
    """

    budget: int | float | None = None
    keep: int | float | None = None
    layers: Sequence[int] | None = None
    ratios: Sequence[float | int] | None = None

    def __post_init__(self) -> None:
        python_numbers(self, "budget", "keep", "layers", "ratios")

    def check(self, method: str, takes: Sequence[str], layers: int) -> None:
        """Checks the options for `method`, which takes those named in `takes`, and an LLM of `layers` layers.

        Raises:
            TypeError, ValueError: bad value, option not in `takes`, conflicting options, or layer out of range.
        """
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


def check_layer(method: str, name: str, value: Any, layers: int) -> None:
    """Checks a prune layer: an int with 1 <= value < layers."""
    _checks.integer(method, name, value, 1)
    if value >= layers:
        raise ValueError(f"{method}: {name} must be at most {layers - 1}, the LLM has {layers} layers, got {value}")


def _check_layers(method: str, values: Any, layers: int) -> None:
    if isinstance(values, str) or not isinstance(values, Sequence):
        raise TypeError(f"{method}: layers must be a list of ints, got {values!r}")
    for value in values:
        check_layer(method, "layers", value, layers)
    if not values or any(b <= a for a, b in itertools.pairwise(values)):
        raise ValueError(f"{method}: layers must name at least one layer and ascend, got {list(values)}")


def _check_ratios(method: str, values: Any) -> None:
    if isinstance(values, str) or not isinstance(values, Sequence) or None in values:
        raise TypeError(f"{method}: ratios must be a list of shares (float) or numbers of tokens (int), got {values!r}")
    if not values:
        raise ValueError(f"{method}: ratios must name at least one amount, got {values!r}")
    for value in values:
        if isinstance(value, bool) or value != 0:
            check_amount(method, "ratios", value)


def prompt_total(keeps: Sequence[Callable[[int], int]], images: Sequence[int]) -> int:
    """Visual tokens of a prompt after successive prunings: sum over images of min over `keeps` of keep(tokens)."""
    return sum(min(keep(tokens) for keep in keeps) for tokens in images)


def shares_of(ratios: Sequence[float | int]) -> list[Callable[[int], int]]:
    return [partial(take, ratio) for ratio in ratios]


def solve_after(method: str, budget: int | float, layer: int, layers: int, tokens: int) -> int:
    """Tokens of an image kept after `layer` layers, so that the average over the layers is `budget`.

    Solves B = (p N + (L - p) K') / L for K', with p = layer, L = layers, and N = tokens, all of which enter the LLM.

    Raises:
        ValueError: the first `layer` layers use up the budget.
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
    """Sum of `solve_after` over the images of a prompt."""
    return sum(solve_after(method, budget, layer, layers, tokens) for tokens in images)


def check_after(method: str, budget: int | float, layer: int, layers: int) -> None:
    """Refuses a budget share that no number of tokens can meet. Raises ValueError."""
    if isinstance(budget, float) and budget <= layer / layers:
        raise ValueError(
            f"{method}: budget must be above {layer / layers:.3g} of the tokens, {layer} of {layers} layers run on all "
            f"of them, got {budget}"
        )


def one_cut(
    name: str, budget: Budget, prune_layer: int | None, ratio: float, layers: int
) -> tuple[int, Callable[[Sequence[int]], int]]:
    """Prune layer and `Cut.keep` of a method with one cut.

    `budget.budget` or `budget.ratios` sets the number of tokens; without them, `ratio` does. prune_layer: the method's
    option; None: 2.

    Raises:
        ValueError: prune_layer and layers both given, several layers, a layer out of range, or an impossible budget.
    """
    layer = 2 if prune_layer is None else prune_layer
    if budget.layers is None:
        check_layer(name, "prune_layer", layer, layers)
    elif prune_layer is not None:
        raise ValueError(f"{name}: give either prune_layer or layers, both name the layer")
    elif len(budget.layers) != 1:
        raise ValueError(f"{name}: layers must name one layer, got {list(budget.layers)}")
    else:
        layer = budget.layers[0]
    if budget.budget is None:
        return layer, partial(prompt_total, shares_of(budget.ratios or [float(ratio)]))
    check_after(name, budget.budget, layer, layers)
    return layer, partial(prompt_after, name, budget.budget, layer, layers)


def prune_layers(
    method: str, budget: Budget, layers: int, default: Callable[[int], tuple[int, ...]]
) -> tuple[int, ...]:
    """Prune layers of a method with several cuts: those of the budget, or else `default(layers)`.

    Raises:
        ValueError: the LLM has one layer, or the number of ratios is not that of the layers.
    """
    if layers < 2:
        raise ValueError(f"{method}: layers of the LLM must be at least 2, got {layers}")
    places = default(layers) if budget.layers is None else tuple(budget.layers)
    if budget.ratios is not None and len(budget.ratios) != len(places):
        raise ValueError(
            f"{method}: ratios must have one number for each of the layers {list(places)}, got {len(budget.ratios)}"
        )
    return places


def early_layers(layers: int) -> tuple[int, ...]:
    """Prune layers: (3, 7, 16) for 32 layers and more, (3, 7, 13) for 28; published for 28, 32 and 40 layers.

    Other LLMs of fewer than 32 layers are pruned at the same relative depths as an LLM of 32 layers.
    """
    if layers >= 32:
        return (3, 7, 16)
    if layers == 28:
        return (3, 7, 13)
    return tuple(sorted({max(1, round_half_up(layers * place / 32)) for place in (3, 7, 16)}))


@functools.lru_cache(maxsize=4096)
def common_ratio(method: str, share: float, places: tuple[int, ...], layers: int) -> float:
    """The ratio r in (0, 1] for which keeping r^i of the tokens after the i-th prune layer averages to `share`.

    The average is over the LLM's layers. Found by bisection.

    Raises:
        ValueError: the layers before the first prune layer use up the share.
    """
    if share <= places[0] / layers:
        raise ValueError(
            f"{method}: budget must be above {places[0] / layers:.3g} of the tokens, {places[0]} of {layers} "
            f"layers run on all of them, got {share:.3g}"
        )
    ends = [*places[1:], layers]
    low, high = 0.0, 1.0
    for _ in range(60):
        ratio = (low + high) / 2
        average = places[0] + sum(ratio ** (i + 1) * (e - p) for i, (p, e) in enumerate(zip(places, ends, strict=True)))
        low, high = (ratio, high) if average < share * layers else (low, ratio)
    return high


def entering(factor: float | None, budget: int | float, tokens: int) -> int:
    """Tokens of an image that enter the LLM: factor * budget, at most `tokens`. factor=None: all tokens."""
    if factor is None or not tokens:
        return tokens
    return min(tokens, max(1, round_half_up(factor * take(budget, tokens))))


def solved(
    method: str,
    budget: int | float,
    factor: float | None,
    places: tuple[int, ...],
    layers: int,
    stage: int,
    tokens: int,
) -> int:
    """Tokens of an image kept by prune layer number `stage` (1-based).

    Each stage keeps the same share of the stage before, starting from `entering` tokens. The share is solved for an
    average over the layers of `budget`.

    Raises:
        ValueError: the layers before the first prune layer use up the budget.
    """
    if not tokens:
        return 0
    wanted, first = take(budget, tokens), entering(factor, budget, tokens)
    try:
        ratio = common_ratio(method, wanted / first, places, layers)
    except ValueError:
        least = math.floor(places[0] * first / layers) + 1
        raise ValueError(
            f"{method}: budget must be at least {least} of an image's {tokens} tokens, {places[0]} of {layers} layers "
            f"run on {'all' if first == tokens else first} of them, got {budget}"
        ) from None
    return take(ratio**stage, first)
