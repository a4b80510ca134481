"""Stock generate() drives, graphs compute: sampling, stopping and streaming stay the library's, the forward does not."""

import contextlib
import inspect
import threading
import time
import warnings
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast

from .. import compat, prompt
from ..adapters import EncodeCall
from ..hooks import Hooks
from ..report import describe
from ..vision_pruning import with_budgets
from . import layout
from .encoder import KIND, Encoder, reason_against
from .graphs import Buffers, Graph, Graphs
from .runner import Runner, Shape

STEP, MOST = 64, 8  # of buckets: slots between two, and how many of each kind are kept
PIXELS = ("pixel_values", "pixel_values_images")
NO_GENERATION = {  # options of generate() that graphs do not serve, and the value that leaves them out
    "num_beams": (None, 1),
    "num_return_sequences": (None, 1),
    "use_cache": (None, True),
    "cache_implementation": (None, "dynamic"),
    "prefill_chunk_size": (None,),
    "output_attentions": (None, False),
    "output_hidden_states": (None, False),
    "guidance_scale": (None, 1, 1.0),
    "prompt_lookup_num_tokens": (None,),
    "assistant_early_exit": (None,),
    "penalty_alpha": (None, 0, 0.0),
    "dola_layers": (None,),
    "token_healing": (None, False),
    "assistant_model": (None,),
    "custom_generate": (None,),
    "inputs_embeds": (None,),
    "position_ids": (None,),
    "mm_encoder_outputs": (None,),
    "pixel_values_videos": (None,),
    "labels": (None,),
    "logits_to_keep": (None, 1),
    "negative_prompt_ids": (None,),
    **dict.fromkeys(compat.CACHE_NAMES, (None,)),
}


@dataclass(frozen=True)
class Bucket:
    """What one prompt length and batch size is served by."""

    prompt_tokens: int  # of each row of a pruned prompt, at most
    max_new_tokens: int
    batch_size: int
    slots: tuple[int, ...]  # of each row, in each segment of the LLM: prompt and new tokens
    bytes: int  # of keys and values
    seconds: float  # to make it ready


class CapturedCache(Cache):
    """Stands for the keys and values of a prompt inside the graphs' buffers, in what generate() returns."""

    def __init__(self, length: int):
        super().__init__(layers=[])
        self.length = length

    @property
    def is_compileable(self) -> bool:
        return False

    def get_seq_length(self, *args, **kwargs) -> int:
        return self.length

    def update(self, *args, **kwargs):
        raise RuntimeError(
            "this cache stands for buffers of compiled graphs, which the next prompt overwrites, and cannot be continued; "
            "generate on a handle without compile() to continue a conversation"
        )


@dataclass
class _Ready:
    """A Runner and its graphs."""

    runner: Runner
    prefill: Graph
    decode: Graph
    bucket: Bucket


@dataclass
class _Deferred:
    """Stands for the features that generate() asks for before the prompt is known to fit."""

    kind: str
    original: Callable
    args: tuple
    kwargs: dict


@dataclass
class _Serving:
    """One generate() under way."""

    module: torch.nn.Module
    cache: CapturedCache | None = None
    ready: _Ready | None = None
    rows: int = 0
    left: int = 0  # tokens that still fit


class _Refused(Exception):
    """The reason why a call runs through the hooks."""


