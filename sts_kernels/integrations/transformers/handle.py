"""PruningHandle: the hooks of one pruned model, from installation to removal."""

import contextlib
import functools
import threading
import warnings
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
import transformers

from ... import _checks
from ...methods import Method, Plan
from . import attention_capture, captured, compat, prompt, unsupported
from .adapters import ADAPTERS, ModelAdapter, adapter_of
from .captured import Bucket, Captured
from .encoder_hooks import EncoderHooks, Relevance
from .hooks import Hooks
from .llm_hooks import REMOVED, LLMHooks, compiled
from .report import Report
from .session import Placed, Sessions
from .timer import Timer
from .untyped import Args, Kwargs, Model

VISUAL_INPUTS = ("pixel_values", "pixel_values_images", "pixel_values_videos", "mm_encoder_outputs")

_handles: "weakref.WeakKeyDictionary[torch.nn.Module, weakref.ref[PruningHandle]]" = weakref.WeakKeyDictionary()


def base_model(model: Model) -> Model:
    """The module that joins vision encoder, projector and LLM, however deep it is wrapped."""
    modules = model.modules() if isinstance(model, torch.nn.Module) else ()
    found = [module for module in modules if "language_model" in module._modules]
    known = (module for module in found if adapter_of(getattr(getattr(module, "config", None), "model_type", None)))
    return next(known, found[0] if found else model)  # a wrapper may call the whole model its language_model


def active_handle(model: Model) -> "PruningHandle | None":
    base = base_model(model)
    handle = _handles.get(base) if isinstance(base, torch.nn.Module) else None
    return None if handle is None else handle()


def supported(model: Model) -> tuple[Model, ModelAdapter]:
    """-> base model and adapter. Raises ValueError for other families, and where pruning is active already."""
    base = base_model(model)
    model_type = getattr(getattr(base, "config", None), "model_type", None)
    adapter = adapter_of(model_type)
    if adapter is None or "language_model" not in base._modules:
        known = ", ".join(f"{a.name} ({', '.join(a.model_types)})" for a in ADAPTERS)
        raise ValueError(
            f"sts_kernels: {type(model).__name__} (model_type {model_type!r}) is not of a supported family: {known}"
        )
    if active_handle(model) is not None:
        raise ValueError(
            "sts_kernels: pruning is active on this model already; remove the first handle before a second one, with "
            "remove_pruning(model) if it is lost"
        )
    compat.check_model(base, base.language_model)
    return base, adapter


