"""What the plugin is asked for: `sts` in the model's configuration, or STS_KERNELS_KEEP. Needs no vLLM.

Both sides of vLLM read it: the front end, which sizes the prompt, and the workers, which pick.
"""

import functools
import json
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ... import __version__, methods
from ...methods import Budget, Method, Plan
from ...methods._budget import check_amount

if TYPE_CHECKING:
    from transformers import PretrainedConfig

VARIABLE = "STS_KERNELS_KEEP"
SCOPES, POSITIONS = ("image", "crop"), ("original", "contiguous")
ALONE = {"sts": {"rho": 1.0}}  # options with which a method does only what it does before the LLM
INSIDE = ("layers", "ratios", "prune_layer", "score_from", "llm_only")
ONE_LENGTH = "which vLLM cannot serve: all layers of its paged cache hold the same tokens"


class Refused(RuntimeError):
    """Cannot be served; the message is one sentence. No ValueError: vLLM serves text alone after one."""


def refuse(sentence: str, reasons: dict[str, object]) -> None:
    """Raises `sentence` of the first reason that holds."""
    for reason, holds in reasons.items():
        if holds:
            raise Refused(f"sts_kernels: {sentence % reason}")


@dataclass(frozen=True)
class Settings:
    method: Method
    plan: Plan
    scope: str  # what is selected from at once: an "image", or each "crop"
    positions: str  # of the tokens kept: their "original" ones, or "contiguous" ones
    options: dict[str, Any]  # as they were given

    def tag(self) -> str:
        """What an image's tokens depend on beside the image, for names of files too."""
        return "-".join(["sts", __version__, *(f"{name}={value}" for name, value in sorted(self.options.items()))])

    def __str__(self) -> str:
        amount = self.options.get("keep", self.options.get("budget"))
        tokens = f"{amount} tokens" if isinstance(amount, int) else f"{amount:g} of the tokens"
        return f"{self.method.name} keeps {tokens} of each image before the LLM, at {self.positions} positions"


def from_variable() -> dict[str, Any] | None:
    """The options that STS_KERNELS_KEEP stands for; None: it is not set."""
    text = os.environ.get(VARIABLE, "").strip()
    if not text:
        return None
    try:
        amount = int(text) if text.isdigit() else float(text)
        check_amount("sts_kernels", VARIABLE, amount)
    except ValueError:
        wanted = "a number of tokens or a share of them, such as 128 or 0.25"
        raise Refused(f"sts_kernels: {VARIABLE} must be {wanted}, got {text!r}") from None
    return {"keep": amount}


def read(config: "PretrainedConfig") -> Settings:
    """The settings of a configuration.

    Raises:
        Refused: none are given; one is not known or has a bad value; vLLM cannot do what they say.
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
