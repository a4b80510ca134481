"""apply_sts: hooks on one model instance, and the handle that takes them off again."""

import functools
import inspect
import sys
import time
import weakref

import torch

from ...pruning.config import STSConfig
from . import families, prompt, refusals, saliency, stage1, stage2, tap
from .cache import pruned_prompt
from .images import VisualItem
from .report import Report, describe

VISUAL_INPUTS = ("pixel_values", "pixel_values_images", "pixel_values_videos", "mm_encoder_outputs")

_applied: "weakref.WeakSet[torch.nn.Module]" = weakref.WeakSet()


def apply_sts(model, config: STSConfig, measure: bool = False) -> "STSHandle":
    """Prunes visual tokens of a stock transformers model with STS, until the handle is removed.

    ::

        with apply_sts(model, STSConfig(budget=128)) as sts:
            ids = model.generate(**inputs, max_new_tokens=64)
        print(sts.report)

    Nothing of the model is replaced: features are dropped before the projector and hidden states before layer
    `prune_layer`, both in forward hooks. Prompts without images, and budgets that keep every token, run bit for bit as
    without it. Callers keep full-length ids, masks, positions and logits (logits at dropped columns come from zero
    hidden states); a returned cache may be continued while the handle is active. While it is, get_image_features()
    returns NaN rows for dropped tokens, and `hidden_states` and `attentions` have the lengths the layers ran on.

    Args:
        model: LlavaForConditionalGeneration and the like, its base model, or a wrapper; docs/transformers.md lists the
            families.
        config: what to keep.
        measure: time encoding and prefill of each prompt, at the price of device syncs; see `report`.

    Returns:
        a handle: a context manager, or call `remove()`.

    Raises:
        TypeError, ValueError: not a supported family, no such layer, or STS is active on the model already.
        NotImplementedError: what the family or the model's settings do not allow, in one sentence.
    """
    if not isinstance(config, STSConfig):
        raise TypeError(f"apply_sts: config must be an STSConfig, got {type(config).__name__}")
    return STSHandle(model, config, measure)


def _base_model(model) -> torch.nn.Module:
    """The module that joins vision encoder, projector and LLM, however deep it is wrapped."""
    modules = model.modules() if isinstance(model, torch.nn.Module) else ()
    return next((module for module in modules if "language_model" in module._modules), model)


def _argument(name: str, args: tuple, kwargs: dict):
    """The prompt's ids are the first argument of every forward and of generate()."""
    return kwargs.get(name, args[0] if args and name not in kwargs else None)