class Captured:
    """What `PruningHandle.compile` installs. One prompt at a time; several threads wait for each other."""

    def __init__(self, handle, prompt_tokens, max_new_tokens: int, batch_size, backend: str | None, strict: bool):
        self.handle, self.base, self.strict = handle, handle.base, strict
        self.buckets, self.new, self.batches = prompt_tokens, max_new_tokens, batch_size
        self.text, self.plan, self.method = handle.text, handle.plan, handle.method
        self.axes = 3 if hasattr(self.base, "rope_deltas") else 1
        self.deepstack = len(getattr(getattr(self.base, "visual", None), "deepstack_merger_list", ()))
        self.graphs = Graphs(self.text.embed_tokens.weight.device, backend)
        self._buffers = Buffers(self.text.embed_tokens.weight.detach())
        self._runners: OrderedDict[Shape, _Ready] = OrderedDict()
        self._encoders: OrderedDict[tuple, tuple[Encoder, Graph]] = OrderedDict()
        self._items: OrderedDict[tuple, list] = OrderedDict()
        self._lock = threading.RLock()
        self._serving: _Serving | None = None
        self._owner: int | None = None
        self._said: set[str] = set()
        self._modules = list(handle.model.modules())
        self.standing = _standing_reason(handle)

    # --- generate() ---

    @contextlib.contextmanager
    def serving(self, module, args: tuple, kwargs: dict):
        """Around a generate() of `module`. What graphs do not serve runs as if there were none."""
        with self._lock:
            outer = self._serving
            try:
                self._serving = None
                try:
                    if outer is not None:
                        raise _Refused("generate() is called inside another one")
                    self._check_call(module, args, kwargs)
                    self._serving = _Serving(module)
                except _Refused as refused:
                    self._fall_back(refused)
                yield
            finally:
                self._serving = outer

    def forward(self, module, original, *args, **kwargs):
        """In place of the forward of a model whose generate() is served."""
        serving = self._serving
        if serving is None or serving.module is not module or not self._lock_is_mine():
            return original(*args, **kwargs)
        cache = compat.cache_of(kwargs)
        if serving.cache is not None:
            if cache is not serving.cache or args:
                return original(*args, **kwargs)
            return self._decode(serving, kwargs["input_ids"])
        try:
            if args or kwargs.get("input_ids") is None or kwargs["input_ids"].ndim != 2:
                raise _Refused("the model is not called with ids alone")
            return self._prefill(serving, kwargs)
        except _Refused as refused:
            self._serving = None
            self._fall_back(refused)
        given = kwargs.get("mm_encoder_outputs") or {}
        for kind, later in given.items():
            if isinstance(later, _Deferred):
                given[kind] = self.handle._encode(kind, later.original, *later.args, **later.kwargs)
        return original(*args, **kwargs)

    def deferred(self, kind: str, original, args: tuple, kwargs: dict) -> _Deferred | None:
        """Newer versions of generate() encode images before they call the model: with the prompt, in its graph."""
        serving = self._serving
        if serving is None or serving.cache is not None or not self._lock_is_mine():
            return None
        return _Deferred(kind, original, args, kwargs)

    def _lock_is_mine(self) -> bool:
        return self._lock._is_owned()

    def _fall_back(self, refused: _Refused) -> None:
        reason = str(refused)
        if self.strict:
            raise NotImplementedError(f"sts_kernels: this call cannot be served by compiled graphs: {reason}") from None
        if reason not in self._said:
            self._said.add(reason)
            warnings.warn(
                f"sts_kernels: this call runs through the hooks, not through compiled graphs: {reason}", stacklevel=6
            )

    def _check_call(self, module, args: tuple, kwargs: dict) -> None:
        if self.standing is not None:
            raise _Refused(self.standing)
        given = kwargs.get("generation_config") or module.generation_config
        if len(args) > 1:
            raise _Refused("arguments of generate() by position")
        for name, plain in NO_GENERATION.items():
            value = kwargs[name] if name in kwargs else getattr(given, name, None)
            if not any(value is option or (option is not None and value == option) for option in plain):
                raise _Refused(f"{name} of generate()")
        if self.base.training:
            raise _Refused("the model is in training mode")
        if torch.is_autocast_enabled(self.graphs.device.type):
            raise _Refused("autocast is on")
        if (hooked := self._foreign_hooks()) is not None:
            raise _Refused(f"there are hooks on {hooked}, which a graph would not call")
        asked = kwargs.get("max_new_tokens", getattr(given, "max_new_tokens", None))
        if asked is not None and asked > self.new:
            raise ValueError(
                f"sts_kernels: max_new_tokens is {asked}, and compiled were {self.new}; give "
                f"compile(max_new_tokens={asked})"
            )

    def _foreign_hooks(self) -> str | None:
        for module in self._modules:
            for table in (module._forward_hooks, module._forward_pre_hooks):
                for hook in table.values():
                    library = (getattr(hook, "__module__", None) or "").startswith("transformers.")
                    if not library and not isinstance(getattr(hook, "owner", None), Hooks):
                        return type(module).__name__
        return None

    # --- a prompt ---

    def _prefill(self, serving: _Serving, kwargs: dict):
        session = self.handle._sessions.now
        arguments = dict(kwargs)
        for kind, later in (arguments.pop("mm_encoder_outputs", None) or {}).items():
            if kind != KIND or not isinstance(later, _Deferred):
                raise _Refused(f"{kind}s that are encoded already, or are no images")
            arguments |= inspect.signature(later.original).bind_partial(*later.args, **later.kwargs).arguments
        pixels = next((arguments[name] for name in PIXELS if arguments.get(name) is not None), None)
        arguments = {k: v if k in PIXELS else _on_host(v) for k, v in arguments.items()}
        ids, mask = arguments["input_ids"], arguments.get("attention_mask")
        if mask is not None and mask.shape != ids.shape:
            raise _Refused("the attention mask is not one of padding")
        valid = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
        rows = len(ids)
        batch = self._at_least(rows, self.batches, "prompts", "batch_size")
        token_ids = prompt.token_ids(self.base.config)
        modality = prompt.placeholders(self.base, token_ids, ids, None)
        encoder = None
        if pixels is not None:
            encoder, items = self._encoder(arguments, ids, token_ids, pixels)
        given = layout.read(
            ids, valid, modality, self._positions(arguments, valid), {KIND: items} if encoder else {}, self.plan
        )
        longest = max(given.entering)
        slots = self._at_least(longest, self.buckets, "slots", "prompt_tokens")
        try:
            shape = layout.shape_of(given, self.plan, batch, slots, self.new)
            values, places = layout.fill(given, shape, self.plan)
        except NotImplementedError as error:
            raise _Refused(str(error)) from None
        ready = self._runner(serving.module, shape)
        runner = ready.runner
        runner.prompt.load(values)
        timer = self.handle._timer
        if encoder is not None:
            with timer(session, "encode"):
                self._encode(encoder, runner, pixels, places)
        timer.start(session)
        out = ready.prefill.run()
        timer.stop(session, "prefill")
        if encoder is not None:
            self._report(given, shape, out["columns"], dict(session.clock))
        serving.ready, serving.rows, serving.left = ready, rows, self.new
        serving.cache = CapturedCache(ids.shape[1])
        return self._output(serving, out)

    def _decode(self, serving: _Serving, ids: Tensor):
        if ids.shape != (serving.rows, 1):
            raise RuntimeError(
                f"sts_kernels: compiled graphs decode one token of each of the {serving.rows} prompts at a time, got ids "
                f"of shape {tuple(ids.shape)}"
            )
        if not serving.left:
            raise ValueError(
                f"sts_kernels: the answer is longer than the {self.new} tokens that were compiled; give "
                "compile(max_new_tokens=...) a larger number"
            )
        serving.left -= 1
        serving.cache.length += 1
        serving.ready.runner.token[: serving.rows].copy_(ids)
        return self._output(serving, serving.ready.decode.run())

    @staticmethod
    def _output(serving: _Serving, out: dict) -> CausalLMOutputWithPast:
        return CausalLMOutputWithPast(logits=out["logits"][: serving.rows, None], **{compat.CACHE: serving.cache})

    def _encode(self, encoder: tuple[Encoder, Graph], runner: Runner, pixels: Tensor, places: Tensor) -> None:
        encode, graph = encoder
        encode.pixels.copy_(pixels, non_blocking=True)
        encode.places.copy_(places, non_blocking=True)
        out = graph.run()
        count = encode.rows
        runner.visual[:count].copy_(out["rows"])
        runner.places[:, :count].copy_(out["places"])
        runner.candidate[:count].copy_(out["candidate"])
        for mine, rows in zip(runner.deepstack, out["deepstack"], strict=True):
            mine[:count].copy_(rows)

    def _positions(self, arguments: dict, valid: Tensor) -> Tensor:
        """(axes, B, S): rotary positions of the full prompt, as the model itself numbers them."""
        index = getattr(self.base, "get_rope_index", None)
        if index is not None and any(arguments.get(f"{kind}_grid_thw") is not None for kind in prompt.KINDS):
            wanted = inspect.signature(index).parameters
            if "mm_token_type_ids" not in wanted or arguments.get("mm_token_type_ids") is not None:
                given = {name: arguments[name] for name in wanted if arguments.get(name) is not None}
                with torch.device("cpu"):
                    return index(**given | {"attention_mask": valid.long()})[0]
        return (valid.long().cumsum(1) - 1).clamp(min=0).expand(self.axes, -1, -1)

    def _report(self, given: layout.Prompt, shape: Shape, columns: list[Tensor], clock: dict) -> None:
        plan, rows = self.plan, len(given.rows)
        report = describe(plan, self.text.config, self.text.embed_tokens.weight.dtype, given.rows, given.modality, None)
        numbers = [given.entering, *(made.lengths for made in layout.planned_cuts(plan.cuts, given.rows, given.entering))]
        layers, left = [0, *(plan.cuts[cut.index].layer for cut in shape.cuts)], {}
        for layer, held, lengths in zip(layers, columns, numbers, strict=True):
            slots = torch.arange(held.shape[1], device="cpu") < torch.tensor(lengths, device="cpu")[:, None]
            left[layer] = held[:rows].clone(), slots
        report.finish(left, clock)
        self.handle._llm.report = report

    # --- what is made ready once ---

    def _at_least(self, number: int, given: Sequence[int] | None, what: str, option: str) -> int:
        """The smallest of the given sizes that serves `number`; without any a multiple of STEP."""
        if given is None:
            return -(-number // STEP) * STEP
        found = min((size for size in given if size >= number), default=None)
        if found is None:
            subject = "the pruned prompt takes" if option == "prompt_tokens" else "the batch has"
            raise ValueError(
                f"sts_kernels: {subject} {number} {what}, and the most compiled for is {max(given)}; give "
                f"compile({option}={(*given, number)})"
            )
        return found

    def _runner(self, module, shape: Shape) -> _Ready:
        if (ready := self._runners.get(shape)) is None:
            if len(self._runners) >= max(MOST, len(self.buckets or ()) * len(self.batches)):
                self._runners.popitem(last=False)
            start = time.perf_counter()
            runner = Runner(
                self.text,
                module.get_output_embeddings(),
                self.method,
                self.plan,
                self.handle.contiguous,
                self.axes,
                self.deepstack,
                shape,
                self._buffers,
            )
            prefill, decode = runner.ready(self.graphs)
            slots = tuple(segment.room for segment in runner.segments)
            seconds = time.perf_counter() - start
            bucket = Bucket(shape.slots, shape.new, shape.batch, slots, runner.bytes, seconds)
            ready = self._runners[shape] = _Ready(runner, prefill, decode, bucket)
        self._runners.move_to_end(shape)
        return ready

    def _encoder(self, arguments: dict, ids: Tensor, token_ids: dict[str, int], pixels: Tensor):
        adapter = self.handle.adapter
        call = EncodeCall(KIND, arguments, lambda kind: prompt.runs(ids, token_ids[kind]))
        try:
            shape = adapter.fixed_encoder.shape(self.base, call)
        except NotImplementedError as error:
            raise _Refused(str(error)) from None
        key = (shape, tuple(pixels.shape), pixels.dtype)
        if key not in self._encoders:
            size = torch.Size((*shape.features, 1))
            items = with_budgets(adapter.layout(self.base, call, size), self.plan)
            order = None if adapter.order is None else adapter.order(self.base, call)
            encoder = Encoder(
                self.base, adapter, self.method, self.handle.scope, shape, items, order, pixels, self.axes
            )
            if len(self._encoders) >= MOST:
                self._encoders.popitem(last=False)
            self._encoders[key] = encoder, encoder.ready(self.graphs), items
        self._encoders.move_to_end(key)
        encoder, graph, items = self._encoders[key]
        return (encoder, graph), items


def _on_host(value):
    if isinstance(value, Tensor) and not value.is_floating_point():
        return value.cpu()
    return value


def _standing_reason(handle) -> str | None:
    """Why no call of this model can be served; None: nothing stands in the way."""
    for module in handle.model.modules():
        if hasattr(module, "_hf_hook"):
            return "modules of the model are offloaded or dispatched by accelerate"
    if getattr(handle.model, "hf_quantizer", None) is not None:
        return "the model is quantised"
    devices = {parameter.device for parameter in handle.base.parameters()}
    if len(devices) > 1:
        return f"the model is on several devices, {', '.join(sorted(map(str, devices)))}"
    if (reason := reason_against(handle.method, handle.text.embed_tokens.weight.device)) is not None:
        return reason
    kind = getattr(handle.text.rotary_emb, "rope_type", "default")
    if "dynamic" in kind or kind == "longrope":
        return f"rotary embeddings of type {kind} follow the length of the prompt"
    return None
