"""apply_sts: hooks on one model instance, and the handle that takes them off again."""

import functools
import inspect
import sys
import threading
import time
import warnings
import weakref

import torch
import transformers

from ...pruning.config import STSConfig
from . import compat, cudnn, families, marks, prompt, refusals, saliency, stage1, stage2, tap
from .cache import pruned_prompt
from .hooks import Hooks
from .report import Report, describe
from .session import Session, Sessions
from .stack import Caller, caller_of

VISUAL_INPUTS = ("pixel_values", "pixel_values_images", "pixel_values_videos", "mm_encoder_outputs")

_applied: "weakref.WeakKeyDictionary[torch.nn.Module, weakref.ref[STSHandle]]" = weakref.WeakKeyDictionary()


def apply_sts(model, config: STSConfig, measure: bool = False, cudnn_attention: bool = False) -> "STSHandle":
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
    Several threads may run prompts at once where the model itself allows it. A deep copy of the model is a plain model.

    Args:
        model: LlavaForConditionalGeneration and the like, its base model, or a wrapper; docs/transformers.md lists the
            families.
        config: what to keep.
        measure: time encoding and prefill of each prompt, at the price of device syncs; see `report`.
        cudnn_attention: let torch choose cuDNN's attention for pruned prompts. It plans every new length of the keys
            anew, which takes tens of milliseconds; False keeps it off, for the whole process, while a pruned prompt is
            inside the LLM.

    Returns:
        a handle: a context manager, or call `remove()`; `remove_sts(model)` does the same without it.

    Raises:
        TypeError, ValueError: not a supported family, no such layer, or STS is active on the model already.
        NotImplementedError: what the family, the model's settings or the version of transformers do not allow, in one
            sentence.
    """
    if not isinstance(config, STSConfig):
        raise TypeError(f"apply_sts: config must be an STSConfig, got {type(config).__name__}")
    return STSHandle(model, config, measure, cudnn_attention)


def remove_sts(model) -> bool:
    """Takes STS off a model whose handle is lost. False: it was not active."""
    handle = _active(_base_model(model))
    if handle is None:
        return False
    handle.remove()
    return True


def _active(base) -> "STSHandle | None":
    handle = _applied.get(base) if isinstance(base, torch.nn.Module) else None
    return None if handle is None else handle()


def _base_model(model) -> torch.nn.Module:
    """The module that joins vision encoder, projector and LLM, however deep it is wrapped."""
    modules = model.modules() if isinstance(model, torch.nn.Module) else ()
    return next((module for module in modules if "language_model" in module._modules), model)


class STSHandle:
    """STS on one model."""

    def __init__(self, model, config: STSConfig, measure: bool = False, cudnn_attention: bool = False):
        base = _base_model(model)
        model_type = getattr(getattr(base, "config", None), "model_type", None)
        family = families.family_of(model_type)
        if family is None or "language_model" not in base._modules:
            known = ", ".join(f"{f.name} ({', '.join(f.model_types)})" for f in families.FAMILIES)
            raise ValueError(
                f"apply_sts: {type(model).__name__} (model_type {model_type!r}) is not of a supported family: {known}"
            )
        if _active(base) is not None:
            raise ValueError(
                "apply_sts: STS is active on this model already; remove the first handle before a second one, with "
                "remove_sts(model) if it is lost"
            )
        self.model, self.base, self.family, self.measure = model, base, family, measure
        self.text = base.language_model
        compat.check_model(base, self.text)
        self.plan = config.plan(len(self.text.layers), family.prune_layer)
        refusals.refuse_model(model, base, self.text, self.plan.prune_layer)
        #: Columns of the following prompts that are prompt, for a plain forward over prompt and answer: the query of
        #: stage 2 is the last token within them. None: all of them, or those that generate() was given.
        self.prompt_length: int | None = None
        self.cudnn_attention = cudnn_attention
        self._arguments = {module: compat.parameters(module) for module in (base, self.text)}
        self._report: Report | None = None
        self._ids = prompt.token_ids(base.config)
        self._shrink = stage2.LateShrink(self.text, self.plan.prune_layer)
        self._known: weakref.WeakSet[Session] = weakref.WeakSet()
        self._sessions = Sessions(self._known)
        self._handed_out = False  # whether a caller has features with marks in them
        self._hooks, self._layer_hooks = Hooks(), Hooks()
        self._layer_users: weakref.WeakSet[Session] = weakref.WeakSet()  # forwards that need hooks on every layer
        self._generating: set[int] = set()  # threads
        self._layers_stay, self._lock = False, threading.RLock()
        self._tapped: list[torch.nn.Module] = []
        self.active = True
        try:
            _forget_graphs()
            self._install()
            _applied[base] = weakref.ref(self)
        except BaseException:
            self.remove()
            raise

    # --- life ---

    def __enter__(self) -> "STSHandle":
        return self

    def __exit__(self, *exc) -> None:
        self.remove()

    def remove(self) -> None:
        """Restores the model: no hook or attribute set here is left, also after an interrupt. Safe to call twice."""
        if self.active:
            _forget_graphs()
        with self._lock:
            self.active = False
            self._layer_hooks.remove()
        self._hooks.remove()
        for module in self._tapped:
            tap.detach(module)
        for session in list(self._known):
            self._close(session)
        if _active(self.base) is self:
            del _applied[self.base]

    @property
    def report(self) -> Report | None:
        """What the last prompt with images kept and saved; None before the first."""
        return self._report

    # --- installation ---

    def _install(self) -> None:
        for module in self.model.modules():
            if isinstance(module, transformers.GenerationMixin) and any(part is self.base for part in module.modules()):
                self._hooks.shadow(module, "generate", functools.partial(self._generate, module))
        for name, encode in (("get_image_features", self._encode_images), ("get_video_features", self._encode_videos)):
            if hasattr(self.base, name):
                self._hooks.shadow(self.base, name, encode)
        projector = self.family.projector(self.base)
        self._hooks.before(projector, self._before_projector)
        self._hooks.after(projector, self._after_projector)
        self._hooks.before(self.base, self._before_model)
        self._hooks.before(self.text, self._before_text)
        self._hooks.after(self.text, self._after_text)
        self._hooks.before(self.text.layers[0], self._before_first_layer)
        self._tap(self.text.layers[self.plan.prune_layer - 1].self_attn, self._last_query)
        if self.plan.config.anchor == "saliency":
            for attention in {self.family.vision_attention(self.base, kind) for kind in self._ids}:
                self._tap(attention, self._vision_attention)

    def _tap(self, attention: torch.nn.Module, sink) -> None:
        self._tapped.append(attention)
        tap.attach(attention, sink)

    # --- around the model ---

    def _generate(self, module, original, *args, **kwargs):
        """Refuses before anything runs what `_caller` refuses where a generate() that is not shadowed calls."""
        if _has_images(kwargs):
            refusals.refuse_generation(module, kwargs, compat.cache_of(kwargs))
        me = threading.get_ident()
        with self._lock:
            refusals.refuse_threads(self.base, self._generating - {me})
            inner = me in self._generating
            self._generating.add(me)
        try:
            return original(*args, **kwargs)
        finally:
            if not inner:
                self._generating.discard(me)

    def _before_model(self, module, args, kwargs) -> None:
        """The base model: sees which columns are images."""
        if module is not self.base:
            return _copy_is_plain(module)
        session = self._sessions.now
        given = compat.named(self._arguments[module], args, kwargs)
        ids, embeds = given.get("input_ids"), given.get("inputs_embeds")
        session.found, session.prompt_ids, session.by_ids = None, ids, embeds is None
        if _has_images(given):
            refusals.refuse_gradients(self.base)
            refusals.refuse_cache(compat.cache_of(given))
            session.caller = self._caller()
            session.found = prompt.placeholders(self.base, self._ids, ids, embeds)

    def _caller(self) -> Caller:
        caller = caller_of(self.base)
        if caller.model is not None:
            refusals.refuse_generation(caller.model, caller.options, compat.cache_of(caller.options))
        return caller

    def _encode_images(self, original, *args, **kwargs):
        return self._encode("image", original, args, kwargs)

    def _encode_videos(self, original, *args, **kwargs):
        return self._encode("video", original, args, kwargs)

    def _encode(self, kind: str, original, args: tuple, kwargs: dict):
        session = self._sessions.now
        if session.call is not None:  # Qwen3-VL's videos pass through get_image_features
            return original(*args, **kwargs)
        caller = self._caller()
        ids = session.prompt_ids if caller.forward else caller.ids
        arguments = inspect.signature(original).bind_partial(*args, **kwargs).arguments
        arguments = {**arguments.pop("kwargs", {}), **arguments}
        session.call = families.EncodeCall(kind, arguments, lambda which: prompt.runs(ids, self._ids[which]))
        session.saliency = []
        self._tick(session)
        try:
            out = original(*args, **kwargs)
        finally:
            session.call = None
            self._tock(session, "encode")
        if not caller.forward and caller.model is None:
            session.handed_out[kind] = (session.items[kind], marks.of_output(out))
            self._handed_out = True
        return out

    # --- stage 1 ---

    def _before_projector(self, module, args, kwargs):
        session = self._sessions.now
        session.dropping = None
        if session.call is None:
            return None
        x, kind = args[0], session.call.kind
        features = self.family.features(module, x)
        items = self.family.layout(self.base, session.call, features.shape)
        flat = features.reshape(-1, features.shape[-1])
        rows = stage1.select(flat, items, self.plan, self._unit_saliency(session, features.shape))
        session.items[kind] = items
        if rows is None:
            return None
        session.dropping = (rows, features.shape)
        kept = x.reshape(len(flat), -1)[rows].view(-1, x.shape[-1])
        return (kept, *args[1:]), kwargs

    def _after_projector(self, module, args, kwargs, output):
        session = self._sessions.now
        if session.dropping is None or output is None:
            return None
        (rows, shape), session.dropping = session.dropping, None
        return marks.mark(output, rows, shape)

    def _vision_attention(self, module, query, key, kwargs) -> None:
        session = self._sessions.now
        if session.call is not None:
            session.saliency += saliency.calls_of(query, key, kwargs)

    def _unit_saliency(self, session: Session, shape: torch.Size) -> torch.Tensor | None:
        calls, session.saliency = session.saliency, []
        return self.family.saliency(self.base, calls, shape) if calls else None

    # --- stage 2 ---

    def _before_text(self, module, args, kwargs):
        if module is not self.text:
            return None
        session = self._sessions.now
        self._close(session)  # an interrupt may have ended the last forward
        found, session.found = session.found, None
        by_ids, session.by_ids = session.by_ids, False
        given = compat.named(self._arguments[module], args, kwargs)
        cache, embeds = compat.cache_of(given), given.get("inputs_embeds")
        if found is None and embeds is not None and self._handed_out and not by_ids:
            found = self._find_marks(session, embeds, cache)
        prompt_in_cache = pruned_prompt(cache)
        if prompt_in_cache is not None:
            started = self._shrink.resume(given, cache, prompt_in_cache)
        elif found is None or embeds is None or found.shape != embeds.shape[:2]:
            return None
        else:
            started = self._prefill(session, given, found)
        if started is None:
            return None
        session.run, changed = started
        session.run.prompt.running = True
        if not self.cudnn_attention and cudnn.concerns(embeds):
            cudnn.turn_off(session)
        return (), changed

    def _find_marks(self, session: Session, embeds: torch.Tensor, cache) -> torch.Tensor | None:
        """Of a prompt that the caller merged with encoded features."""
        found = marks.find(embeds, session.handed_out)
        if found is not None:
            refusals.refuse_gradients(self.base)
            refusals.refuse_cache(cache)
            session.caller = self._caller()
            session.items.update({kind: items for kind, (items, _) in session.handed_out.items()})
        return found

    def _prefill(self, session: Session, kwargs: dict, found: torch.Tensor) -> tuple[stage2.Pass, dict] | None:
        embeds, mask = kwargs["inputs_embeds"], refusals.plain_mask(kwargs.get("attention_mask"))
        rows = prompt.read_rows(found, None if mask is None else mask.bool(), session.items, self.plan)
        if not any(row.images for row in rows):
            return None
        length = embeds.shape[1]
        prompt_length = session.caller.prompt_length if self.prompt_length is None else self.prompt_length
        extra = 0 if prompt_length is None else max(0, length - prompt_length)
        started = self._shrink.prefill(kwargs, found, rows, extra)
        self._report = session.report = describe(self.plan, self.text.config, rows, found, embeds, extra)
        self._tick(session)
        return started

    def _after_text(self, module, args, kwargs, output) -> None:
        if module is not self.text:
            return
        session = self._sessions.now
        run, report = session.run, session.report
        try:
            if run is not None:
                self._shrink.leave(run, output)
            if report is not None:
                self._tock(session, "prefill")
                report.finish(run, dict(session.clock))
        finally:
            self._close(session)

    def _close(self, session: Session) -> None:
        """Ends what a forward of the text model holds."""
        if session.run is None and session.report is None:
            return
        if session.run is not None:
            session.run.prompt.running = False
        cudnn.turn_on(session)
        self._release_layers(session)
        session.run = session.report = None

    # --- decoder layers ---

    def _before_first_layer(self, module, args, kwargs):
        """All layers are called with what the first one gets: it tells whether they need hooks in this forward."""
        session = self._sessions.now
        if session.run is None:
            return None
        if self._shrink.needs_layers(session.run, kwargs):
            self._hold_layers(session)
        return self._shrink.before_layer(session.run, 0, args, kwargs)

    def _before_layer(self, index, module, args, kwargs):
        run = self._sessions.now.run
        return None if run is None else self._shrink.before_layer(run, index, args, kwargs)

    def _hold_layers(self, session: Session) -> None:
        with self._lock:
            self._layer_users.add(session)
            if self._layer_hooks or not self.active:
                return
            self._layers_stay = _compiled()  # compiled code does not see hooks come and go
            for index, layer in enumerate(self.text.layers):
                if index:
                    self._layer_hooks.before(layer, self._before_layer, index)

    def _release_layers(self, session: Session) -> None:
        with self._lock:
            self._layer_users.discard(session)
            if not self._layer_users and not self._layers_stay:
                self._layer_hooks.remove()

    def _last_query(self, module, query, key, kwargs) -> None:
        run = self._sessions.now.run
        if run is not None:
            self._shrink.score(run, query, key, kwargs.get("scaling"))

    # --- measure=True ---

    def _tick(self, session: Session) -> None:
        if self.measure:
            session.clock["start"] = _now(self.text)

    def _tock(self, session: Session, what: str) -> None:
        if self.measure and "start" in session.clock:
            session.clock[what] = 1e3 * (_now(self.text) - session.clock.pop("start"))


def _copy_is_plain(module) -> None:
    if getattr(module, "_is_replica", False):
        raise NotImplementedError(
            "apply_sts: torch.nn.DataParallel is not supported, its replicas share the hooks of one model; run a "
            "process for each GPU"
        )
    warnings.warn(
        "apply_sts: this model is a copy of one that STS is active on, and is not pruned; call apply_sts on the copy",
        stacklevel=2,
    )


def _compiled() -> bool:
    dynamo = sys.modules.get("torch._dynamo")
    return dynamo is not None and bool(dynamo.utils.counters["frames"])


def _forget_graphs() -> None:
    """Compiled code does not look for hooks again: what was compiled with other ones must go."""
    if _compiled():
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
