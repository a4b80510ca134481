"""Options of the plugin: `sts` in the model's configuration, or STS_KERNELS_KEEP. Does not import vLLM.

Both the front end, which sizes the prompt, and the workers, which select tokens, read them.
"""

import functools
import json
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ... import __version__, methods
from ...methods import Budget, Method, Plan
from ...methods._budget import AMOUNT, check_amount, parse_amount
from ...methods.base import POSITIONS, SCOPES

if TYPE_CHECKING:
    from transformers import PretrainedConfig

VARIABLE = "STS_KERNELS_KEEP"
ALONE = {"sts": {"rho": 1.0}}  # options that turn off a method's pruning inside the LLM
INSIDE = ("layers", "ratios", "prune_layer", "score_from", "llm_only")
ONE_LENGTH = "which vLLM cannot serve: all layers of its paged cache hold the same tokens"


class Refused(RuntimeError):
    """The options cannot be served; the message is one sentence. Not a ValueError: vLLM then serves text only."""


def refuse(sentence: str, reasons: dict[str, object]) -> None:
    """Raises Refused(sentence % reason) for the first reason whose value is true."""
    for reason, holds in reasons.items():
        if holds:
            raise Refused(f"sts_kernels: {sentence % reason}")


@dataclass(frozen=True)
class Settings:
    method: Method
    plan: Plan
    scope: str  # candidates of one selection: "image" or "crop"
    positions: str  # position ids of the kept tokens: "original" or "contiguous"
    options: dict[str, Any]  # the options as given

    def tag(self) -> str:
        """Cache key of the pruning: package version and options. Also used in filenames."""
        return "-".join(["sts", __version__, *(f"{name}={value}" for name, value in sorted(self.options.items()))])

    def __str__(self) -> str:
        amount = self.options.get("keep", self.options.get("budget"))
        tokens = f"{amount} tokens" if isinstance(amount, int) else f"{amount:g} of the tokens"
        return f"{self.method.name} keeps {tokens} of each image before the LLM, at {self.positions} positions"


def from_variable() -> dict[str, Any] | None:
    """The options set by STS_KERNELS_KEEP; None if it is not set."""
    text = os.environ.get(VARIABLE, "").strip()
    if not text:
        return None
    try:
        amount = parse_amount(text)
        check_amount("sts_kernels", VARIABLE, amount)
    except ValueError:
        raise Refused(f"sts_kernels: {VARIABLE} must be {AMOUNT}, got {text!r}") from None
    return {"keep": amount}


def read(config: "PretrainedConfig") -> Settings:
    """The settings of a configuration, or of STS_KERNELS_KEEP if the configuration has none.

    Raises:
        Refused: no options; an unknown or bad option; or a method that vLLM cannot serve.
    """
    options = getattr(config, "sts", None) or from_variable()
    example = f'{VARIABLE}=128, or "sts": {{"keep": 128}} in --hf-overrides'
    refuse(f"%s, such as {example}", {"say how many tokens to keep": not isinstance(options, dict)})
    return _read(json.dumps(options, sort_keys=True), config.get_text_config().num_hidden_layers)


@functools.lru_cache(maxsize=64)
def _read(text: str, layers: int) -> Settings:
    options = json.loads(text)
    own = {"scope": None, "positions": None, "method": "sts", **options}
    scope, positions, name = own.pop("scope"), own.pop("positions"), own.pop("method")
    budget = {key: own.pop(key) for key in ("budget", "keep") if key in own}
    refuse(f"%s is about pruning inside the LLM, {ONE_LENGTH}; give keep alone", {name: name in own for name in INSIDE})
    try:
        method = methods.create(name, **{**ALONE.get(name, {}), **own})
        plan = method.plan(Budget(**budget), layers)
        for key, value, allowed in (("scope", scope, SCOPES), ("positions", positions, POSITIONS)):
            if value not in (None, *allowed):
                raise ValueError(f"{key} must be one of {', '.join(allowed)}, got {value!r}")
    except (TypeError, ValueError) as error:
        raise Refused(f"sts_kernels: {error}") from error
    foreign = " and ".join(sorted(method.signals & {"relevance", "text"}))
    last = method.encoder_attention == "last" and method.signals & {"attention", "keys"}
    refuse(
        f"{method.name} %s",
        {
            f"prunes inside the LLM, {ONE_LENGTH}": method.site is None or plan.cuts,
            "keeps a number of tokens that depends on them; vLLM sizes a prompt before it sees them": method.adaptive,
            f"looks at the {foreign} of a prompt, which vLLM does not show the vision encoder": foreign,
            "looks at the vision encoder's last layer, which vLLM does not build": last,
        },
    )
    return Settings(method, plan, scope or method.scope, positions or method.positions, options)
