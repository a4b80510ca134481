"""Pruning inside the LLM: decoder layers see the kept tokens only.

Callers keep full-length ids, masks, positions and logits. On entry the prompt loses the tokens that were dropped before
the LLM. Each cut drops more before its layer. On exit the hidden states return to their columns. In later forwards only
the masks differ, one per segment.
"""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

import torch

from ...methods import Cut, Method
from ...ops import attention_received, last_query_scores
from . import attention_capture, masks, unsupported
from .cache import attach_state, columns_behind
from .compat import output_cache
from .cut_selection import PlannedCut, Run, planned_cuts, raters_of, select
from .prompt import Row, separators
from .segments import PrunedPrompt, Segment
from .untyped import Args, Kwargs, Model

if TYPE_CHECKING:
    from transformers import Cache

Rotary: TypeAlias = tuple[torch.Tensor, ...]  # cos and sin


@dataclass
class Forward:
    """One forward of the text model over a pruned prompt (prefill), or after one (decoding)."""

    prompt: PrunedPrompt
    masks: list[torch.Tensor | None]  # one for each segment


@dataclass(kw_only=True)
class Prefill(Forward):
    rotary: list[Rotary | None]  # per segment; None: those that the layers are given
    end: torch.Tensor | None  # (B,) position of each row's last token, for contiguous positions
    trailing: int  # columns after the prompt: drafts, or earlier answers (use_cache=False)
    ragged: bool  # whether some trailing columns are padding
    columns: torch.Tensor | None  # (B, P) column of the full prompt in each slot; None: all in order
    slots: torch.Tensor  # (B, P) bool: tokens, not padding
    candidates: torch.Tensor  # (B, P) bool: visual tokens, which cuts may drop
    cuts: list[PlannedCut]  # cuts[i] is made on entry to segment i + 1
    text: torch.Tensor  # (B, P) bool: text tokens after the last image
    text_width: int  # max text tokens of a row
    raters: torch.Tensor | None = None  # (B, text_width) float32: weights of their attention, for cuts by raters
    scores: torch.Tensor | None = None  # (B, P) float32, for the next cut
    # Columns and slots after each cut made so far.
    left: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)

    @property
    def widths(self) -> dict[int, int]:
        """First layer of each segment, planned ones included -> prompt columns that the segment holds."""
        return {0: self.prompt.segments[0].length, **{p.cut.layer: max(p.lengths) for p in self.cuts}}


