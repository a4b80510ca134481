"""FastV: top visual tokens by attention of the prompt's last token, early in the LLM."""

from dataclasses import dataclass
from typing import ClassVar

from .. import _checks
from ._budget import Budget, everything, one_cut
from .base import Cut, Method, Plan, option


@dataclass(frozen=True)
class FastV(Method):
    """After `prune_layer` layers, keeps the visual tokens with the most attention from the prompt's last token.

    The attention is that of layer `prune_layer` - 1, mean over heads. Position ids stay original.

    The paper describes attention received from all tokens; this follows its code.
    """

    name: ClassVar[str] = "fastv"
    paper: ClassVar[str] = (
        "An Image is Worth 1/2 Tokens After Layer 2: Plug-and-Play Inference Acceleration for Large Vision-Language "
        "Models, arXiv 2403.06764"
    )
    site: ClassVar[None] = None
    takes: ClassVar[tuple[str, ...]] = ("budget", "layers", "ratios")

    prune_layer: int | None = option(None, "layers that run on all tokens (the paper's K); None: 2")
    ratio: float = option(0.5, "share of the tokens that stays, without a budget or ratios (the paper's 1 - R)")

    def __post_init__(self) -> None:
        if self.prune_layer is not None:
            _checks.integer(self.name, "prune_layer", self.prune_layer, 1)
        _checks.share(self.name, "ratio", self.ratio)

    def make_plan(self, budget: Budget, layers: int, default_layer: int | None) -> Plan:
        layer, keep = one_cut(self.name, budget, self.prune_layer, self.ratio, layers)
        return Plan(layers, everything, (Cut(layer, keep),))
