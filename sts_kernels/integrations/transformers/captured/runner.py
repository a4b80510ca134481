"""Pruned prefill and decode of an LLM as two functions of fixed shapes.

Nothing in them depends on data: which slots hold visual tokens follows from sizes, only the patch in such a slot does
not. Rows are padded on the right. So the prefill needs no mask (the causal kernel serves), the next token overwrites a
row's first pad slot, and a decoding token attends to `slot <= filled`.
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
from ..cut_selection import Group, PlannedCut, leave, raters_of
from ..layer_pruning import Rotary, scores_of
from ..untyped import Config, Model
from .graphs import Buffers, Graph, Graphs, Inputs, replaced

ATTENTION = "sts_captured"
ALIGNMENT = 16  # slots: masks and keys whose rows the attention kernels can load as vectors

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
    """Every attention of the LLM inside a graph. sts_seen: gets query, key and scale. sts_alone: nothing else is
    wanted; the output is of the right shape and means nothing."""
    if sts_seen is not None:
        sts_seen.append((query, key, scaling))
    if sts_alone:
        return query.transpose(1, 2), None
    batch, heads, queries, dim = query.shape
    if queries > 1:
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    # The query heads of a key head are the rows of one query: keys and values are read once, and not repeated.
    grouped = query.view(batch, key.shape[1], heads // key.shape[1], dim)
    out = torch.nn.functional.scaled_dot_product_attention(grouped, key, value, attention_mask, scale=scaling)
    return out.reshape(batch, 1, heads, value.shape[-1]), None


AttentionInterface.register(ATTENTION, attention)


@dataclass(frozen=True)
class CutShape:
    """A cut that drops something of a batch."""

    index: int  # in the plan
    width: int  # slots of each row from its layer on
    counts: tuple[tuple[int, int, int], ...] | None = None  # of each row: before, left, recycled. None: top-k of any


@dataclass(frozen=True)
class Shape:
    """What fixes the shapes of one prefill, and of the decoding behind it."""

    batch: int
    slots: int  # of each row, before any cut
    new: int  # tokens that may follow
    cuts: tuple[CutShape, ...] = ()
    text: int = 0  # the most text tokens behind the last image, for cuts that look at them

    @property
    def widths(self) -> list[int]:
        """Prompt slots of each segment."""
        return [self.slots, *(cut.width for cut in self.cuts)]


@dataclass
class Segment:
    """Layers that hold the same slots of a prompt, and how many of each row are taken."""

    layers: range
    room: int  # slots of the prompt, and of what may follow
    filled: Tensor  # (B,)


class Slots:
    """The cache that layers are given: a prompt fills the first slots, a token the next one of its row.

    In memory (B, slots, heads, D), as projections write keys and values: a prompt is copied in whole runs.
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
        """key, value: (B, heads, tokens, D) -> those to attend to."""
        held = self.keys[layer], self.values[layer]
        prompt = key.shape[2]
        for slots, new in zip(held, (key, value), strict=True):
            if prompt > 1:
                slots[:, :prompt] = new.transpose(1, 2)
                # Masked slots get no weight, but 0 times the NaN of an earlier prompt would be NaN.
                slots[:, prompt:].zero_()
            else:
                slots.index_put_((self._row, self.filled[layer]), new[:, :, 0])
        if prompt > 1:  # attends to itself alone
            return key, value
        return held[0].transpose(1, 2), held[1].transpose(1, 2)


@dataclass
class _Prefill:
    """A `cut_selection.Run`: masks are (B, width) of the segment under way."""

    slots: Tensor
    candidates: Tensor
    text: Tensor
    text_width: int
    trailing: int = 0
    scores: Tensor | None = None
    raters: Tensor | None = None


class Prefilled(TypedDict):
    logits: Tensor  # (B, V) behind each prompt
    columns: list[Tensor]  # of each segment, those (B, width) of the full prompt that its slots hold


class Decoded(TypedDict):
    logits: Tensor  # (B, V) behind `Runner.token`


