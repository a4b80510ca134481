"""Graphs compute the forwards of a stock generate(). Sampling, stopping and streaming stay the library's."""

import contextlib
import functools
import inspect
import threading
import time
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn, TypeAlias

import torch
from torch import Tensor
from transformers import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast

from ....methods import Plan
from .. import compat, prompt
from ..adapters import EncodeCall, EncoderShape
from ..cut_selection import planned_cuts
from ..hooks import Hooks
from ..report import Left, describe
from ..untyped import Args, Config, Kwargs, Model
from ..vision_pruning import with_budgets
from ..visual_item import VisualItem
from . import layout
from .encoder import KIND, Encoded, Encoder
from .graphs import Buffers, Graph, Graphs
from .refusals import PIXELS, Compiled, Refused, check_arguments, check_call, standing_reason
from .runner import Decoded, Prefilled, Runner, Shape

if TYPE_CHECKING:
    from ..handle import PruningHandle

STEP = 64  # step between prompt lengths, in slots
MAX_SHAPES = 8  # shapes kept, of prompts and of images


@dataclass(frozen=True)
class Bucket:
    """A prompt length and batch size that is ready to run."""

    prompt_tokens: int  # max tokens of a row of a pruned prompt
    max_new_tokens: int
    batch_size: int
    slots: tuple[int, ...]  # per segment of the LLM: slots of a row, for prompt and new tokens
    bytes: int  # of the KV cache
    seconds: float  # of preparation


