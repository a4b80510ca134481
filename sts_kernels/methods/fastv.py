"""FastV: the tokens that the prompt's last token attends to early in the LLM."""

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from .. import _checks
from ._budget import Budget, check_after, check_layer, check_share, everything, prompt_after, prompt_total, shares_of
from .base import Cut, Method, Plan, option


@dataclass(frozen=True)
class FastV(Method):
    """Behind layer `prune_layer` the visual tokens stay to which the prompt's last token pays most attention in the
    layer before (mean over heads). Positions stay.

    The paper says attention received from all tokens; this is what its code does.
    """

    name: ClassVar[str] = "fastv"
    paper: ClassVar[str] = (
        "An Image is Worth 1/2 Tokens After Layer 2: Plug-and-Play Inference Acceleration for Large Vision-Language "
        "Models, arXiv 2403.06764"
    )
    site: ClassVar[None] = None
    takes: ClassVar[tuple[str, ...]] = ("budget", "layers", "ratios")

    prune_layer: int = option(2, "layers that run on all tokens (the paper's K)")
    ratio: float = option(0.5, "share of the tokens that stays, without a budget or ratios (the paper's 1 - R)")

    def __post_init__(self):
        _checks.integer(self.name, "prune_layer", self.prune_layer, 1)
        check_share(self.name, "ratio", self.ratio)

    def make_plan(self, budget: Budget, layers: int, default_layer: int | None) -> Plan:
        if budget.layers is not None and self.prune_layer != 2:
            raise ValueError(f"{self.name}: give either prune_layer or layers, both name the layer")
        if budget.layers is None:
            check_layer(self.name, "prune_layer", self.prune_layer, layers)
        named = (self.prune_layer,) if budget.layers is None else tuple(budget.layers)
        if len(named) != 1:
            raise ValueError(f"{self.name}: layers must name one layer, got {list(named)}")
        if budget.budget is None:
            keep = partial(prompt_total, shares_of(budget.ratios or [float(self.ratio)]))
        else:
            check_after(self.name, budget.budget, named[0], layers)
            keep = partial(prompt_after, self.name, budget.budget, named[0], layers)
        return Plan(layers, everything, (Cut(named[0], keep),))
