"""prune(), apply_sts() and remove_pruning(), for stock transformers models."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from ... import methods
from ...methods import Budget, Method
from ...methods.base import POSITIONS, SCOPES
from ...methods.sts import STS, STSConfig
from .encoder_hooks import Relevance
from .handle import PruningHandle, active_handle, supported

SCORE_FROM = ("layer", "next")


def prune(
    model: torch.nn.Module,
    method: str | Method,
    *,
    profile: bool = False,
    budget: int | float | None = None,
    keep: int | float | None = None,
    layers: Sequence[int] | None = None,
    ratios: Sequence[int | float] | None = None,
    scope: str | None = None,
    positions: str | None = None,
    score_from: str | None = None,
    cudnn_attention: bool = False,
    relevance: Relevance | None = None,
    **options: Any,
) -> PruningHandle:
    """Prunes visual tokens of a stock transformers model with `method`, until the handle is removed.

    ::

        with prune(model, "divprune", budget=128) as pruning:
            ids = model.generate(**inputs, max_new_tokens=64)
        print(pruning.report)

    No module is replaced: forward hooks drop features before the LLM and hidden states inside it. Prompts without
    images, and budgets that keep every token, run bit for bit as without pruning. Callers keep full-length ids, masks,
    positions and logits. Logits at dropped columns come from zero hidden states.

    While the handle is active, a returned cache may be continued. get_image_features() returns NaN rows for dropped
    tokens. `hidden_states` and `attentions` have the lengths that the layers ran on. Several threads may run prompts at
    once where the model itself allows it. A deep copy of the model is a plain model.

    Args:
        model: LlavaForConditionalGeneration and the like, its base model, or a wrapper; docs/transformers.md lists the
            families.
        method: a name (`sts_kernels.methods.names()`), or an object from `sts_kernels.methods.create`.
        profile: time encoding and prefill of each prompt. Costs device syncs. See `report`.
        budget, keep, layers, ratios: how many tokens to keep, and where; see `sts_kernels.methods.Budget`.
        scope: unit of one selection: "image", or "crop" for each crop, tile or frame. None: the method's default.
        positions: "original": kept tokens keep their positions; "contiguous": they are renumbered without gaps. None:
            the method's default, or "original" where the model's positions have three axes.
        score_from: "layer": scores inside the LLM come from the layer before the cut; "next": from query and key of the
            layer after the cut. None: the method's default.
        cudnn_attention: let torch choose cuDNN's attention for pruned prompts. cuDNN plans every new key length, which
            takes tens of milliseconds. False keeps it off, for the whole process, while a pruned prompt is inside the
            LLM.
        relevance: relevance of each encoder token to the prompt, for methods that need it and have no text tower to
            compute it (cdpruner). Larger values are preferred. A tensor or a list of tensors, one number per token:
            image after image, crop after crop, row after row. With LLaVA-NeXT, tokens that unpadding will discard are
            counted; with LLaVA-OneVision, tokens are counted as the model interpolates them. Or a function that returns
            these numbers. It is called for each encoding with "image" or "video" and the arguments of
            get_image_features or get_video_features by name (pixel_values).
        options: of the method, if it is given by name.

    Returns:
        a handle: a context manager with `remove()`. `remove_pruning(model)` removes pruning without the handle.

    Raises:
        TypeError, ValueError: unknown method, option or layer, unsupported family, or pruning is active already.
        NotImplementedError: the family, the model's settings or the version of transformers do not allow it. The
            message says why in one sentence.
    """
    for name, value, allowed in (
        ("scope", scope, SCOPES),
        ("positions", positions, POSITIONS),
        ("score_from", score_from, SCORE_FROM),
    ):
        if value is not None and value not in allowed:
            raise ValueError(f"prune: {name} must be one of {', '.join(allowed)}, got {value!r}")
    if isinstance(method, str):
        method = methods.create(method, **options)
    elif not isinstance(method, Method):
        raise TypeError(f"prune: method must be a name or a Method, got {type(method).__name__}")
    elif options:
        raise TypeError(f"prune: options {', '.join(options)} belong to the method; give them to methods.create")
    if "relevance" in method.signals and relevance is None:
        raise ValueError(
            f"prune: relevance must be given with {method.name}, as a number for each visual token or a function that "
            'returns them: the model has no text tower to find it with; or give by="text"'
        )
    if "relevance" not in method.signals and relevance is not None:
        raise ValueError(f"prune: relevance is not an option of {method.name}, which does not look at it")
    base, adapter = supported(model)
    plan = method.plan(Budget(budget, keep, layers, ratios), len(base.language_model.layers), adapter.prune_layer)
    if scope is not None and method.site is None:
        raise ValueError(f"prune: scope is not an option of {method.name}, which selects nothing before the LLM")
    if score_from is not None and not any(cut.queries in ("last", "raters") for cut in plan.cuts):
        what = "goes by no attention" if plan.cuts else "drops nothing"
        raise ValueError(f"prune: score_from is not an option of {method.name}, which {what} inside the LLM")
    if score_from is not None:
        plan = replace(plan, cuts=tuple(replace(cut, score_from=score_from) for cut in plan.cuts))
    if positions is None:
        positions = "original" if hasattr(base, "rope_deltas") else method.positions
    scope = scope or method.scope
    return PruningHandle(model, base, adapter, method, plan, scope, positions, profile, cudnn_attention, relevance)


def apply_sts(
    model: torch.nn.Module, config: STSConfig, measure: bool = False, cudnn_attention: bool = False
) -> PruningHandle:
    """Prunes visual tokens of a stock transformers model with STS, until the handle is removed.

    ::

        with apply_sts(model, STSConfig(budget=128)) as sts:
            ids = model.generate(**inputs, max_new_tokens=64)
        print(sts.report)

    Same as `prune` with the method "sts" and a configuration. Features are dropped before the projector, hidden states
    before layer `prune_layer`.

    Args:
        model, cudnn_attention: as for `prune`.
        config: an STSConfig: how many tokens to keep, and how.
        measure: as `profile` of `prune`.
    """
    if not isinstance(config, STSConfig):
        raise TypeError(f"apply_sts: config must be an STSConfig, got {type(config).__name__}")
    base, adapter = supported(model)
    method, budget = STS.of(config)
    plan = method.plan(budget, len(base.language_model.layers), adapter.prune_layer)
    return PruningHandle(model, base, adapter, method, plan, config.scope, "original", measure, cudnn_attention)


def remove_pruning(model: torch.nn.Module) -> bool:
    """Removes pruning from a model whose handle is lost. Returns False if pruning was not active."""
    handle = active_handle(model)
    if handle is None:
        return False
    handle.remove()
    return True
