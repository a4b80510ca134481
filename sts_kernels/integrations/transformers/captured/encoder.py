"""Vision encoder, selection and projector of a batch of images, as one function of fixed shapes."""

import copy
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

import torch
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from ....methods import Method
from .. import vision_attention, vision_pruning
from ..adapters import EncoderShape, ModelAdapter
from ..attention_capture import Attention, function_of
from ..untyped import Config, Model
from ..vision_attention import AttentionCall
from ..visual_item import Blend, VisualItem
from .graphs import Graph, Graphs, quietly, replaced
from .layout import survivors

KIND = "image"


@dataclass
class Assembly:
    """Device tables that map features to placeholders. Placeholders are numbered image after image."""

    token: Tensor  # (features,): placeholder of each feature; -1: the model discards the feature
    separators: Tensor  # (separators,): placeholders that stand for no feature
    used: Tensor  # indices of features that become tokens, in the order of the projector's input
    sorted: bool  # whether `token[used]` ascends and there are no separators


class Encoded(TypedDict):
    rows: Tensor  # (R, D): input of the LLM, in placeholder order
    places: Tensor  # (1 + axes, R): column and rotary positions
    candidate: Tensor  # (R,) bool: rows that a cut may drop
    deepstack: list[Tensor]  # per deepstack projector, its output at the same rows


class Encoder:
    """The function of one EncoderShape: `run`. Its inputs are the buffers `pixels` and `places` (1 + axes,
    placeholders)."""

    def __init__(
        self,
        base: Model,
        adapter: ModelAdapter,
        method: Method,
        scope: str,
        shape: EncoderShape,
        items: Sequence[VisualItem],
        order: Tensor | None,
        pixels: Tensor,
        axes: int,
    ):
        self.base, self.adapter, self.method, self.shape = base, adapter, method, shape
        assert adapter.fixed_encoder is not None  # `refusals.check` refuses None
        self._fixed = adapter.fixed_encoder
        weight = base.language_model.embed_tokens.weight
        device, self._dtype = weight.device, weight.dtype
        with torch.inference_mode(False):
            self.pixels = torch.zeros(pixels.shape, dtype=base.dtype, device=device)  # copying casts
            self.places = torch.zeros(1 + axes, sum(i.num_tokens for i in items), dtype=torch.int64, device=device)
            self._assembly = _assembly(items, order, device)
            tables = self._fixed.tables(base, shape)
            self._tables = {k: v if k.startswith("host_") else v.to(device) for k, v in tables.items()}
            self._pools = None if method.site is None else vision_pruning.Pools.of(items, scope, device)
            self._blend = Blend.of(items, device)
        self.rows = sum(map(survivors, items))
        self._taps: dict[torch.nn.Module, list[AttentionCall]] = {}
        if method.signals & {"attention", "keys"}:  # even where all tokens stay: handle callbacks cannot be traced
            find = adapter.last_attention if method.encoder_attention == "last" else adapter.vision_attention
            assert find is not None  # unsupported.check_method
            self._taps[find(base, KIND)] = []

    def ready(self, graphs: Graphs, now: bool = True) -> Graph[Encoded]:
        tapped = [(module, "config", _tapped(module, seen)) for module, seen in self._taps.items()]
        around = functools.partial(replaced, tapped)
        if now and graphs.backend is not None:  # untraced: the library sets up its recording of hidden states
            with quietly(), around():
                self.run()
        return graphs.ready(self.run, around, now)

    def run(self) -> Encoded:
        encoded = self._fixed.run(self.base, self._tables, self.pixels)
        calls = [call for seen in self._taps.values() for call in seen]
        for seen in self._taps.values():
            seen.clear()
        projector = self.adapter.projector(self.base).forward  # without its hooks
        x = encoded.rows
        features = self.adapter.features(self.adapter.projector(self.base), x)
        flat = features.reshape(-1, features.shape[-1])
        together = x.reshape(len(flat), -1)  # (features, rows of a feature * C)
        which, values = self._assembly.used, None
        if self._pools is None or self.method.site == "projected" or self._blend is not None:
            projected = self._blended(projector(x).reshape(len(flat), -1))
            if self._pools is not None:
                features = projected if self.method.site == "projected" else self._blended(flat)
                which, values = self._selected(self._pools, features, calls)
            rows = projected[which] if values is None else values.to(projected.dtype)
        else:
            which, values = self._selected(self._pools, flat, calls)
            picked = together[which].view(-1, x.shape[-1]) if values is None else values.to(x.dtype)
            rows = projector(picked)
        deepstack = [
            module(part.reshape(len(flat), -1)[which].view(-1, part.shape[-1])) for module, part in encoded.deepstack
        ]
        return self._assembled(which, rows, deepstack)

    def _blended(self, rows: Tensor) -> Tensor:
        return rows if self._blend is None else self._blend(rows)

    def _selected(
        self, pools: vision_pruning.Pools, features: Tensor, calls: list[AttentionCall]
    ) -> tuple[Tensor, Tensor | None]:
        signals: dict[str, Tensor] = {}
        if calls:
            calls = self._fixed.calls(self.base, self.shape, calls)
            if self.method.encoder_attention == "last":
                calls = [vision_attention.one_head(*call) for call in calls]
            size = torch.Size((*self.shape.features, features.shape[-1]))
            for name in sorted({"attention", "keys"} & self.method.signals):
                signals[name] = self._blended(getattr(self.adapter, name)(self.base, calls, size))
        kept = vision_pruning.select_from(self.method, pools, features, signals.get("attention"), signals.get("keys"))
        return kept.rows, kept.values

    def _assembled(self, which: Tensor, rows: Tensor, deepstack: list[Tensor]) -> Encoded:
        """Rows in placeholder order, separators included."""
        table = self._assembly
        token, candidate = table.token[which], torch.ones_like(which, dtype=torch.bool)
        rows, deepstack = rows.to(self._dtype), [part.to(self._dtype) for part in deepstack]
        if not table.sorted:
            count = len(table.separators)
            order = torch.cat([token, table.separators]).argsort(dim=0)
            token = torch.cat([token, table.separators])[order]
            candidate = torch.cat([candidate, candidate.new_zeros(count)])[order]
            if count:
                separator = self._fixed.separator(self.base)
                assert separator is not None  # families with separators override it
                rows = torch.cat([rows, separator.to(rows)[None].expand(count, -1)])
                deepstack = [torch.cat([part, part.new_zeros(count, part.shape[1])]) for part in deepstack]
            rows, deepstack = rows[order], [part[order] for part in deepstack]
        return {"rows": rows, "places": self.places[:, token], "candidate": candidate, "deepstack": deepstack}


