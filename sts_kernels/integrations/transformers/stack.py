"""Finds the generate() that a forward is part of, by its call stack. Its arguments say where the prompt ends.

The pruned model need not be the one whose generate() is called: it may be wrapped, or a part of that model.
"""

import sys
from dataclasses import dataclass, field
from types import FrameType

import torch
from transformers import GenerationMixin

from . import compat
from .untyped import Kwargs


@dataclass
class Caller:
    """Who called: a forward of the base model, a generate(), both or neither."""

    forward: bool = False
    model: GenerationMixin | None = None  # whose generate() it is
    options: Kwargs = field(default_factory=dict)  # of generate()

    @property
    def outside(self) -> bool:
        return not self.forward and self.model is None

    @property
    def ids(self) -> torch.Tensor | None:
        ids = self.options.get("input_ids", self.options.get("inputs"))
        return ids if isinstance(ids, torch.Tensor) and not ids.is_floating_point() else None

    @property
    def prompt_length(self) -> int | None:
        """Columns of the prompt that generate() was given; None outside of it."""
        given = [self.options.get(name) for name in ("inputs_embeds", "input_ids", "inputs")]
        return next((x.shape[1] for x in given if isinstance(x, torch.Tensor) and x.ndim > 1), None)

    @property
    def columns(self) -> int | None:
        """Columns of the prompt and of all new tokens of this generate(). None outside generate(), and if the caller
        gave a cache."""
        config, prompt = self.options.get("generation_config"), self.prompt_length
        if config is None or prompt is None or compat.cache_of(self.options) is not None:
            return None
        total = config.max_length if config.max_new_tokens is None else prompt + config.max_new_tokens
        return max(total, getattr(config, "max_cache_len", None) or 0)


def caller_of(base: torch.nn.Module) -> Caller:
    """The innermost generate() of a model that holds `base`, among the callers of this function."""
    caller = Caller()
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_name
        if name == "forward" and not caller.forward:
            caller.forward = frame.f_locals.get("self") is base
        elif name == "generate":
            values = frame.f_locals
            model = values.get("self")
            if isinstance(model, GenerationMixin) and any(module is base for module in model.modules()):
                named = {name: values.get(name) for name in ("inputs", "generation_config")}
                return Caller(caller.forward, model, {**named, **values.get("kwargs", {})})
        frame = frame.f_back
    return caller
