"""Classes named by `manifests`, created on access: STSLlavaHf derives from Pruned and lmms-eval's LlavaHf, etc."""

import functools
import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ... import methods
from ...methods import Budget, Method
from ...methods._budget import AMOUNT, parse_amount
from ..transformers import prune
from ..transformers.hooks import Hooks
from . import FAMILIES

if TYPE_CHECKING:
    from lmms_eval.api.instance import Instance
    from lmms_eval.api.model import lmms as MixedInto

    from ..transformers.report import RowReport
else:
    MixedInto = object

AMOUNTS = ("budget", "keep", "layers", "ratios")
MANY = 1 << 30  # layers of the trial plan: enough for every valid budget
PLACES = ("scope", "positions", "score_from", "cudnn_attention")  # further options of `prune`


class PruningFailed(SystemExit):
    """Ends the run. lmms-eval would catch an Exception of generate() and score an empty answer."""


def configure(arguments: dict[str, Any]) -> tuple[Method, dict[str, Any]]:
    """Pops the pruning options from `arguments` (--model_args). Returns the method and the other options of `prune`.

    Lists are written with plus signs: layers=8+16+24,ratios=0.5+0.25+64.

    Raises:
        TypeError, ValueError: bad options. Raised before any weights are loaded.
    """
    name = arguments.pop("method", "sts")
    known = methods.create(name).options().keys()
    method = methods.create(name, **{option: arguments.pop(option) for option in known & arguments.keys()})
    amounts: dict[str, Any] = {
        option: _numbers(option, arguments.pop(option)) for option in AMOUNTS if option in arguments
    }
    for option in ("layers", "ratios"):
        if option in amounts and not isinstance(amounts[option], list):
            amounts[option] = [amounts[option]]
    method.plan(Budget(**amounts), MANY, 1)
    return method, {**amounts, **{option: arguments.pop(option) for option in PLACES if option in arguments}}


def _numbers(option: str, value: str | int | float) -> int | float | list[int | float]:
    if not isinstance(value, str):
        return value
    try:
        parts = [parse_amount(part) for part in value.split("+")]
    except ValueError:
        raise ValueError(f"sts_kernels: {option} must be {AMOUNT}; or several with plus signs, got {value!r}") from None
    return parts if "+" in value else parts[0]


class Pruned(MixedInto):
    """Mixin before an lmms-eval model in the MRO: prunes the loaded model, and prints a summary after generation."""

    is_simple = False

    def __init__(self, *args: Any, **kwargs: Any):
        method, options = configure(kwargs)
        super().__init__(*args, **kwargs)
        self._pruning = prune(self.model, method, **options)
        self._pruned_rows: list[RowReport] = []
        said = ", ".join(f"{name}={value}" for name, value in {**options, **method.options()}.items())
        print(f"sts_kernels: {method.name} prunes this model, {said}")

    def generate_until(self, requests: list["Instance"]) -> Any:
        hooks = Hooks()
        try:
            hooks.shadow(self.model, "generate", self._generate)
            answers = super().generate_until(requests)
        finally:
            hooks.remove()
        print(self._summary(len(requests)))
        return answers

    def loglikelihood(self, requests: list["Instance"]) -> Any:
        """Refused: the last token of the answer would score the visual tokens, in place of the prompt's."""
        raise PruningFailed(
            "sts_kernels: tasks that score given answers (output_type multiple_choice or loglikelihood) cannot be "
            "pruned, for the answer would choose the visual tokens; take a task of output_type generate_until"
        )

    def _generate(self, generate: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        before = self._pruning.report
        try:
            out = generate(*args, **kwargs)
        except Exception as error:
            raise PruningFailed(f"sts_kernels: {type(error).__name__}: {error}") from error
        report = self._pruning.report
        if report is not None and report is not before:
            self._pruned_rows += report.rows
        return out

    def _summary(self, prompts: int) -> str:
        rows = self._pruned_rows
        if not rows:
            return f"sts_kernels: none of {prompts} prompts had images, nothing was pruned"
        means = [sum(row.kept[step] for row in rows) / len(rows) for step in range(len(rows[0].kept))]
        steps = " -> ".join(f"{mean:.1f}" for mean in (sum(row.tokens for row in rows) / len(rows), *means))
        average = sum(row.average for row in rows) / len(rows)
        return (
            f"sts_kernels: {len(rows)} of {prompts} prompts had images; visual tokens a prompt {steps}, "
            f"{average:.1f} averaged over the layers"
        )


@functools.cache
def _pruned(name: str) -> type:
    family = next(family for family, known in FAMILIES.items() if known == name)
    base = getattr(importlib.import_module(f"lmms_eval.models.chat.{family}"), name)
    return type(f"STS{name}", (Pruned, base), {"__module__": __name__})


def __getattr__(name: str) -> type:
    if name.removeprefix("STS") in FAMILIES.values() and name.startswith("STS"):
        return _pruned(name.removeprefix("STS"))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