class Runner:
    """`prefill` and `decode` of one Shape, on buffers of their own.

    `prompt` takes a prompt's numbers (see layout), `visual`, `places`, `candidate` and `deepstack` the rows that the
    encoder makes of its images, and `token` the next token of each row.
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
        """Prefill and decode, to be prepared between prompts."""
        around = functools.partial(replaced, self.replacements(fused=graphs.backend is None))
        return graphs.ready(self.prefill, around, now=False), graphs.ready(self.decode, around, now=False)

    def replacements(self, fused: bool) -> list[tuple[torch.nn.Module, str, object]]:
        """What is other than in the model while `prefill` and `decode` run: `attention`, and norms in one kernel."""
        norms = [module for module in self.text.modules() if type(module).__name__.endswith("RMSNorm")] if fused else []
        same = [module for module in norms if module.weight.dtype == self.dtype]
        return _configs(self.text) + [(module, "forward", functools.partial(_rms_norm, module)) for module in same]

    @property
    def bytes(self) -> int:
        """Of keys and values."""
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
        """The cache holds the prompt afterwards."""
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
        """-> hidden states and rotary tables behind the cut, and the slots (B, width) that go on."""
        planned, shape = self._cuts[number], self.shape.cuts[number]
        if planned.cut.score_from == "next" and planned.cut.queries != "text":
            run.scores = scores_of(run, planned.cut, *self._look_ahead(planned.cut.layer, hidden, rotary))
        if shape.counts is None:
            assert run.scores is not None  # such a cut goes by attention, of a layer that ran before it
            chosen, place = best_of(run.scores, run.candidates, self.prompt.tensors["after"][number]), None
        else:
            hidden, chosen, place = leave(run, planned, hidden, run.candidates, self.text.norm)
        index = masks.compact_right(run.slots & (chosen | ~run.candidates), shape.width, place)
        hidden = masks.take(hidden, index)
        slot = torch.arange(shape.width, device=self.device)
        run.slots = slot < self.prompt.tensors["lengths"][number + 1][:, None]
        run.candidates = run.candidates.gather(1, index) & run.slots
        run.text = run.text.gather(1, index) & run.slots
        if run.text_width > shape.width:  # `masks.compact` pads on the left
            run.text_width = shape.width
            run.raters = None if run.raters is None else run.raters[:, -shape.width :]
        if self.contiguous:
            return hidden, self._rotary(hidden, slot.expand(len(hidden), -1)), index
        return hidden, tuple(masks.take_rotary(table, index) for table in rotary), index

    def _look_ahead(self, layer: int, hidden: Tensor, rotary: Rotary) -> Seen:
        """Of a layer on the tokens as they still are."""
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
    """A prompt's numbers. Anything at pad slots and in rows of length 0, except source -1.

    ids: of text. source: the row of `visual` that a slot holds, -1 at text. places: column in the full prompt and
    rotary positions, of text. lengths: tokens in each segment. after: visual tokens that each cut leaves. behind: the
    first slot behind the last image. position: the rotary position of the first new token.
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
    """(B, keys) bool -> (B, 1, 1, keys): the mask in the form that kernels take, made once for all layers."""
    mask = torch.zeros(allowed.shape, dtype=like.dtype, device=like.device).masked_fill(~allowed, -torch.inf)
    return mask[:, None, None]


def _rms_norm(module: Model, hidden: Tensor) -> Tensor:
    """A step of decoding is short, and the library's norm is eight kernels of it."""
    return torch.nn.functional.rms_norm(hidden, hidden.shape[-1:], module.weight, module.variance_epsilon)


def _configs(text: Model) -> list[tuple[torch.nn.Module, str, object]]:
    """Each attention module of the LLM with `attention` as the implementation in its configuration."""
    found: list[tuple[torch.nn.Module, str, object]] = []
    made: dict[int, Config] = {}
    for layer in text.layers:
        module = layer.self_attn
        config = getattr(module.config, "_sts_config", module.config)  # attention_capture's stand-in, looked behind
        if id(config) not in made:
            made[id(config)] = copy.copy(config)
            made[id(config)]._attn_implementation_internal = ATTENTION
        found.append((module, "config", made[id(config)]))
    return found
