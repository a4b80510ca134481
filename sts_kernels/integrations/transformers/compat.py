"""Differences between versions of transformers: the name of the cache. Checks the forwards that get hooks.

The cache is `past_key_values` up to transformers 5.23 and `cache` from 5.24 on; a caller may use either name.
"""

import contextlib
import functools
import inspect
import warnings
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
import transformers
from transformers.modeling_outputs import BaseModelOutputWithPast

from .untyped import Args, Kwargs, Model

if TYPE_CHECKING:
    from transformers import Cache

OLDEST, NEWEST = (4, 57), (5, 24)  # minor versions that the tests run on
CACHE_NAMES = ("cache", "past_key_values")
CACHE: str = next(name for name in CACHE_NAMES if name in BaseModelOutputWithPast.__dataclass_fields__)

# Arguments that the hooks read or replace, per hooked module.
TEXT_ARGUMENTS = ("inputs_embeds", "attention_mask", "position_ids", CACHE_NAMES)
LAYER_ARGUMENTS = ("hidden_states", "attention_mask", "position_ids", "position_embeddings", CACHE_NAMES)
BASE_ARGUMENTS = ("input_ids", "inputs_embeds", CACHE_NAMES)

# Before transformers 5, some models have this method instead of create_masks_for_generate.
OLD_MASKS = "_prepare_4d_causal_attention_mask_with_cache_position"


def version() -> tuple[int, ...]:
    return tuple(map(int, transformers.__version__.split(".")[:2]))


def cache_of(arguments: Kwargs) -> "Cache | None":
    """The cache among the arguments of a forward, by either name."""
    return next((arguments[name] for name in CACHE_NAMES if arguments.get(name) is not None), None)


def output_cache(output: Any) -> "Cache | None":
    """The cache in the output of a forward."""
    return getattr(output, CACHE, None)


@contextlib.contextmanager
def without_kept_cache(model: Model) -> Iterator[None]:
    """Hides the static cache that a model keeps before transformers 5: all its layers have one length."""
    kept = model.__dict__.pop("_cache", None)
    try:
        yield
    finally:
        model.__dict__.pop("_cache", None)
        if kept is not None:
            model._cache = kept


def parameters(module: torch.nn.Module) -> list[str]:
    return list(inspect.signature(module.forward).parameters)


def named(names: Iterable[str], args: Args, kwargs: Kwargs) -> Kwargs:
    """Arguments of a call by name, also those given by position."""
    return {**dict(zip(names, args, strict=False)), **kwargs}


def check_model(base: Model, text: Model) -> None:
    """Raises NotImplementedError if a forward lacks an argument that the hooks use. Warns about untested versions."""
    for module, wanted in ((base, BASE_ARGUMENTS), (text, TEXT_ARGUMENTS), (text.layers[0], LAYER_ARGUMENTS)):
        if hasattr(module, "_orig_mod"):
            raise NotImplementedError(
                f"sts_kernels: {type(module._orig_mod).__name__} is wrapped by torch.compile(module), which hides its "
                "parts; compile it in place, by module.compile()"
            )
        have = parameters(module)
        for name in wanted:
            names = (name,) if isinstance(name, str) else name
            if not set(names) & set(have):
                raise NotImplementedError(
                    f"sts_kernels: {type(module).__name__}.forward of transformers {transformers.__version__} has no "
                    f"argument {' or '.join(names)}, which pruning works on ({tested()} are tested); it has "
                    f"{', '.join(have)}"
                )
    if version() > NEWEST:
        _warn_untested()


def tested() -> str:
    return f"transformers {'.'.join(map(str, OLDEST))} to {'.'.join(map(str, NEWEST))}"


@functools.cache
def _warn_untested() -> None:
    warnings.warn(
        f"sts_kernels: pruning is tested on {tested()}, not on {transformers.__version__}: compare an answer under "
        "STSConfig(budget=1.0) with the plain model's",
        stacklevel=2,
    )