class CapturedCache(Cache):
    """Placeholder in the output of generate(): keys and values are in the graphs' buffers."""

    def __init__(self, length: int):
        super().__init__(layers=[])
        self.length = length

    @property
    def is_compileable(self) -> bool:
        return False

    def get_seq_length(self, *args: Any, **kwargs: Any) -> int:
        return self.length

    def update(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise RuntimeError(
            "this cache stands for buffers of compiled graphs, which the next prompt overwrites, and cannot be "
            "continued; generate on a handle without compile() to continue a conversation"
        )


@dataclass
class _Ready:
    """A Runner and its graphs."""

    runner: Runner
    prefill: Graph[Prefilled]
    decode: Graph[Decoded]
    bucket: Bucket | None = None  # None before `prepare`

    def prepare(self) -> None:
        if self.bucket is not None:
            return
        start, shape, segments = time.perf_counter(), self.runner.shape, self.runner.segments
        self.decode.prepare()
        self.prefill.prepare()
        seconds = time.perf_counter() - start
        slots = tuple(segment.room for segment in segments)
        self.bucket = Bucket(shape.slots, shape.new, shape.batch, slots, self.runner.bytes, seconds)


@dataclass
class _Deferred:
    """A call of get_image_features or get_video_features, put off until the prompt is known to fit."""

    original: Callable[..., Any]
    args: Args
    kwargs: Kwargs


@dataclass
class _Answer:
    """State of the decode steps after a prompt."""

    ready: _Ready
    cache: CapturedCache
    rows: int
    left: int  # new tokens that still fit


@dataclass
class _Serving:
    """A generate() under way that graphs serve."""

    thread: int
    answer: _Answer | None = None  # None until the prompt is known to fit


_EncoderEntry: TypeAlias = tuple[Encoder, Graph[Encoded], list[VisualItem]]


class Captured:
    """The graphs that `PruningHandle.compile` installs. They serve one prompt at a time; other threads wait."""

    def __init__(
        self,
        handle: "PruningHandle",
        module: Model,
        prompt_tokens: tuple[int, ...] | None,
        max_new_tokens: int,
        batch_size: tuple[int, ...],
        backend: str | None,
        strict: bool,
    ):
        assert handle.adapter.fixed_encoder is not None  # `check` refuses None
        self._fixed = handle.adapter.fixed_encoder
        self.handle, self.base, self.text = handle, handle.base, handle.text
        self.plan, self.method, self.adapter = handle.plan, handle.method, handle.adapter
        self.buckets, self.new, self.batches, self.strict = prompt_tokens, max_new_tokens, batch_size, strict
        self.axes = 3 if hasattr(self.base, "rope_deltas") else 1
        self.deepstack = len(getattr(getattr(self.base, "visual", None), "deepstack_merger_list", ()))
        self._head, self._modules = module.get_output_embeddings(), list(handle.model.modules())
        self._standing = standing_reason(handle, self._head, self._modules)
        self._compiled = Compiled(handle.model.config, self._modules)
        # False: image sizes vary and a shape may never recur, so graphs are made on its second use.
        self._one_size = self._fixed.usual(self.base, 1) is not None
        self._step = 1 if _steady(self.plan) else STEP
        self._graphs = Graphs(self.text.embed_tokens.weight.device, backend)
        self._buffers = Buffers(self.text.embed_tokens.weight.detach())
        self._runners: OrderedDict[Shape, _Ready] = OrderedDict()
        self._encoders: OrderedDict[tuple[EncoderShape, tuple[int, ...]], _EncoderEntry] = OrderedDict()
        self._lock = threading.RLock()
        self._serving: _Serving | None = None
        self._said: set[str] = set()
        if self._standing is not None:
            self._fall_back(Refused(self._standing))

    @property
    def built(self) -> list[Bucket]:
        return [ready.bucket for ready in self._runners.values() if ready.bucket is not None]

    def build(self) -> None:
        """Prepares the given buckets, for prompts with one image each. Does nothing for families whose image sizes
        vary."""
        if self.buckets is None or self._standing is not None:
            return
        for batch in sorted(self.batches, reverse=True):
            usual = self._fixed.usual(self.base, batch)
            if usual is None:
                return
            size, shape = usual
            pixels = torch.empty(shape, device="meta")
            items = self._encoder(size, EncodeCall(KIND, {PIXELS[0]: pixels}, lambda kind: []), pixels)[2]
            for slots in sorted(self.buckets, reverse=True):  # largest first: smaller buckets reuse its memory
                given = layout.of_length(items, slots, self.plan)
                if given is not None:
                    self._runner(layout.shape_of(given, self.plan, batch, slots, self.new, self._step))

    # --- generate() ---

    @contextlib.contextmanager
    def serving(self, module: Model, args: Args, kwargs: Kwargs) -> Iterator[None]:
        """Context around a generate() of `module`. A call that graphs cannot serve runs through the hooks."""
        with self._lock:
            outer, self._serving, shadowed = self._serving, None, Hooks()
            try:
                try:
                    if outer is not None:
                        raise Refused("generate() is called inside another one")
                    if self._standing is not None:
                        raise Refused(self._standing)
                    self._compiled.check()
                    check_call(module, args, kwargs, self.base, self._modules, self._graphs.device, self.new)
                    self._serving = _Serving(threading.get_ident())
                    shadowed.shadow(module, "forward", self._forward)
                except Refused as refused:
                    self._fall_back(refused)
                yield
            finally:
                shadowed.remove()
                self._serving = outer

    def _forward(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Replaces the forward of a model during a generate() that is served."""
        serving = self._served()
        if serving is None:
            return original(*args, **kwargs)
        if serving.answer is not None:
            if compat.cache_of(kwargs) is not serving.answer.cache or args:
                return original(*args, **kwargs)
            return self._decode(serving.answer, kwargs["input_ids"])
        try:
            if args or kwargs.get("input_ids") is None or kwargs["input_ids"].ndim != 2:
                raise Refused("the model is not called with ids alone")
            return self._prefill(serving, kwargs)
        except Refused as refused:
            self._serving = None
            self._fall_back(refused)
        given = kwargs.get("mm_encoder_outputs") or {}
        for kind, later in given.items():
            if isinstance(later, _Deferred):
                given[kind] = self.handle._encode(kind, later.original, *later.args, **later.kwargs)
        return original(*args, **kwargs)

    def deferred(self, original: Callable[..., Any], args: Args, kwargs: Kwargs) -> _Deferred | None:
        """Puts an encoding off until the prefill. Newer versions of generate() encode images before they call the
        model."""
        serving = self._served()
        return _Deferred(original, args, kwargs) if serving is not None and serving.answer is None else None

    def _served(self) -> _Serving | None:
        """The generate() of this thread, if graphs serve it."""
        serving = self._serving
        return serving if serving is not None and serving.thread == threading.get_ident() else None

    def _fall_back(self, refused: Refused) -> None:
        reason = str(refused)
        if self.strict:
            raise NotImplementedError(f"sts_kernels: compiled graphs cannot serve this call: {reason}") from None
        if reason not in self._said:
            self._said.add(reason)
            warnings.warn(
                f"sts_kernels: this runs through the hooks, not through compiled graphs: {reason}", stacklevel=4
            )

    # --- a prompt ---

    def _prefill(self, serving: _Serving, kwargs: Kwargs) -> CausalLMOutputWithPast:
        arguments, pixels = _arguments(kwargs, self.base.config)
        ids, mask = arguments["input_ids"], arguments.get("attention_mask")
        if mask is not None and mask.shape != ids.shape:
            raise Refused("the attention mask is not one of padding")
        valid = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
        batch = self._at_least(len(ids), self.batches, "batch_size", f"the batch has {len(ids)} prompts")
        token_ids = prompt.token_ids(self.base.config)
        items: dict[str, list[VisualItem]] = {}
        encode: Callable[[Runner, Tensor], None] | None = None
        try:
            if pixels is not None:
                call = EncodeCall(KIND, arguments, lambda kind: prompt.runs(ids, token_ids[kind]))
                encoder, graph, items[KIND] = self._encoder(self._fixed.shape(self.base, call), call, pixels)
                encode = functools.partial(_encode, encoder, graph, pixels)
            modality = prompt.placeholders(self.base, token_ids, ids, None)
            assert modality is not None  # there are ids
            given = layout.read(ids, valid, modality, self._positions(arguments, valid), items, self.plan)
            longest = max(given.entering)
            slots = self._at_least(longest, self.buckets, "prompt_tokens", f"the pruned prompt takes {longest} slots")
            shape = layout.shape_of(given, self.plan, batch, slots, self.new, self._step)
            values, places = layout.fill(given, shape, self.plan)
        except NotImplementedError as error:
            raise Refused(str(error)) from None
        ready = self._runner(shape)
        serving.answer = _Answer(ready, CapturedCache(ids.shape[1]), len(ids), self.new)
        session, timer = self.handle._sessions.now, self.handle._timer
        ready.runner.prompt.load(values)
        if encode is not None:
            with timer(session, f"encode {KIND}"):
                encode(ready.runner, places)
        timer.start(session)
        out = ready.prefill.run()
        timer.stop(session, "prefill")
        times = timer.take(session)
        if encode is not None:
            self._report(given, shape, out["columns"], times)
        return self._output(serving.answer, out["logits"])

    def _decode(self, answer: _Answer, ids: Tensor) -> CausalLMOutputWithPast:
        if ids.shape != (answer.rows, 1):
            raise RuntimeError(
                f"sts_kernels: compiled graphs decode one token of each of the {answer.rows} prompts at a time, got "
                f"ids of shape {tuple(ids.shape)}"
            )
        if not answer.left:
            raise ValueError(
                f"sts_kernels: the answer is longer than the {self.new} tokens that were compiled; give "
                "compile(max_new_tokens=...) a larger number"
            )
        answer.left -= 1
        answer.cache.length += 1
        answer.ready.runner.token[: answer.rows].copy_(ids)
        return self._output(answer, answer.ready.decode.run()["logits"])

    @staticmethod
    def _output(answer: _Answer, logits: Tensor) -> CausalLMOutputWithPast:
        return CausalLMOutputWithPast(logits=logits[: answer.rows, None], **{compat.CACHE: answer.cache})

    def _positions(self, arguments: Kwargs, valid: Tensor) -> Tensor:
        """(axes, B, S): rotary positions of the full prompt, as the model itself numbers them."""
        index = getattr(self.base, "get_rope_index", None)
        if index is not None and any(arguments.get(f"{kind}_grid_thw") is not None for kind in prompt.KINDS):
            wanted = inspect.signature(index).parameters
            if "mm_token_type_ids" not in wanted or arguments.get("mm_token_type_ids") is not None:
                given = {name: arguments[name] for name in wanted if arguments.get(name) is not None}
                with torch.device("cpu"):
                    return index(**given | {"attention_mask": valid.long()})[0]
        return (valid.long().cumsum(1) - 1).clamp(min=0).expand(self.axes, -1, -1)

    def _report(self, given: layout.Prompt, shape: Shape, columns: list[Tensor], times: dict[str, float]) -> None:
        plan, rows, dtype = self.plan, len(given.rows), self.text.embed_tokens.weight.dtype
        report = describe(plan, self.text.config, dtype, given.rows, given.modality, None)
        cuts = planned_cuts(plan.cuts, given.rows, given.entering)
        numbers = [given.entering, *(planned.lengths for planned in cuts)]
        layers = [0, *(plan.cuts[cut.index].layer for cut in shape.cuts)]
        left: Left = {}
        for layer, held, lengths in zip(layers, columns, numbers, strict=True):
            slots = torch.arange(held.shape[1], device="cpu") < torch.tensor(lengths, device="cpu")[:, None]
            left[layer] = held[:rows].clone(), slots
        report.finish(left, times)
        self.handle._llm.report = report

    # --- runners and encoders, made once per shape ---

    @staticmethod
    def _at_least(number: int, given: Sequence[int] | None, option: str, subject: str) -> int:
        """The smallest size in `given` that is at least `number`. given None: `number`, rounded up to a multiple of
        STEP."""
        if given is None:
            return -(-number // STEP) * STEP
        found = min((size for size in given if size >= number), default=None)
        if found is None:
            raise ValueError(
                f"sts_kernels: {subject}, and the most compiled for is {max(given)}; give "
                f"compile({option}={(*given, number)})"
            )
        return found

    def _runner(self, shape: Shape) -> _Ready:
        known = shape in self._runners
        if not known:
            runner = Runner(
                self.text,
                self._head,
                self.method,
                self.plan,
                self.handle.contiguous,
                self.axes,
                self.deepstack,
                shape,
                self._buffers,
            )
            if len(self._runners) >= max(MAX_SHAPES, len(self.buckets or ()) * len(self.batches)):
                self._runners.popitem(last=False)
            self._runners[shape] = _Ready(runner, *runner.ready(self._graphs))
        self._runners.move_to_end(shape)
        if known or self._one_size:
            self._runners[shape].prepare()
        return self._runners[shape]

    def _encoder(self, shape: EncoderShape, call: EncodeCall, pixels: Tensor) -> _EncoderEntry:
        key = (shape, tuple(pixels.shape))
        if key in self._encoders:
            self._encoders[key][1].prepare()
        else:
            adapter = self.adapter
            items = adapter.layout(self.base, call, torch.Size((*shape.features, 1)))
            items = with_budgets(items, self.plan)
            order = None if adapter.order is None else adapter.order(self.base, call)
            encoder = Encoder(
                self.base, adapter, self.method, self.handle.scope, shape, items, order, pixels, self.axes
            )
            if len(self._encoders) >= max(MAX_SHAPES, len(self.batches)):
                self._encoders.popitem(last=False)
            self._encoders[key] = encoder, encoder.ready(self._graphs, self._one_size), items
        self._encoders.move_to_end(key)
        return self._encoders[key]


def _arguments(kwargs: Kwargs, config: Config) -> tuple[Kwargs, Tensor | None]:
    """-> arguments of a prompt's forward and of its encoder, ids and sizes on the host; the pixel values, if any.

    Raises Refused, as `check_arguments` does.
    """
    arguments = dict(kwargs)
    for kind, later in (arguments.pop("mm_encoder_outputs", None) or {}).items():
        if kind != KIND or not isinstance(later, _Deferred):
            raise Refused(f"{kind}s that are encoded already, or are no images")
        arguments |= compat.named(inspect.signature(later.original).parameters, later.args, later.kwargs)
    check_arguments(arguments, config)
    pixels = next((arguments[name] for name in PIXELS if arguments.get(name) is not None), None)
    for name in ("position_ids", "cache_position"):  # generate() makes these from the other arguments
        arguments.pop(name, None)
    host = {k: v.cpu() for k, v in arguments.items() if isinstance(v, Tensor) and not v.is_floating_point()}
    return arguments | host, pixels


def _encode(encoder: Encoder, graph: Graph[Encoded], pixels: Tensor, runner: Runner, places: Tensor) -> None:
    encoder.pixels.copy_(pixels, non_blocking=True)
    encoder.places.copy_(places, non_blocking=True)
    out, count = graph.run(), encoder.rows
    runner.visual[:count].copy_(out["rows"])
    runner.places[:, :count].copy_(out["places"])
    runner.candidate[:count].copy_(out["candidate"])
    for mine, rows in zip(runner.deepstack, out["deepstack"], strict=True):
        mine[:count].copy_(rows)


def _steady(plan: Plan) -> bool:
    """Whether all large images keep the same numbers of tokens. Widths after cuts then need no rounding to STEP."""
    try:
        few, many = ((plan.keep(n), *(cut.keep([n]) for cut in plan.cuts)) for n in (1 << 14, 1 << 15))
    except ValueError:  # images this large cannot meet the budget
        return False
    return few == many