class LayerPruner:
    """Operations of the hooks of one text model. It is stateless: a forward's state is its Forward."""

    def __init__(self, text: Model, method: Method, contiguous: bool):
        self.text = text
        self.method = method
        self.contiguous = contiguous

    # --- entry: keyword arguments of the text model in, changed ones out ---

    def prefill(
        self,
        kwargs: Kwargs,
        modality: torch.Tensor,
        valid: torch.Tensor | None,
        dropped: torch.Tensor,
        rows: list[Row],
        cuts: tuple[Cut, ...],
        trailing: int,
    ) -> tuple[Prefill, Kwargs] | None:
        """Starts a prompt -> Prefill and the changed arguments. None: nothing is dropped, and nothing was changed.

        modality, valid (None: no padding) and dropped: (B, S), per column of the prompt.
        """
        lengths = [row.length + trailing - row.num_visual + row.num_kept for row in rows]
        planned = planned_cuts(cuts, rows, lengths)
        if not planned and all(row.num_kept == row.num_visual for row in rows):
            return None
        embeds = kwargs["inputs_embeds"]
        batch, length = embeds.shape[:2]
        valid = torch.ones_like(modality, dtype=torch.bool) if valid is None else valid
        modality, valid = modality.to(embeds.device), valid.to(embeds.device)
        text = valid & masks.behind(modality > 0, trailing)
        fixed = separators(modality, rows)
        candidates = (modality > 0) & valid if fixed is None else (modality > 0) & valid & ~fixed
        kwargs = self._full_positions(kwargs, batch, length, 0)
        end = masks.last_positions(valid, kwargs["position_ids"]) if self.contiguous else None
        columns, width = None, length
        if any(row.num_kept < row.num_visual for row in rows):
            width = max(lengths)
            columns, slots = masks.compact(valid & ~dropped, width, trailing)
            slots &= valid.gather(1, columns)
            # Pad slots hold dropped rows. Zero them: 0 * NaN would spread through the values of the attention.
            kwargs["inputs_embeds"] = masks.take(embeds, columns).masked_fill(~slots[..., None], 0)
            kwargs["position_ids"] = masks.take_positions(kwargs["position_ids"], columns)
            _shrink_deepstack(kwargs, dropped, columns, slots)
            candidates, text, valid = candidates.gather(1, columns) & slots, text.gather(1, columns) & slots, slots
        if end is not None:
            kwargs["position_ids"] = masks.contiguous_positions(valid, end)
        ragged = any(row.tail < trailing for row in rows)
        first = Segment(0, width, _padding(valid, lengths, width, ragged))
        prompt = PrunedPrompt(length, [first])
        run = Prefill(
            prompt,
            [self._mask(first.valid, width, 0, kwargs["inputs_embeds"])],
            rotary=[None],
            end=end,
            trailing=trailing,
            ragged=ragged,
            columns=columns,
            slots=valid,
            candidates=candidates,
            cuts=planned,
            text=text,
            text_width=max(row.text for row in rows if row.items),
        )
        if any(planned_cut.cut.queries == "raters" for planned_cut in planned):
            run.raters = raters_of(self.method, kwargs["inputs_embeds"], run, max(row.num_kept for row in rows))
        return run, kwargs

    def embedded(self, kwargs: Kwargs) -> Kwargs:
        """Replaces ids by embeddings. A caller may give ids where it calls the LLM directly."""
        if kwargs.get("inputs_embeds") is not None:
            return kwargs
        return {**kwargs, "input_ids": None, "inputs_embeds": self.text.get_input_embeddings()(kwargs["input_ids"])}

    def resume(self, kwargs: Kwargs, cache: "Cache", prompt: PrunedPrompt, by_hand: bool) -> tuple[Forward, Kwargs]:
        """Continues a pruned prompt: one token at a time, drafts, or the next turn of a conversation.

        by_hand: outside generate(), whose masks hold no padding in the columns of an answer.
        """
        embeds = kwargs["inputs_embeds"]
        past = cache.get_seq_length()
        run = Forward(prompt, self.later_masks(kwargs.get("attention_mask"), cache, prompt, embeds, by_hand))
        batch, length = embeds.shape[:2]
        return run, self._full_positions(kwargs, batch, length, past)

    def later_masks(
        self, mask: Any, cache: "Cache", prompt: PrunedPrompt, like: torch.Tensor, by_hand: bool
    ) -> list[torch.Tensor | None]:
        """One mask per segment, for new tokens after a pruned prompt.

        like: (B, new tokens, any), with dtype and device of the embeddings.
        """
        batch, queries = like.shape[:2]
        mask = unsupported.plain_mask(mask)
        prompt.ragged |= mask is not None and (queries > 1 or by_hand)
        behind = columns_behind(cache, prompt)
        new = behind + queries
        later = mask[:, prompt.length : prompt.length + new].bool() if prompt.ragged and mask is not None else None
        if later is not None and later.shape[1] != new:
            raise ValueError(
                f"sts_kernels: attention_mask must cover the {prompt.length + new} columns of the cache and of the new "
                f"tokens, got {mask.shape[1]}"
            )
        found = []
        for segment in prompt.segments:
            valid = _joined(segment.valid, later, (batch, segment.length, new), like.device)
            slots = None if prompt.slots is None else cache.layers[segment.start].max_cache_len
            if slots is not None and slots < segment.length + new:
                raise ValueError(
                    f"sts_kernels: the static cache has room for {slots - segment.length} tokens behind its pruned "
                    f"prompt, got {new}; give generate() a larger max_cache_len with the prompt"
                )
            found.append(self._mask(valid, queries, segment.length + behind, like, slots))
        prompt.later = new
        return found

    def _mask(
        self, valid: torch.Tensor | None, queries: int, past: int, like: torch.Tensor, slots: int | None = None
    ) -> torch.Tensor | None:
        return masks.attention_mask(unsupported.attention_of(self.text), valid, queries, past, like, slots)

    @staticmethod
    def _full_positions(kwargs: Kwargs, batch: int, length: int, past: int) -> Kwargs:
        """Uses the positions of the full prompt. Drops the library's mask, which is made for one cache length."""
        positions = kwargs.get("position_ids")
        if positions is None:
            positions = torch.arange(past, past + length, device=kwargs["inputs_embeds"].device)[None]
        kwargs = dict(kwargs, attention_mask=None, position_ids=positions.expand(*positions.shape[:-2], batch, length))
        kwargs.pop("cache_position", None)
        return kwargs

    # --- decoder layers ---

    @staticmethod
    def needs_layers(run: Forward, kwargs: Kwargs) -> bool:
        """Whether some layer of this forward needs other arguments than the first layer was given."""
        changed = kwargs.get("attention_mask") is not None or any(mask is not None for mask in run.masks)
        return changed or isinstance(run, Prefill)

    def before_layer(
        self, run: Forward, index: int, layer: Model, args: Args, kwargs: Kwargs
    ) -> tuple[Args, Kwargs] | None:
        """-> changed arguments of the layer; None: unchanged."""
        segment, rotary = run.prompt.segment_of(index), None
        if isinstance(run, Prefill):
            # FlashAttention would take gaps in the positions for boundaries of packed sequences.
            kwargs = dict(kwargs, position_ids=None)
            made = len(run.prompt.segments) - 1
            if made < len(run.cuts) and index == run.cuts[made].cut.layer:
                args, kwargs = self._cut(run, run.cuts[made], layer, args, kwargs)
                segment += 1
            rotary = run.rotary[segment]
        mask = run.masks[segment]
        if mask is None and kwargs.get("attention_mask") is None and not isinstance(run, Prefill):
            return None
        device = _hidden(args, kwargs).device
        if rotary is not None:
            kwargs = dict(kwargs, position_embeddings=tuple(table.to(device) for table in rotary))
        return args, dict(kwargs, attention_mask=None if mask is None else mask.to(device))

    def score(self, run: Forward, layer: int, query: torch.Tensor, key: torch.Tensor, scale: float | None) -> None:
        """Computes the scores of the next cut, if `layer` is its scoring layer."""
        if not isinstance(run, Prefill) or len(run.prompt.segments) > len(run.cuts):
            return
        cut = run.cuts[len(run.prompt.segments) - 1].cut
        if layer == cut.scoring_layer:
            run.scores = scores_of(run, cut, query, key, scale)

    def _cut(self, run: Prefill, planned: PlannedCut, layer: Model, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
        hidden = _hidden(args, kwargs)
        if planned.cut.score_from == "next":
            self._look_ahead(run, layer, hidden, kwargs)
        slots, candidates = run.slots.to(hidden.device), run.candidates.to(hidden.device)
        hidden, chosen, place = select(run, planned, hidden, candidates, self._final_norm)
        width = max(planned.lengths)
        columns, kept = masks.compact(slots & (chosen | ~candidates), width, run.trailing, place)
        run.slots = kept & slots.gather(1, columns)
        run.candidates = candidates.gather(1, columns) & run.slots
        run.text = run.text.to(columns.device).gather(1, columns) & run.slots
        run.columns = columns if run.columns is None else run.columns.to(columns.device).gather(1, columns)
        run.left.append((run.columns, run.slots))
        hidden = masks.take(hidden, columns)
        if run.end is not None:
            rotary = self.text.rotary_emb(hidden, masks.contiguous_positions(run.slots, run.end))
        else:
            before = run.rotary[-1] or kwargs["position_embeddings"]
            rotary = tuple(masks.take_rotary(table.to(columns.device), columns) for table in before)
        segment = Segment(planned.cut.layer, width, _padding(run.slots, planned.lengths, width, run.ragged))
        run.prompt.segments.append(segment)
        run.masks.append(self._mask(segment.valid, width, 0, hidden))
        run.rotary.append(rotary)
        return ((hidden, *args[1:]), kwargs) if args else (args, dict(kwargs, hidden_states=hidden))

    def _final_norm(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.text.norm(hidden).to(hidden.device)

    def _look_ahead(self, run: Prefill, layer: Model, hidden: torch.Tensor, kwargs: Kwargs) -> None:
        """Scores from the layer's own query and key on the tokens before the cut. Its attention kernel does not run."""
        tables = run.rotary[-1] or kwargs["position_embeddings"]
        rotary = tuple(table.to(hidden.device) for table in tables)
        with attention_capture.stopped():
            layer.self_attn(
                hidden_states=layer.input_layernorm(hidden), position_embeddings=rotary, attention_mask=None
            )

    # --- exit ---

    @staticmethod
    def finish(run: Forward, output: Any) -> None:
        """Restores the full length of the hidden states, and attaches the pruned prompt to the cache."""
        run.prompt.running = False
        if output is None or not isinstance(run, Prefill):
            return
        if run.columns is not None:
            hidden = output.last_hidden_state
            spare = run.prompt.length  # pad slots go to an extra column, which is cut off
            home = run.columns.to(hidden.device).masked_fill(~run.slots.to(hidden.device), spare)
            full = hidden.new_zeros(hidden.shape[0], spare + 1, hidden.shape[2])
            # generate() reads the last column. If its token was dropped, the last kept one speaks for it.
            last = masks.last_column(home < spare).clamp(min=0)
            full[:, spare - 1] = hidden.take_along_dim(last[..., None], 1)[:, 0]
            output.last_hidden_state = full.scatter_(1, home[..., None].expand_as(hidden), hidden)[:, :spare]
        if (cache := output_cache(output)) is not None:
            run.prompt.trim(run.trailing)
            if run.prompt.slots is None:
                attach_state(cache, run.prompt)


def scores_of(run: Run, cut: Cut, query: torch.Tensor, key: torch.Tensor, scale: float | None) -> torch.Tensor:
    """(B, P) float32, from query and key (B, heads, P, D) of the scoring layer."""
    column = torch.arange(key.shape[2], device=key.device)
    slots = run.slots.to(key.device)
    if cut.queries == "keys":
        return key.abs().sum((1, 3), dtype=torch.float32)
    if cut.queries == "raters":
        asking, _ = masks.compact(run.text.to(key.device), run.text_width)
        rows = masks.take(query.transpose(1, 2), asking)
        assert run.raters is not None  # computed before the first layer
        raters = run.raters.to(key.device)
        return attention_received(rows, key.transpose(1, 2), scale, raters, asking, slots)
    last = torch.where(slots & (column < key.shape[2] - run.trailing), column, 0).argmax(1)
    row = query.gather(2, last[:, None, None, None].expand(-1, query.shape[1], 1, query.shape[3]))[:, :, 0]
    seen = slots & (column <= last[:, None])  # drafts and earlier answers follow the query
    return last_query_scores(row, key.transpose(1, 2), scale, seen)


def _hidden(args: Args, kwargs: Kwargs) -> torch.Tensor:
    return args[0] if args else kwargs["hidden_states"]


def _padding(slots: torch.Tensor, lengths: list[int], width: int, ragged: bool) -> torch.Tensor | None:
    """`slots`, or None where the lengths say that no row has padding."""
    return None if all(length == width for length in lengths) and not ragged else slots


def _joined(
    prompt: torch.Tensor | None, later: torch.Tensor | None, shape: tuple[int, int, int], device: torch.device
) -> torch.Tensor | None:
    """(B, columns) bool: cached columns that are tokens, of the prompt and after it. None: all."""
    if prompt is None and later is None:
        return None
    batch, held_columns, new = shape
    ones = torch.ones(1, 1, dtype=torch.bool, device=device)
    parts = (
        ones.expand(batch, held_columns) if prompt is None else prompt.to(device),
        ones.expand(batch, new) if later is None else later.to(device),
    )
    return torch.cat(parts, dim=1)


def _shrink_deepstack(kwargs: Kwargs, dropped: torch.Tensor, columns: torch.Tensor, slots: torch.Tensor) -> None:
    """Drops tokens from the visual features that Qwen3-VL adds at placeholders in the first layers."""
    where = kwargs.get("visual_pos_masks")
    if where is not None:
        left = ~dropped[where]
        kwargs["deepstack_visual_embeds"] = [f[left.to(f.device)] for f in kwargs["deepstack_visual_embeds"]]
        kwargs["visual_pos_masks"] = where.gather(1, columns.to(where.device)) & slots.to(where.device)