class PruningHandle:
    """Pruning of one model by one method, until `remove()`. Also a context manager.

    Args:
        model, base, adapter: a model, with the results of `supported`.
        method, plan: which tokens to keep, and how many.
        scope: unit of one selection: "image", or "crop" for each crop, tile or frame by itself.
        positions: "original": kept tokens keep their rotary positions; "contiguous": they are renumbered without gaps.
        profile: time encoding and prefill of each prompt. Costs device syncs.
        cudnn_attention: let torch choose cuDNN's attention for pruned prompts.
        relevance: one number per visual token before pruning, or a function that returns them; see `prune`.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        base: Model,
        adapter: ModelAdapter,
        method: Method,
        plan: Plan,
        scope: str,
        positions: str,
        profile: bool = False,
        cudnn_attention: bool = False,
        relevance: Relevance | None = None,
    ):
        self.model, self.base, self.adapter, self.method, self.plan = model, base, adapter, method, plan
        self.text, self.scope = base.language_model, scope
        self.contiguous = contiguous = positions == "contiguous"
        self._graphs: Captured | None = None
        unsupported.check_model(model, base, self.text, [cut.layer for cut in plan.cuts], contiguous)
        unsupported.check_method(method, plan, base, adapter)
        self._sessions = Sessions(weakref.WeakSet())
        self._timer = Timer(self.text, profile)
        self._arguments = compat.parameters(base)
        self._encoder = EncoderHooks(adapter, base, method, plan, scope, self._sessions, relevance)
        self._llm = LLMHooks(base, self.text, method, plan, contiguous, cudnn_attention, self._sessions, self._timer)
        self._hooks = Hooks()
        self._captured: list[torch.nn.Module] = []
        self._lock = threading.RLock()
        try:
            self._forget_graphs()
            self._install()
            _handles[base] = weakref.ref(self)
        except BaseException:
            self.remove()
            raise

    # --- life ---

    def __enter__(self) -> "PruningHandle":
        self._check_active()
        return self

    def __exit__(self, *exc: object) -> None:
        self.remove()

    def remove(self) -> None:
        """Restores the model: removes every hook and attribute set here, also after an interrupt. Safe to call
        twice.

        In another thread, a generate() that is inside a pruned forward, or continues a pruned cache, ends with a
        RuntimeError. Do not call it while another thread calls the model's forward directly.
        """
        if self._llm.active:
            self._forget_graphs()
        self._llm.remove()
        self._hooks.remove()
        self._graphs = None
        for module in self._captured:
            attention_capture.detach(module)
        if active_handle(self.base) is self:
            del _handles[self.base]

    def _check_active(self) -> None:
        if not self._llm.active:
            raise RuntimeError("sts_kernels: this handle was removed, and the model is plain; call prune() again")

    @property
    def report(self) -> Report | None:
        """Report of the last prompt with images: tokens kept, memory and FLOPs saved. None before the first."""
        return self._llm.report

    @property
    def prompt_length(self) -> int | None:
        """Prompt columns of the following forwards, for a plain forward over prompt and answer.

        Attention scores are those of the last token within these columns. None: all columns, or those given to
        generate().
        """
        return self._llm.prompt_length

    @prompt_length.setter
    def prompt_length(self, columns: int | None) -> None:
        if columns is not None and (isinstance(columns, bool) or not isinstance(columns, int) or columns < 1):
            raise ValueError(f"sts_kernels: prompt_length must be an int of at least 1, or None, got {columns!r}")
        self._check_active()
        self._llm.prompt_length = columns

    def compile(
        self,
        prompt_tokens: int | Sequence[int] | None = None,
        max_new_tokens: int = 256,
        batch_size: int | Sequence[int] = 1,
        backend: str | None = None,
        strict: bool = False,
    ) -> list[Bucket]:
        """Lets generate() run on graphs of fixed shapes: encoder and projector, pruned prefill, decode step.

        ::

            with apply_sts(model, STSConfig(budget=128)) as sts:
                sts.compile(max_new_tokens=256)
                ids = model.generate(**inputs, max_new_tokens=64)

        On a CUDA device these are CUDA graphs, which take no time on the host. generate() stays the loop, with its
        sampling, stopping and streaming. A method can be compiled if sizes alone fix its numbers of tokens, and if it
        selects before the LLM without text, relevance or device syncs.

        A call that graphs do not serve runs through the hooks, with one warning per reason: beams, several answers for
        a prompt, assisted decoding, outputs of attention or hidden states, embeddings instead of ids, a cache of the
        caller's, videos, hooks on modules, autocast, models that are offloaded or quantised, and a model of which
        weights, modules or settings were replaced since: call compile() again. Weights may change in place.

        One prompt runs at a time: threads wait for each other. A cache that generate() returns cannot be continued.

        Args:
            prompt_tokens: bucket sizes: max tokens of a pruned prompt, text included. A longer prompt is an error.
                None: multiples of 64, made on first use; the last 8 are kept. Where image sizes vary, the first prompt
                of a shape runs without graphs; they are made when the shape recurs.
            max_new_tokens: max new tokens of an answer. A call that asks for more is an error.
            batch_size: numbers of prompts in a batch. A smaller batch is padded with empty rows, a larger one is an
                error.
            backend: None, or "inductor": torch.compile fuses kernels before the capture, which takes a minute or more
                for each bucket.
            strict: a call that graphs do not serve is an error.

        Returns:
            the buckets that are ready: those asked for, where all images of the model have one size; else none yet.

        Raises:
            TypeError, ValueError: an invalid argument. From generate(): a prompt, batch or answer larger than compiled
                for, with the number to give.
            NotImplementedError: the method or the model cannot be compiled; with `strict`, a call cannot be served. The
                message says why in one sentence.
        """
        self._check_active()
        found = (m for m in self.model.modules() if isinstance(m, transformers.GenerationMixin))
        generating = [module for module in found if any(part is self.base for part in module.modules())]
        if not generating:
            raise ValueError("compile: the model must have a generate(), give the whole model to prune()")
        buckets = None if prompt_tokens is None else captured.sizes("prompt_tokens", prompt_tokens, 2)
        batches = captured.sizes("batch_size", batch_size, 1)
        _checks.integer("compile", "max_new_tokens", max_new_tokens, 1)
        captured.check_backend(backend)
        captured.check(self.method, self.adapter, self.text)
        graphs = Captured(self, generating[-1], buckets, max_new_tokens, batches, backend, strict)
        graphs.build()
        self._graphs = graphs
        return graphs.built

    def _install(self) -> None:
        for module in self.model.modules():
            if isinstance(module, transformers.GenerationMixin) and any(part is self.base for part in module.modules()):
                self._hooks.shadow(module, "generate", functools.partial(self._generate, module))
                self._hooks.shadow(module, "prepare_inputs_for_generation", self._llm.prepare_inputs)
                masks = transformers.masking_utils.create_masks_for_generate
                self._hooks.shadow(module, "create_masks_for_generate", self._llm.create_masks, masks)
                if hasattr(module, compat.OLD_MASKS):
                    self._hooks.shadow(module, compat.OLD_MASKS, self._llm.create_masks)
        for kind in prompt.KINDS:
            if hasattr(self.base, f"get_{kind}_features"):
                self._hooks.shadow(self.base, f"get_{kind}_features", functools.partial(self._encode, kind))
        projector = self.adapter.projector(self.base)
        self._hooks.before(projector, self._encoder.before_projector)
        self._hooks.after(projector, self._encoder.after_projector)
        self._hooks.before(self.base, self._before_model)
        self._llm.install(self._hooks)
        for layer, callback in self._llm.captured().items():
            self._capture(self.text.layers[layer].self_attn, callback)
        if self.method.signals & {"attention", "keys"}:
            kinds = prompt.token_ids(self.base.config)
            last = self.method.encoder_attention == "last"
            find = self.adapter.last_attention if last else self.adapter.vision_attention
            assert find is not None  # unsupported.check_method
            for attention in {find(self.base, kind) for kind in kinds}:
                self._capture(attention, self._encoder.capture)

    def _capture(self, attention: torch.nn.Module, callback: attention_capture.Callback) -> None:
        self._captured.append(attention)
        attention_capture.attach(attention, callback)

    def _forget_graphs(self) -> None:
        """Resets torch.compile where parts of the model were compiled, with hooks or without.

        Compiled code does not look for hooks again. Graphs of the whole model may stay. They recognise a pruned prompt
        by the class of its cache, and new images by the methods shadowed here. They contain no hook: a hook breaks the
        graph, or leaves only its mask in it.
        """
        if compiled("graph_break") or any(map(_compiled_alone, self.model.modules())):
            torch.compiler.reset()

    # --- around the model ---

    def _generate(self, module: Model, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Checks options before anything runs. `checked_caller` checks them for a generate() that is not shadowed."""
        if not self._llm.active:  # the caller has kept the method
            return original(*args, **kwargs)
        session, images = self._sessions.now, _has_images(kwargs)
        if images:
            unsupported.check_generation(module, self.text, kwargs, compat.cache_of(kwargs))
        me = threading.get_ident()
        with self._lock:
            unsupported.check_threads(self.base, self._llm.generating - {me})
            inner = me in self._llm.generating
            self._llm.generating.add(me)
        outer, session.checked, session.removed = session.checked, images, False
        served = contextlib.nullcontext() if self._graphs is None else self._graphs.serving(module, args, kwargs)
        try:
            with served, compat.without_kept_cache(module) if images else contextlib.nullcontext():
                out = original(*args, **kwargs)
        except Exception as error:
            if session.removed:
                raise RuntimeError(REMOVED) from error
            raise
        finally:
            session.checked = outer
            if not inner:
                self._llm.generating.discard(me)
        if session.removed:
            raise RuntimeError(REMOVED)
        return out

    def _encode(self, kind: str, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        session = self._sessions.now
        if (
            not self._llm.active or session.encoding is not None
        ):  # Qwen3-VL's get_video_features calls get_image_features
            return original(*args, **kwargs)
        if self._graphs is not None and (later := self._graphs.deferred(original, args, kwargs)) is not None:
            return later
        # A forward of the base model has checked the options before it encodes.
        caller = unsupported.checked_caller(self.base, session.checked or session.placed is not None)
        out = self._encoder.encode(kind, caller, self._timer, original, args, kwargs)
        self._llm.handed_out |= caller.outside
        return out

    def _before_model(self, module: torch.nn.Module, args: Args, kwargs: Kwargs) -> None:
        """Before the base model: finds the columns of visual tokens."""
        if module is not self.base:
            return _copy_is_plain(module)
        session = self._sessions.now
        given = compat.named(self._arguments, args, kwargs)
        ids, embeds = given.get("input_ids"), given.get("inputs_embeds")
        session.placed = placed = Placed(ids, given.get("attention_mask"), embeds is not None)
        if _has_images(given):
            unsupported.check_gradients(self.base)
            unsupported.check_cache(compat.cache_of(given), self.text)
            caller = unsupported.checked_caller(self.base, session.checked)
            placed.prompt_length, placed.columns = caller.prompt_length, caller.columns
            placed.modality = prompt.placeholders(self.base, self._encoder.token_ids, ids, embeds)


def _compiled_alone(module: torch.nn.Module) -> bool:
    forward = vars(module).get("forward")
    return getattr(module, "_compiled_call_impl", None) is not None or hasattr(forward, "_torchdynamo_orig_callable")


def _copy_is_plain(module: torch.nn.Module) -> None:
    if getattr(module, "_is_replica", False):
        raise NotImplementedError(
            "sts_kernels: torch.nn.DataParallel is not supported, its replicas share the hooks of one model; run a "
            "process for each GPU"
        )
    warnings.warn(
        "sts_kernels: this model is a copy of one that is pruned, and is not pruned itself; apply pruning to the copy",
        stacklevel=2,
    )


def _has_images(kwargs: Kwargs) -> bool:
    for name in VISUAL_INPUTS:
        value = kwargs.get(name)
        if isinstance(value, dict) and not any(encoded is not None for encoded in value.values()):
            continue
        if value is not None:
            return True
    return False
