"""Checks for models, options and inputs that pruning does not support. Each error is one sentence, before anything
runs."""

from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import StaticLayer
from transformers.generation.configuration_utils import ALL_STATIC_CACHE_IMPLEMENTATIONS

from ...methods import Method, Plan
from . import compat
from .adapters import ModelAdapter
from .stack import Caller, caller_of
from .static_cache import is_static
from .untyped import Kwargs, Model

if TYPE_CHECKING:
    from transformers import Cache

CLASS_TOKENS = ("class_embedding", "cls_token")  # names of a vision encoder's parameter
LARGE = 1 << 20  # tokens of an image: every plan prunes it that does not keep all tokens
ATTENTIONS = "eager, sdpa and flash_attention_2/3"


def attention_of(text: Model) -> str:
    """Name of the text model's attention implementation. Raises NotImplementedError if pruning does not support it."""
    name = text.config._attn_implementation or "eager"
    if name not in ("eager", "sdpa") and ("flash" not in name or "paged" in name):
        raise NotImplementedError(f"sts_kernels: attention {name!r} is not supported, only {ATTENTIONS} are")
    return name


def check_model(model: Model, base: Model, text: Model, prune_layers: list[int], contiguous: bool) -> None:
    """Refuses models that would be pruned wrongly."""
    config = text.config
    attention_of(text)
    kinds = set(getattr(config, "layer_types", None) or ())
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    if kinds - {"full_attention"} or (not kinds and window is not None):
        raise NotImplementedError(
            f"sts_kernels: layers that do not attend to the whole prompt are not supported, and the LLM has "
            f"{', '.join(sorted(kinds - {'full_attention'})) or f'a sliding window of {window}'}"
        )
    if any(getattr(part, "_tp_size", None) not in (None, 1) for part in (model, base, text)):
        raise NotImplementedError(
            "sts_kernels: tensor parallel models are not supported: each rank would keep other tokens"
        )
    deepstack = len(getattr(getattr(base, "visual", None), "deepstack_merger_list", ()))
    if prune_layers and min(prune_layers) < deepstack:
        raise NotImplementedError(
            f"sts_kernels: the first prune layer (prune_layer, layers) must be at least {deepstack} for this model: "
            f"its first {deepstack} layers add visual features to all tokens; got {min(prune_layers)}"
        )
    if contiguous and hasattr(base, "rope_deltas"):
        raise NotImplementedError(
            f'sts_kernels: positions="contiguous" is not supported for {type(base).__name__}, whose rotary positions '
            'have three axes; use positions="original"'
        )


def check_method(method: Method, plan: Plan, base: Model, adapter: ModelAdapter) -> None:
    """Refuses methods that the model's encoder or projector does not allow."""
    names = (name for name, _ in base.named_parameters())
    if method.encoder_attention == "last" and not (
        adapter.last_attention and any(name.endswith(CLASS_TOKENS) for name in names)
    ):
        raise NotImplementedError(
            f"sts_kernels: {method.name} is defined by the attention of a [CLS] token, in the encoder's last layer, to "
            f"tokens that are the features; this {adapter.name} does not have it"
        )
    if method.merges and method.site == "encoder" and not adapter.one_row and plan.keep(LARGE) < LARGE:
        raise NotImplementedError(
            f"sts_kernels: {method.name} merges features before the projector, which {adapter.name} does not allow: "
            "its features are made of several rows"
        )


def check_gradients(base: Model) -> None:
    if base.training and torch.is_grad_enabled():
        raise NotImplementedError(
            "sts_kernels: pruning is for inference: call model.eval(), or run under torch.no_grad()"
        )


def check_threads(base: Model, others: set[int]) -> None:
    """Refuses generate() in several threads, on models that keep state of a prompt on the model itself."""
    if others and hasattr(base, "rope_deltas"):
        raise RuntimeError(
            f"sts_kernels: {type(base).__name__} keeps the rotary positions of its last prompt on the model, so that "
            "several threads get wrong answers from it, pruned or not; run one generate() at a time"
        )


def check_cache(cache: "Cache | None", text: Model) -> None:
    """Refuses caches that a prompt with images cannot use."""
    if cache is None:
        return
    if int(cache.get_seq_length()) > 0:
        raise NotImplementedError(
            "sts_kernels: new images on a non-empty cache are not supported; leave out the pixel values of images that "
            "it holds already, or start a new cache with the whole conversation"
        )
    if is_static(cache):
        check_static(text, cache.offloading)
        if any(type(layer) is not StaticLayer or layer.is_initialized for layer in cache.layers):
            raise NotImplementedError(
                "sts_kernels: a static cache must come as StaticCache() makes it, since a pruned prompt brings layers "
                "of other lengths, and this one has its memory already; give a new one, or cache_implementation="
                '"static"'
            )


def check_static(text: Model, offloading: bool) -> None:
    """Refuses static caches with offloading or FlashAttention."""
    if offloading:
        raise NotImplementedError(
            'sts_kernels: static caches are not supported with offloading; use "static", or "offloaded"'
        )
    if "flash" in attention_of(text):
        raise NotImplementedError(
            "sts_kernels: static caches are not supported with FlashAttention, which takes no mask of unfilled slots; "
            'use attn_implementation="sdpa", or a cache that grows'
        )


def plain_mask(mask: Any) -> torch.Tensor | None:
    """The attention mask of a pruned prompt. Raises NotImplementedError if it is not a padding mask."""
    if mask is not None and (not isinstance(mask, torch.Tensor) or mask.ndim != 2):
        raise NotImplementedError(
            "sts_kernels: only attention masks of shape (batch, length) that mark padding are supported"
        )
    return mask


def check_generation(model: Model, text: Model, options: Kwargs, cache: "Cache | None") -> None:
    """Refuses options of generate() under which a prompt with images would be pruned wrongly."""
    given = options.get("generation_config") or model.generation_config

    def option(name: str) -> Any:
        return options[name] if name in options else getattr(given, name, None)

    static = is_static(cache) or option("cache_implementation") in ALL_STATIC_CACHE_IMPLEMENTATIONS
    if static:
        check_static(text, "offloaded" in (option("cache_implementation") or ""))
    if option("prefill_chunk_size"):
        raise NotImplementedError(
            "sts_kernels: prefill_chunk_size is not supported, the whole prompt must be in one forward; leave it out"
        )
    check_cache(cache, text)
    if static and "prepare_inputs_for_generation" not in vars(model):
        raise NotImplementedError(
            f"sts_kernels: static caches need the model whose generate() is called: give {type(model).__name__} itself "
            "to prune or apply_sts"
        )


def checked_caller(base: Model, checked: bool) -> Caller:
    """`caller_of(base)`, after `check_generation` of its options. checked: these were checked before."""
    caller = caller_of(base)
    if caller.model is not None and not checked:
        check_generation(caller.model, base.language_model, caller.options, compat.cache_of(caller.options))
    return caller
