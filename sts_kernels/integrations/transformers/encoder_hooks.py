"""Hooks around the vision encoder and the projector: they collect a method's signals and drop features."""

import functools
import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeAlias

import torch

from ...methods import Method, Plan
from . import compat, dropped, prompt, vision_attention, vision_pruning
from .adapters import EncodeCall, ModelAdapter
from .session import Encoding, Sessions
from .stack import Caller
from .timer import Timer
from .untyped import Args, Kwargs, Model
from .vision_pruning import Kept
from .visual_item import Blend, VisualItem

Numbers: TypeAlias = torch.Tensor | list[torch.Tensor] | tuple[torch.Tensor, ...]
Relevance: TypeAlias = Numbers | Callable[[str, Kwargs], Numbers]  # per token; or a function of kind and arguments

LAYER = "vision_feature_layer"  # in configurations, and an argument of the models


class EncoderHooks:
    def __init__(
        self,
        adapter: ModelAdapter,
        base: Model,
        method: Method,
        plan: Plan,
        scope: str,
        sessions: Sessions,
        relevance: Relevance | None = None,
    ):
        self.adapter, self.base, self.method, self.plan, self.scope = adapter, base, method, plan, scope
        self.sessions, self.relevance = sessions, relevance
        self.token_ids = prompt.token_ids(base.config)
        captured = method.encoder_attention == "features" and method.signals & {"attention", "keys"}
        # The feature layer whose attention is captured. None: the method needs none, or that of the last layer.
        self.feature_layer = getattr(base.config, LAYER, None) if captured else None

    def encode(
        self, kind: str, caller: Caller, timer: Timer, original: Callable[..., Any], args: Args, kwargs: Kwargs
    ) -> Any:
        """Around get_image_features and get_video_features."""
        session = self.sessions.now
        if caller.forward and session.placed is not None:
            ids, mask = session.placed.ids, session.placed.mask
        else:
            ids, mask = caller.ids, caller.options.get("attention_mask")
        arguments = compat.named(inspect.signature(original).parameters, args, kwargs)
        runs = lambda which: prompt.runs(ids, self.token_ids[which])  # noqa: E731
        texts = functools.partial(prompt.texts, self.base, self.token_ids, kind, ids, mask)
        self._check_layer(arguments)
        session.encoding = Encoding(EncodeCall(kind, arguments, runs), texts)
        try:
            with timer(session, f"encode {kind}"):
                out = original(*args, **kwargs)
            if session.encoding.kept is not None:
                kept = session.encoding.kept
                out = dropped.mark_features(out, session.encoded[kind], kept.rows, kept.values)
        finally:
            session.encoding = None
        if caller.outside:
            items, features = session.encoded[kind], dropped.of_output(out)
            if len(features) != sum(item.num_tokens for item in items):  # LLaVA-OneVision before transformers 5
                raise NotImplementedError(
                    f"sts_kernels: get_{kind}_features() gave the features of a clip without its newline, so that they "
                    "cannot be found among embeddings; pass the model pixel values, or upgrade to transformers 5"
                )
            session.handed_out[kind] = items, features
        return out

    def _check_layer(self, arguments: Kwargs) -> None:
        """Raises NotImplementedError where the features come from another layer than the captured attention."""
        if self.feature_layer is None:
            return
        given = arguments.get(LAYER)
        given = getattr(self.base.config, LAYER) if given is None else given
        if given != self.feature_layer:
            raise NotImplementedError(
                f"sts_kernels: {self.method.name} scores by the attention of {LAYER} {self.feature_layer}, which was "
                f"configured when the pruning was installed, got {given}; set it in the model's config before prune()"
            )

    def capture(self, module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, kwargs: Kwargs) -> None:
        """Attention callback: collects (query, key, scale) of the encoder's attention during an encoding."""
        encoding = self.sessions.now.encoding
        if encoding is not None:
            calls = vision_attention.calls_of(query, key, kwargs)
            if self.method.encoder_attention == "last":
                calls = [vision_attention.one_head(*call) for call in calls]
            encoding.attention += calls

    def before_projector(self, module: torch.nn.Module, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs] | None:
        session = self.sessions.now
        encoding = session.encoding
        if encoding is None:
            return None
        encoding.dropping = encoding.kept = None
        features = self.adapter.features(module, args[0])
        items = self.adapter.layout(self.base, encoding.call, features.shape)
        items = session.encoded[encoding.call.kind] = vision_pruning.with_budgets(items, self.plan)
        if self.method.site != "encoder":
            encoding.dropping = (items, features.shape)
            return None
        kept = self._select(encoding, features, features.shape, items)
        if kept is None or encoding.kept is not None:
            return None
        encoding.dropping = (kept.rows, features.shape)
        x = args[0]
        x = x.reshape(features.shape[:-1].numel(), -1)[kept.rows.to(x.device)].view(-1, x.shape[-1])
        if kept.values is not None:
            x = kept.values.to(x.dtype)
        return (x, *args[1:]), kwargs

    def after_projector(
        self, module: torch.nn.Module, args: Args, kwargs: Kwargs, output: torch.Tensor | None
    ) -> torch.Tensor | None:
        encoding = self.sessions.now.encoding
        if encoding is None or encoding.dropping is None or output is None:
            return None
        (what, shape), encoding.dropping = encoding.dropping, None
        if isinstance(what, torch.Tensor):
            return dropped.mark(output, what, shape)
        kept = self._select(encoding, output, shape, what) if self.method.site == "projected" else None
        if kept is None or encoding.kept is not None:
            return None
        flat = output.reshape(shape[:-1].numel(), output.shape[-1])
        values = flat[kept.rows] if kept.values is None else kept.values.to(flat.dtype)
        return dropped.mark(values, kept.rows, shape[:-1] + output.shape[-1:]).view(output.shape)

    def _select(
        self, encoding: Encoding, features: torch.Tensor, shape: torch.Size, items: list[VisualItem]
    ) -> Kept | None:
        """features (..., C): the method selects from them. shape: of the features before the projector.

        Where the model interpolates after the projector, the method selects from interpolated features. `encode` drops
        the others.
        """
        signals: dict[str, torch.Tensor] = {}
        flat, blend = features.reshape(shape[:-1].numel(), features.shape[-1]), Blend.of(items, features.device)
        calls, encoding.attention = encoding.attention, []
        for name, find in (("attention", self.adapter.attention), ("keys", self.adapter.keys)):
            if name in self.method.signals:
                if not calls:
                    raise RuntimeError(f"sts_kernels: {self.method.name} saw no attention in the vision encoder")
                signal = find(self.base, calls, shape)
                signals[name] = signal if blend is None else blend(signal.to(features.device))
        flat = flat if blend is None else blend(flat)
        texts = encoding.texts(items) if "text" in self.method.signals else None
        if "relevance" in self.method.signals:
            signals["attention"] = self._relevance(encoding.call, len(flat), features.device)
        kept = vision_pruning.select(self.method, self.scope, flat, items, texts=texts, **signals)
        if kept is not None and kept.counts is not None:
            counted = zip(items, kept.counts, strict=True)
            self.sessions.now.encoded[encoding.call.kind] = [replace(item, kept=count) for item, count in counted]
        encoding.kept = None if blend is None else kept
        return kept

    def _relevance(self, call: EncodeCall, rows: int, device: torch.device) -> torch.Tensor:
        """(rows,) float32: the caller's relevance of each token, in the order of the projector's input."""
        assert self.relevance is not None  # prune() demands it
        given = self.relevance(call.kind, dict(call.arguments)) if callable(self.relevance) else self.relevance
        parts = list(given) if isinstance(given, list | tuple) else [given]
        if not all(isinstance(part, torch.Tensor) for part in parts):
            kinds = ", ".join(sorted({type(part).__name__ for part in parts}))
            raise TypeError(f"prune: relevance must be a tensor, a list of tensors or a function of one, got {kinds}")
        flat = [part.detach().float().flatten().to(device) for part in parts]
        if sum(map(len, flat)) != rows:
            raise ValueError(
                f"prune: relevance must have a number for each of the {rows} tokens that the {call.kind}s have before "
                f"any is dropped, got {sum(map(len, flat))}"
            )
        order = None if self.adapter.order is None else self.adapter.order(self.base, call)
        return torch.cat(flat) if order is None else torch.cat(flat)[order.to(device)]