def _assembly(items: Sequence[VisualItem], order: Tensor | None, device: torch.device) -> Assembly:
    with torch.device("cpu"):
        tokens, apart, feature, placeholder = [], [], 0, 0
        for item in items:
            token = torch.full((item.num_features,), -1)
            if item.feature_of_token is None:
                token = torch.arange(item.num_features)
            else:
                places = torch.arange(item.num_tokens)
                piece = item.feature_of_token >= 0
                token[item.feature_of_token[piece]] = places[piece]
                apart.append(places[~piece] + placeholder)
            tokens.append(torch.where(token < 0, -1, token + placeholder))
            feature, placeholder = feature + item.num_features, placeholder + item.num_tokens
        token = torch.cat(tokens)
        token = token if order is None else token[order]
        separators = torch.cat([token[:0], *apart])
        used = (token >= 0).nonzero()[:, 0]
        ascending = bool((token[used].diff() > 0).all()) and not len(separators)
    return Assembly(token.to(device), separators.to(device), used.to(device), ascending)


# --- query and key of the encoder's attention, for methods that use them ---

_PREFIX = "sts_seen_"


def _tapped(module: Model, seen: list[AttentionCall]) -> Config:
    """Copy of the module's configuration. Its attention implementation appends (query, key, scale) to `seen`, then runs
    the module's own."""
    config = getattr(module.config, "_sts_config", module.config)
    implementation = config._attn_implementation or "eager"
    name = _PREFIX + implementation
    if name not in ALL_ATTENTION_FUNCTIONS.valid_keys():
        AttentionInterface.register(name, _noting(implementation))
    tapped = copy.copy(config)
    tapped._attn_implementation_internal = name
    tapped.sts_seen, tapped.sts_own = seen, config
    return tapped


def _noting(implementation: str) -> Attention:
    def attention(module: Model, query: Tensor, key: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Any]:
        config = module.config
        config.sts_seen.append((query, key, kwargs.get("scaling") or query.shape[-1] ** -0.5))
        if "flash" in implementation:  # FlashAttention reads the implementation from module.config again
            module = copy.copy(module)
            module.config = config.sts_own
        return function_of(implementation, module)(module, query, key, *args, **kwargs)

    return attention
