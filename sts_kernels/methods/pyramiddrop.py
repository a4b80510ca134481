"""PyramidDrop: drops more visual tokens at each of several LLM layers."""

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from .. import _checks
from ._budget import Budget, common_ratio, everything, prompt_total, prune_layers, solved, take
from .base import Cut, Method, Plan, option


@dataclass(frozen=True)
class PyramidDrop(Method):
    """At each prune layer, keeps the visual tokens with the most attention from the prompt's last token.

    The attention is computed from query and key of the next layer. Position ids become contiguous.

    Without `layers`, it prunes after each of the first three quarters of the LLM (8, 16, 24 of 32 layers). Without
    `ratios`, the i-th prune layer keeps ratio^i of the original tokens, rounded down. With a budget, the ratio is
    solved for it.
    """

    name: ClassVar[str] = "pyramiddrop"
    paper: ClassVar[str] = (
        "PyramidDrop: Accelerating Your Large Vision-Language Models via Pyramid Visual Redundancy Reduction, "
        "arXiv 2410.17247"
    )
    site: ClassVar[None] = None
    positions: ClassVar[str] = "contiguous"
    takes: ClassVar[tuple[str, ...]] = ("budget", "layers", "ratios")

    ratio: float = option(0.5, "share of its tokens that each prune layer leaves, without a budget or ratios (lambda)")

    def __post_init__(self) -> None:
        _checks.share(self.name, "ratio", self.ratio)

    def make_plan(self, budget: Budget, layers: int, default_layer: int | None) -> Plan:
        places = prune_layers(self.name, budget, layers, quarters)
        if budget.ratios is not None:
            keeps = [partial(floor_share, ratio) for ratio in budget.ratios]
        elif budget.budget is None:
            keeps = [partial(floor_share, float(self.ratio) ** (i + 1)) for i in range(len(places))]
        else:
            if isinstance(budget.budget, float):
                common_ratio(self.name, budget.budget, places, layers)  # raises if no image can meet the budget
            keeps = [partial(solved, self.name, budget.budget, None, places, layers, i + 1) for i in range(len(places))]
        cuts = (Cut(layer, partial(prompt_total, keeps[: i + 1]), score_from="next") for i, layer in enumerate(places))
        return Plan(layers, everything, tuple(cuts))


def quarters(layers: int) -> tuple[int, ...]:
    """The prune layers after 1/4, 2/4 and 3/4 of `layers`, at least 1 each, without repeats."""
    return tuple(sorted({max(1, layers * i // 4) for i in (1, 2, 3)}))


def floor_share(share: float | int, tokens: int) -> int:
    """The official code's int(N ratio), at least 1 for a non-empty image. An int share is a number of tokens."""
    return take(share, tokens) if isinstance(share, int) or not share else min(tokens, max(1, int(share * tokens)))