class STSHandle:
    """STS on one model. Not for concurrent forwards of that model."""

    def __init__(self, model, config: STSConfig, measure: bool = False):
        base = _base_model(model)
        model_type = getattr(getattr(base, "config", None), "model_type", None)
        family = families.family_of(model_type)
        if family is None or "language_model" not in base._modules:
            known = ", ".join(f"{f.name} ({', '.join(f.model_types)})" for f in families.FAMILIES)
            raise ValueError(
                f"apply_sts: {type(model).__name__} (model_type {model_type!r}) is not of a supported family: {known}"
            )
        if base in _applied:
            raise ValueError(
                "apply_sts: STS is active on this model already; remove the first handle before a second one"
            )
        self.model, self.base, self.family, self.measure = model, base, family, measure
        self.text = base.language_model
        self.plan = config.plan(len(self.text.layers), family.prune_layer)
        refusals.refuse_model(model, base, self.text, self.plan.prune_layer)
        #: Columns of the following prompts that are prompt, for a plain forward over prompt and answer: the query of
        #: stage 2 is the last token within them. None: all of them; generate() sets it by itself.
        self.prompt_length: int | None = None
        self._report: Report | None = None
        self._ids = prompt.token_ids(base.config)
        self._shrink = stage2.LateShrink(self.text, self.plan.prune_layer)
        self._items: dict[str, list[VisualItem]] = {}  # encoded last, by kind
        self._call: families.EncodeCall | None = None
        self._prompt_ids: torch.Tensor | None = None
        self._found: torch.Tensor | None = None
        self._dropping: torch.Tensor | None = None
        self._saliency: list[tuple] = []  # query, key and scale of the vision encoder's attention
        self._clock: dict[str, float] = {}
        self._undo = []
        _forget_graphs()
        self._install()
        _applied.add(base)

    # --- life ---

    def __enter__(self) -> "STSHandle":
        return self

    def __exit__(self, *exc) -> None:
        self.remove()

    def remove(self) -> None:
        """Restores the model: every hook and attribute set here is gone. Safe to call twice."""
        if self._undo:
            _forget_graphs()
        while self._undo:
            self._undo.pop()()
        _applied.discard(self.base)

    @property
    def report(self) -> Report | None:
        """What the last prompt with images kept and saved; None before the first."""
        return self._report

    # --- installation ---

    def _install(self) -> None:
        for name, kind in (("get_image_features", "image"), ("get_video_features", "video")):
            if hasattr(self.base, name):
                self._override(self.base, name, functools.partial(self._encode, kind))
        if hasattr(self.model, "generate"):
            self._override(self.model, "generate", self._generate)
        first, last = self.family.projector(self.base)
        self._before(first, self._before_projector)
        self._after(last, self._after_projector)
        self._before(self.base, self._before_model)
        self._before(self.text, self._before_text)
        self._after(self.text, self._after_text)
        layers = self.text.layers
        for index, layer in enumerate(layers):
            self._before(layer, functools.partial(self._before_layer, index))
        scored = layers[self.plan.prune_layer - 1].self_attn
        self._before(scored, lambda module, args, kwargs: self._shrink.before_attention(module))
        self._after(scored, lambda module, args, kwargs, output: tap.disarm(module))
        if self.plan.config.anchor == "saliency":
            towers = {id(m): m for m in (self.family.vision_attention(self.base, kind) for kind in self._ids)}
            for attention in towers.values():
                self._before(attention, self._before_vision_attention)
                self._after(attention, lambda module, args, kwargs, output: tap.disarm(module))

    def _before(self, module, hook) -> None:
        hook = torch.compiler.disable(hook)
        self._undo.append(module.register_forward_pre_hook(hook, with_kwargs=True).remove)

    def _after(self, module, hook) -> None:
        hook = torch.compiler.disable(hook)
        self._undo.append(module.register_forward_hook(hook, with_kwargs=True, always_call=True).remove)

    def _override(self, target, name: str, replacement) -> None:
        """Shadows a method on this instance; `replacement` gets the original as its first argument."""
        original = getattr(target, name)
        shadowed = target.__dict__.get(name)  # an override of someone else's

        @functools.wraps(original)
        def method(*args, **kwargs):
            return replacement(original, *args, **kwargs)

        def undo():
            if shadowed is None:
                del target.__dict__[name]
            else:
                target.__dict__[name] = shadowed

        target.__dict__[name] = method
        self._undo.append(undo)

    # --- around the model ---

    def _generate(self, original, *args, **kwargs):
        """Refuses early, and remembers where the prompt ends: drafts and answers may share a forward with it."""
        ids = kwargs.get("input_ids", kwargs.get("inputs", args[0] if args else None))
        embeds = kwargs.get("inputs_embeds")
        if _has_images(kwargs):
            refusals.refuse_generation(self.model, kwargs, kwargs.get("past_key_values"))
            self._prompt_ids = ids
        source = embeds if embeds is not None else ids
        outer = self.prompt_length
        if outer is None and isinstance(source, torch.Tensor):
            self.prompt_length = source.shape[1]
        try:
            return original(*args, **kwargs)
        finally:
            self.prompt_length = outer

    def _encode(self, kind: str, original, *args, **kwargs):
        if self._call is not None:  # Qwen3-VL's videos pass through get_image_features
            return original(*args, **kwargs)
        arguments = inspect.signature(original).bind_partial(*args, **kwargs).arguments
        arguments = {**arguments.pop("kwargs", {}), **arguments}
        self._call = families.EncodeCall(kind, arguments, self._placeholder_runs)
        self._saliency = []
        self._tick()
        try:
            return original(*args, **kwargs)
        finally:
            self._call = None
            self._tock("encode")

    def _placeholder_runs(self, kind: str) -> list[int]:
        return prompt.runs(self._prompt_ids, self._ids[kind])

    def _before_model(self, module, args, kwargs) -> None:
        """The base model: sees which columns are images."""
        self._found = None
        if not _has_images(kwargs):
            return
        ids = _argument("input_ids", args, kwargs)
        refusals.refuse_gradients(self.base)
        refusals.refuse_cache(kwargs.get("past_key_values"))
        self._prompt_ids = ids
        self._found = prompt.placeholders(self.base, self._ids, ids, kwargs.get("inputs_embeds"))

    # --- stage 1 ---

    def _before_projector(self, module, args, kwargs):
        self._dropping = None
        if self._call is None:
            return None
        x = args[0]
        items = self.family.layout(self.base, self._call, x.shape)
        features = x.reshape(-1, x.shape[-1])
        rows = stage1.select(features, items, self.plan, self._unit_saliency(x.shape))
        self._items[self._call.kind] = items
        if rows is None:
            return None
        self._dropping = (rows, x.shape)
        return (features[rows], *args[1:]), kwargs

    def _after_projector(self, module, args, kwargs, output):
        if self._dropping is None or output is None:
            return None
        (rows, shape), self._dropping = self._dropping, None
        return stage1.restore(output, rows, shape)

    def _before_vision_attention(self, module, args, kwargs) -> None:
        if self._call is not None:
            tap.arm(module, self._vision_attention)

    def _vision_attention(self, module, query, key, kwargs) -> None:
        self._saliency += saliency.calls_of(query, key, kwargs)

    def _unit_saliency(self, shape: torch.Size) -> torch.Tensor | None:
        calls, self._saliency = self._saliency, []
        return self.family.saliency(self.base, calls, shape) if calls else None

    # --- stage 2 ---

    def _before_text(self, module, args, kwargs):
        found, self._found = self._found, None
        self._shrink.now = None
        cache, embeds = kwargs.get("past_key_values"), kwargs.get("inputs_embeds")
        held = pruned_prompt(cache)
        if held is not None:
            return args, self._shrink.resume(kwargs, cache, held)
        if found is None or embeds is None or found.shape != embeds.shape[:2]:
            return None
        mask = refusals.plain_mask(kwargs.get("attention_mask"))
        rows = prompt.read_rows(found, None if mask is None else mask.bool(), self._items, self.plan)
        if not any(row.images for row in rows):
            return None
        length = embeds.shape[1]
        extra = 0 if self.prompt_length is None else max(0, length - self.prompt_length)
        changed = self._shrink.prefill(kwargs, found, rows, extra)
        self._report = describe(self.plan, self.text.config, rows, found, embeds, extra)
        self._tick()
        return None if changed is None else (args, changed)

    def _after_text(self, module, args, kwargs, output):
        run = self._shrink.now
        self._shrink.leave(output)
        report = self._report
        if report is not None and report.pending:
            self._tock("prefill")
            report.finish(run, dict(self._clock))
        return output

    def _before_layer(self, index, module, args, kwargs):
        return self._shrink.before_layer(index, args, kwargs)

    # --- measure=True ---

    def _tick(self) -> None:
        if self.measure:
            self._clock["start"] = _now(self.text)

    def _tock(self, what: str) -> None:
        if self.measure and "start" in self._clock:
            self._clock[what] = 1e3 * (_now(self.text) - self._clock.pop("start"))


def _forget_graphs() -> None:
    """Compiled code does not look for hooks again: what was compiled with other ones must go."""
    dynamo = sys.modules.get("torch._dynamo")
    if dynamo is not None and dynamo.utils.counters["frames"]:
        torch.compiler.reset()


def _has_images(kwargs: dict) -> bool:
    for name in VISUAL_INPUTS:
        value = kwargs.get(name)
        if isinstance(value, dict) and not any(encoded is not None for encoded in value.values()):
            continue
        if value is not None:
            return True
    return False


def _now(module) -> float:
    if any(parameter.is_cuda for parameter in module.parameters()):
        torch.cuda.synchronize()
    return time.perf_counter()
