"""What STS does not support, said in one sentence before anything runs."""

import torch

STATIC_CACHES = ("static", "offloaded_static", "hybrid", "hybrid_chunked", "offloaded_hybrid", "sliding_window")
ATTENTIONS = "eager, sdpa and flash_attention_2/3"


def attention_of(text) -> str:
    """The text model's attention implementation, if STS can serve it."""
    name = text.config._attn_implementation or "eager"
    if name not in ("eager", "sdpa") and ("flash" not in name or "paged" in name):
        raise NotImplementedError(f"apply_sts: attention {name!r} is not supported, only {ATTENTIONS} are")
    return name


def refuse_model(model, base, text, prune_layer: int) -> None:
    """Models that would be pruned wrongly."""
    config = text.config
    attention_of(text)
    kinds = set(getattr(config, "layer_types", None) or ())
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    if kinds - {"full_attention"} or (not kinds and window is not None):
        raise NotImplementedError(
            f"apply_sts: layers that do not attend to the whole prompt are not supported, and the LLM has "
            f"{', '.join(sorted(kinds - {'full_attention'})) or f'a sliding window of {window}'}"
        )
    if any(getattr(part, "_tp_size", None) not in (None, 1) for part in (model, base, text)):
        raise NotImplementedError(
            "apply_sts: tensor parallel models are not supported: each rank would keep other tokens"
        )
    deepstack = len(getattr(getattr(base, "visual", None), "deepstack_merger_list", ()))
    if prune_layer < deepstack:
        raise NotImplementedError(
            f"apply_sts: prune_layer must be at least {deepstack} for this model, whose first {deepstack} layers add "
            f"visual features to all tokens, got {prune_layer}"
        )


def refuse_gradients(base) -> None:
    if base.training and torch.is_grad_enabled():
        raise NotImplementedError("apply_sts is for inference: call model.eval(), or run under torch.no_grad()")


def refuse_cache(cache) -> None:
    """Caches that a prompt with images may not come with."""
    if cache is None:
        return
    if getattr(cache, "is_compileable", False):
        raise NotImplementedError("apply_sts: a static cache is not supported, its layers all have the same length")
    if cache.get_seq_length() > 0:
        raise NotImplementedError(
            "apply_sts: new images on a non-empty cache are not supported; leave out the pixel values of images that "
            "it holds already, or start a new cache with the whole conversation"
        )


def plain_mask(mask):
    """The attention mask of a pruned prompt, if it is one of padding."""
    if mask is not None and (not isinstance(mask, torch.Tensor) or mask.ndim != 2):
        raise NotImplementedError(
            "apply_sts: only attention masks of shape (batch, length) that mark padding are supported"
        )
    return mask


def refuse_generation(model, options: dict, cache) -> None:
    """Options of generate() for a prompt with images that would be pruned wrongly."""
    given = options.get("generation_config") or model.generation_config

    def option(name):
        return options[name] if name in options else getattr(given, name, None)

    if option("cache_implementation") in STATIC_CACHES:
        raise NotImplementedError(
            f"apply_sts: cache_implementation={option('cache_implementation')!r} is not supported, its layers all have "
            "the same length; leave it out"
        )
    if option("prefill_chunk_size"):
        raise NotImplementedError(
            "apply_sts: prefill_chunk_size is not supported, the whole prompt must be in one forward; leave it out"
        )
    refuse_cache(cache)
