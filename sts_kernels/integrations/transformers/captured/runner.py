"""Pruned prefill and decode step of an LLM as two functions of fixed shapes.

No shape depends on data. Sizes alone tell which slots hold visual tokens; only the patch in such a slot depends on
data. Rows are padded on the right, so

- the prefill needs no mask: the causal kernel suffices;
- the next token overwrites the first pad slot of its row;
- a decode step attends to `slot <= filled`.
"""

import copy
import functools
import itertools
from dataclasses import dataclass
from typing import Any, TypeAlias, TypedDict

import torch
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from ....methods import Cut, Method, Plan
from ....methods._keep_top import best_of
from .. import compat, masks
from ..cut_selection import Group, PlannedCut, raters_of, select
from ..layer_pruning import Rotary, scores_of
from ..untyped import Config, Model
from .graphs import Buffers, Graph, Graphs, Inputs, replaced

ATTENTION = "sts_captured"
ALIGNMENT = 16  # slots are a multiple, so that attention kernels can load rows of masks and keys as vectors

Seen: TypeAlias = tuple[Tensor, Tensor, float | None]  # query, key and scale of a layer


def attention(
    module: Model,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sts_seen: list[Seen] | None = None,
    sts_alone: bool = False,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention implementation of all LLM layers inside a graph.

    sts_seen: receives (query, key, scale). sts_alone: only `sts_seen` is wanted; the output has the right shape and no
    meaning.
    """
    if sts_seen is not None:
        sts_seen.append((query, key, scaling))
    if sts_alone:
        return query.transpose(1, 2), None
    batch, heads, queries, dim = query.shape
    if queries > 1:
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    # Decode step: the query heads of a key head become query rows, so keys and values are read once, not repeated.
    grouped = query.view(batch, key.shape[1], heads // key.shape[1], dim)
    out = torch.nn.functional.scaled_dot_product_attention(grouped, key, value, attention_mask, scale=scaling)
    return out.reshape(batch, 1, heads, value.shape[-1]), None


AttentionInterface.register(ATTENTION, attention)


@dataclass(frozen=True)
class CutShape:
    """A cut that drops tokens of a batch."""

    index: int  # in `Plan.cuts`
    width: int  # slots of each row from the cut's layer on
    counts: tuple[tuple[int, int, int], ...] | None = None  # per row: before, left, recycled. None: top-k by `after`


@dataclass(frozen=True)
class Shape:
    """Fixes every shape of one prefill and of the decode steps after it."""

    batch: int
    slots: int  # of each row, before any cut
    new: int  # max new tokens
    cuts: tuple[CutShape, ...] = ()
    text: int = 0  # max text tokens after the last image, for cuts that use them

    @property
    def widths(self) -> list[int]:
        """Prompt slots of each segment."""
        return [self.slots, *(cut.width for cut in self.cuts)]


@dataclass
class Segment:
    """Layers that hold the same slots of a prompt."""

    layers: range
    room: int  # slots for the prompt and new tokens
    filled: Tensor  # (B,): used slots of each row


class Slots:
    """KV cache of the layers. A prompt fills the first slots, a decode step the next slot of each row.

    Memory layout: (B, slots, heads, D), as projections write keys and values. So a prompt is copied in contiguous runs.
    """

    def __init__(self, segments: list[Segment], buffers: Buffers, batch: int, heads: int, dim: int):
        self.keys: dict[int, Tensor] = {}
        self.values: dict[int, Tensor] = {}
        self.filled: dict[int, Tensor] = {}
        self._row = torch.arange(batch, device=segments[0].filled.device)
        for segment in segments:
            for layer in segment.layers:
                shape = (batch, segment.room, heads, dim)
                self.keys[layer] = buffers.take(("keys", layer), shape)
                self.values[layer] = buffers.take(("values", layer), shape)
                self.filled[layer] = segment.filled

    @property
    def bytes(self) -> int:
        return sum(tensor.nbytes for tensor in (*self.keys.values(), *self.values.values()))

    def update(self, key: Tensor, value: Tensor, layer: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """key, value: (B, heads, tokens, D) -> keys and values to attend to."""
        held = self.keys[layer], self.values[layer]
        prompt = key.shape[2]
        for slots, new in zip(held, (key, value), strict=True):
            if prompt > 1:
                slots[:, :prompt] = new.transpose(1, 2)
                # Masked slots get weight 0, but 0 * NaN (of an earlier prompt) would be NaN.
                slots[:, prompt:].zero_()
            else:
                slots.index_put_((self._row, self.filled[layer]), new[:, :, 0])
        if prompt > 1:  # a prompt attends to itself only
            return key, value
        return held[0].transpose(1, 2), held[1].transpose(1, 2)


@dataclass
class _Prefill:
    """A `cut_selection.Run`. Masks are (B, width) of the current segment."""

    slots: Tensor
    candidates: Tensor
    text: Tensor
    text_width: int
    trailing: int = 0
    scores: Tensor | None = None
    raters: Tensor | None = None


class Prefilled(TypedDict):
    logits: Tensor  # (B, V) after the last token of each prompt
    columns: list[Tensor]  # per segment, (B, width): column of the full prompt in each slot


class Decoded(TypedDict):
    logits: Tensor  # (B, V) after `Runner.token`


class Runner:
    """`prefill` and `decode` of one Shape. Their inputs are buffers:

    prompt: tensors of `layout_shapes`.
    visual, places, candidate, deepstack: rows of the images, from the encoder.
    token: the next token of each row.
    """

    def __init__(
        self,
        text: Model,
        head: torch.nn.Module,
        method: Method,
        plan: Plan,
        contiguous: bool,
        axes: int,
        deepstack: int,
        shape: Shape,
        buffers: Buffers,
    ):
        self.text, self.head, self.method, self.contiguous, self.axes = text, head, method, contiguous, axes
        self.shape = shape
        weight = text.embed_tokens.weight
        self.device, self.dtype = weight.device, weight.dtype
        self.prompt = Inputs(layout_shapes(shape, axes), self.device)
        rows, width = shape.batch * shape.slots, weight.shape[1]
        with torch.inference_mode(False):
            self.visual = weight.new_zeros(rows, width)
            self.places = torch.zeros(1 + axes, rows, dtype=torch.int64, device=self.device)
            self.candidate = torch.zeros(rows, dtype=torch.bool, device=self.device)
            self.deepstack = [weight.new_zeros(rows, width) for _ in range(deepstack)]
            self.token = torch.zeros(shape.batch, 1, dtype=torch.int64, device=self.device)
            self.position = torch.zeros(shape.batch, dtype=torch.int64, device=self.device)
            self.segments = self._segments(plan)
            config = text.config
            dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
            self._cache = Slots(self.segments, buffers, shape.batch, config.num_key_value_heads, dim)
            self._cuts = [self._planned(plan.cuts[cut.index], cut) for cut in shape.cuts]

    def ready(self, graphs: Graphs) -> tuple[Graph[Prefilled], Graph[Decoded]]:
        """Graphs of prefill and decode, not prepared yet. They must be prepared between prompts."""
        around = functools.partial(replaced, self.replacements(fused=graphs.backend is None))
        return graphs.ready(self.prefill, around, now=False), graphs.ready(self.decode, around, now=False)

    def replacements(self, fused: bool) -> list[tuple[torch.nn.Module, str, object]]:
        """Module attributes that differ during `prefill` and `decode`: attention and, if `fused`, RMSNorm in one
        kernel."""
        norms = [module for module in self.text.modules() if type(module).__name__.endswith("RMSNorm")] if fused else []
        same = [module for module in norms if module.weight.dtype == self.dtype]
        return _configs(self.text) + [(module, "forward", functools.partial(_rms_norm, module)) for module in same]

    @property
    def bytes(self) -> int:
        """Bytes of the KV cache."""
        return self._cache.bytes

    def _segments(self, plan: Plan) -> list[Segment]:
        shape = self.shape
        bounds = [0, *(plan.cuts[cut.index].layer for cut in shape.cuts), len(self.text.layers)]
        found = []
        for (start, end), width in zip(itertools.pairwise(bounds), shape.widths, strict=True):
            room = -(-(width + shape.new) // ALIGNMENT) * ALIGNMENT
            filled = torch.zeros(shape.batch, dtype=torch.int64, device=self.device)
            found.append(Segment(range(start, end), room, filled))
        return found

    def _planned(self, cut: Cut, shape: CutShape) -> PlannedCut:
        if shape.counts is None:
            return PlannedCut(cut, [], [], [], [])
        before, left, recycled = map(list, zip(*shape.counts, strict=True))
        planned = PlannedCut(cut, before, left, recycled, [])
        groups = planned.alike(self.device)
        return _Grouped(cut, before, left, recycled, [], groups)

    # --- prefill ---

    def prefill(self) -> Prefilled:
        """Runs the prompt; afterwards the cache holds it."""
        given, shape = self.prompt.tensors, self.shape
        source = given["source"]
        visual, source = source >= 0, source.clamp(min=0)
        hidden = torch.where(visual[..., None], self.visual[source], self.text.embed_tokens(given["ids"]))
        places = torch.where(visual, self.places[:, source], given["places"])
        lengths, slot = given["lengths"], torch.arange(shape.slots, device=self.device)
        valid = slot < lengths[0][:, None]
        run = _Prefill(valid, visual & self.candidate[source], valid & (slot >= given["behind"][:, None]), shape.text)
        columns = [places[0]]
        rotary = self._rotary(hidden, slot.expand(shape.batch, -1) if self.contiguous else places[1:])
        if any(planned.cut.queries == "raters" for planned in self._cuts):
            run.raters = raters_of(self.method, hidden, run, shape.slots)
        deep = [torch.where(visual[..., None], rows[source], 0) for rows in self.deepstack]
        for number, segment in enumerate(self.segments):
            if number:
                hidden, rotary, index = self._cut(run, number - 1, hidden, rotary)
                columns.append(columns[-1].gather(1, index))
            following = self._cuts[number].cut if number < len(self._cuts) else None
            for layer in segment.layers:
                hidden = self._layer(run, layer, following, hidden, rotary)
                if layer < len(deep):
                    hidden = hidden + deep[layer]
            segment.filled.copy_(lengths[number])
        self.position.copy_(given["position"])
        last = (lengths[-1] - 1).clamp(min=0)
        hidden = hidden.gather(1, last[:, None, None].expand(-1, 1, hidden.shape[2]))
        return {"logits": self.head(self.text.norm(hidden))[:, 0], "columns": columns}

    def _layer(self, run: _Prefill, layer: int, following: Cut | None, hidden: Tensor, rotary: Rotary) -> Tensor:
        if following is None or following.queries == "text" or layer != following.scoring_layer:
            return self._run(layer, hidden, None, rotary)
        seen: list[Seen] = []
        hidden = self._run(layer, hidden, None, rotary, sts_seen=seen)
        run.scores = scores_of(run, following, *seen[0])
        return hidden

    def _cut(self, run: _Prefill, number: int, hidden: Tensor, rotary: Rotary) -> tuple[Tensor, Rotary, Tensor]:
        """-> hidden states and rotary tables after the cut, and (B, width): the slots that stay."""
        planned, shape = self._cuts[number], self.shape.cuts[number]
        if planned.cut.score_from == "next" and planned.cut.queries != "text":
            run.scores = scores_of(run, planned.cut, *self._look_ahead(planned.cut.layer, hidden, rotary))
        if shape.counts is None:
            assert run.scores is not None  # cuts without `select` rank by attention, computed before
            chosen, place = best_of(run.scores, run.candidates, self.prompt.tensors["after"][number]), None
        else:
            hidden, chosen, place = select(run, planned, hidden, run.candidates, self.text.norm)
        index = masks.compact_right(run.slots & (chosen | ~run.candidates), shape.width, place)
        hidden = masks.take(hidden, index)
        slot = torch.arange(shape.width, device=self.device)
        run.slots = slot < self.prompt.tensors["lengths"][number + 1][:, None]
        run.candidates = run.candidates.gather(1, index) & run.slots
        run.text = run.text.gather(1, index) & run.slots
        if run.text_width > shape.width:  # `masks.compact` pads on the left: the last columns hold the text
            run.text_width = shape.width
            run.raters = None if run.raters is None else run.raters[:, -shape.width :]
        if self.contiguous:
            return hidden, self._rotary(hidden, slot.expand(len(hidden), -1)), index
        return hidden, tuple(masks.take_rotary(table, index) for table in rotary), index

    def _look_ahead(self, layer: int, hidden: Tensor, rotary: Rotary) -> Seen:
        """Query, key and scale of a layer on the tokens before the cut. Its attention kernel does not run."""
        seen: list[Seen] = []
        module = self.text.layers[layer]
        module.self_attn(
            hidden_states=module.input_layernorm(hidden),
            position_embeddings=rotary,
            attention_mask=None,
            sts_seen=seen,
            sts_alone=True,
        )
        return seen[0]

    # --- decoding ---

    def decode(self) -> Decoded:
        hidden = self.text.embed_tokens(self.token)
        rotary = None if self.contiguous else self._rotary(hidden, self.position[:, None].expand(self.axes, -1, 1))
        for segment in self.segments:
            slot = torch.arange(segment.room, device=self.device)
            reach = _additive(slot <= segment.filled[:, None], hidden)
            if self.contiguous:
                rotary = self._rotary(hidden, segment.filled[:, None])
            for layer in segment.layers:
                hidden = self._run(layer, hidden, reach, rotary)
            segment.filled.add_(1)
        self.position.add_(1)
        return {"logits": self.head(self.text.norm(hidden))[:, 0]}

    # --- the model's own parts ---

    def _rotary(self, hidden: Tensor, positions: Tensor) -> Rotary:
        """positions: (axes, B, P), or (B, P)."""
        if self.axes == 1 and positions.ndim == 3:
            positions = positions[0]
        return self.text.rotary_emb(hidden, positions)

    def _run(self, layer: int, hidden: Tensor, mask: Tensor | None, rotary: Rotary | None, **extra: Any) -> Tensor:
        given = {compat.CACHE: self._cache, "position_embeddings": rotary, "position_ids": None, "use_cache": True}
        out = self.text.layers[layer].forward(hidden, attention_mask=mask, **given, **extra)  # without its hooks
        return out[0] if isinstance(out, tuple) else out


@dataclass
class _Grouped(PlannedCut):
    """A cut whose groups of rows are on the device already."""

    groups: list[Group]

    def alike(self, device: torch.device) -> list[Group]:
        return self.groups


def layout_shapes(shape: Shape, axes: int) -> dict[str, tuple[int, ...]]:
    """Shapes of the inputs of a prefill. Pad slots and rows of length 0 have arbitrary values, except source -1.

    ids: token ids of text.
    source: row of `visual` in each slot; -1: text.
    places: column in the full prompt and rotary positions, of text.
    lengths: tokens of each row in each segment.
    after: visual tokens of each row after each cut.
    behind: first slot after the last image.
    position: rotary position of the first new token.
    """
    batch, slots, cuts = shape.batch, shape.slots, len(shape.cuts)
    return {
        "ids": (batch, slots),
        "source": (batch, slots),
        "places": (1 + axes, batch, slots),
        "lengths": (1 + cuts, batch),
        "after": (cuts, batch),
        "behind": (batch,),
        "position": (batch,),
    }


def _additive(allowed: Tensor, like: Tensor) -> Tensor:
    """(B, keys) bool -> (B, 1, 1, keys): additive mask, made once for all layers of a segment."""
    mask = torch.zeros(allowed.shape, dtype=like.dtype, device=like.device).masked_fill(~allowed, -torch.inf)
    return mask[:, None, None]


def _rms_norm(module: Model, hidden: Tensor) -> Tensor:
    """RMSNorm in one kernel. The library's takes eight, which counts in a short decode step."""
    return torch.nn.functional.rms_norm(hidden, hidden.shape[-1:], module.weight, module.variance_epsilon)


def _configs(text: Model) -> list[tuple[torch.nn.Module, str, object]]:
    """For each attention module of the LLM, a copy of its configuration with `ATTENTION` as the implementation."""
    found: list[tuple[torch.nn.Module, str, object]] = []
    made: dict[int, Config] = {}
    for layer in text.layers:
        module = layer.self_attn
        config = getattr(module.config, "_sts_config", module.config)  # unwraps attention_capture's stand-in
        if id(config) not in made:
            made[id(config)] = copy.copy(config)
            made[id(config)]._attn_implementation_internal = ATTENTION
        found.append((module, "config", made[id(config)]))
    return found
