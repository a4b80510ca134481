"""The late shrink: inside the text model the prompt is shorter than its callers know.

Around the text model nothing changes: generate(), ids, masks, positions and logits have their full length. On entry the
prompt loses what stage 1 dropped; before layer `prune_layer` it loses what stage 2 drops; on exit the hidden states go
back to their columns. Tokens keep their positions. In later forwards only the masks differ, as the two parts of the
layers have caches of different lengths.
"""

from dataclasses import dataclass, field

import torch

from ... import last_query_scores
from ...pruning import keep_top
from . import masks, refusals
from .cache import PrunedPrompt, attach, held
from .compat import output_cache
from .marks import marked
from .prompt import Row, structure


@dataclass
class Pass:
    """One forward of the text model over a pruned prompt (prefill), or after one."""

    prompt: PrunedPrompt
    masks: list = field(default_factory=list)  # of the layers before prune_layer, and from it on
    prefill: bool = False
    extra: int = 0  # columns at the end that follow the prompt: drafts, or what was generated before (use_cache=False)
    columns: torch.Tensor | None = None  # (B, P) column of the full prompt in each slot; None: all in order
    slots: torch.Tensor | None = None  # (B, P) bool: tokens, not padding
    candidates: torch.Tensor | None = None  # (B, P) bool: what stage 2 may drop; None: it drops nothing
    after: list[int] = field(default_factory=list)  # how many of them each row keeps
    lengths: list[int] = field(default_factory=list)  # tokens of each row that are left from prune_layer on
    width: int = 0  # the longest of them
    scores: torch.Tensor | None = None  # (B, P) attention of each row's last prompt token in layer prune_layer - 1
    rotary: tuple = ()  # cos and sin of the slots left


class LateShrink:
    """What the hooks of one text model do. It holds no state: that of a forward is its Pass."""

    def __init__(self, text, prune_layer: int):
        self.text = text
        self.prune_layer = prune_layer

    # --- entry: keyword arguments of the text model in, changed ones out ---

    def prefill(self, kwargs: dict, found: torch.Tensor, rows: list[Row], extra: int) -> tuple[Pass, dict] | None:
        """Starts a prompt; None where nothing is dropped, and then nothing is touched."""
        if all(row.after == row.before for row in rows):
            return None
        attention = refusals.attention_of(self.text)
        embeds = kwargs["inputs_embeds"]
        batch, length = embeds.shape[:2]
        mask = refusals.plain_mask(kwargs.get("attention_mask"))
        valid = torch.ones_like(found, dtype=torch.bool) if mask is None else mask.bool()
        found, valid = found.to(embeds.device), valid.to(embeds.device)
        fixed = structure(found, rows)
        candidates = (found > 0) & valid if fixed is None else (found > 0) & valid & ~fixed
        kwargs = self._own_positions(kwargs, batch, length, 0)
        lengths = [row.length - row.before + row.kept for row in rows]
        columns, width = None, length
        if any(row.kept < row.before for row in rows):
            width = max(lengths)
            dropped = marked(embeds)
            columns, valid_slots = masks.compact(valid & ~dropped, width)
            # Pad slots hold dropped rows: a zero stays one, a NaN would spread through the values of the attention.
            kwargs["inputs_embeds"] = masks.take(embeds, columns).masked_fill(~valid_slots[..., None], 0)
            kwargs["position_ids"] = masks.take_positions(kwargs["position_ids"], columns)
            _shrink_deepstack(kwargs, dropped, columns, valid_slots)
            candidates, valid = candidates.gather(1, columns) & valid_slots, valid_slots
        prompt = PrunedPrompt(length, width, _padding(valid, lengths, width), self.prune_layer)
        run = Pass(prompt, prefill=True, extra=extra, columns=columns, slots=valid)
        run.masks = [masks.attention_mask(attention, prompt.valid[0], width, 0, embeds)] * 2
        if any(row.after < row.kept for row in rows):
            run.candidates, run.after = candidates, [row.after for row in rows]
            run.lengths = [n - row.kept + row.after for n, row in zip(lengths, rows, strict=True)]
            run.width = max(run.lengths)
        return run, kwargs

    def resume(self, kwargs: dict, cache, prompt: PrunedPrompt) -> tuple[Pass, dict]:
        """Continues a pruned prompt: one token at a time, drafts, or the next turn of a conversation."""
        attention = refusals.attention_of(self.text)
        embeds = kwargs["inputs_embeds"]
        batch, queries = embeds.shape[:2]
        mask = refusals.plain_mask(kwargs.get("attention_mask"))
        prompt.ragged |= queries > 1 and mask is not None
        past = [held(cache, 0), held(cache, prompt.prune_layer)]
        new = past[0] - prompt.lengths[0] + queries
        later = mask[:, prompt.length : prompt.length + new].bool() if prompt.ragged and mask is not None else None
        if later is not None and later.shape[1] != new:
            raise ValueError(
                f"apply_sts: attention_mask must cover the {prompt.length + new} columns of the cache and of the new "
                f"tokens, got {mask.shape[1]}"
            )
        run = Pass(prompt)
        for group in (0, 1):
            valid = _joined(prompt.valid[group], later, (batch, prompt.lengths[group], new), embeds.device)
            run.masks.append(masks.attention_mask(attention, valid, queries, past[group], embeds))
        return run, self._own_positions(kwargs, batch, queries, past[0] + prompt.hidden)

    @staticmethod
    def _own_positions(kwargs: dict, batch: int, length: int, past: int) -> dict:
        """Positions are those of the full prompt. The library's mask is made for one cache length and is not used."""
        positions = kwargs.get("position_ids")
        if positions is None:
            positions = torch.arange(past, past + length, device=kwargs["inputs_embeds"].device)[None]
        kwargs = dict(kwargs, attention_mask=None, position_ids=positions.expand(*positions.shape[:-2], batch, length))
        kwargs.pop("cache_position", None)
        return kwargs

    # --- decoder layers ---

    @staticmethod
    def needs_layers(run: Pass, kwargs: dict) -> bool:
        """Whether any layer of this forward is to get other arguments than the first one got."""
        return run.prefill or kwargs.get("attention_mask") is not None or any(mask is not None for mask in run.masks)

    def before_layer(self, run: Pass, layer: int, args: tuple, kwargs: dict):
        deep = layer >= run.prompt.prune_layer
        if run.prefill:
            # FlashAttention would take the gaps in the positions for the seams of packed sequences.
            kwargs = dict(kwargs, position_ids=None)
            if deep and run.candidates is not None:
                if layer == run.prompt.prune_layer:
                    args, kwargs = self._cut(run, args, kwargs)
                device = _hidden(args, kwargs).device
                kwargs["position_embeddings"] = tuple(table.to(device) for table in run.rotary)
        mask = run.masks[deep]
        if mask is None and kwargs.get("attention_mask") is None and not run.prefill:
            return None
        if mask is not None:
            mask = mask.to(_hidden(args, kwargs).device)
        return args, dict(kwargs, attention_mask=mask)

    @staticmethod
    def score(run: Pass, query: torch.Tensor, key: torch.Tensor, scale: float | None) -> None:
        """Of the prompt, in layer prune_layer - 1."""
        if not run.prefill or run.candidates is None:
            return
        column = torch.arange(key.shape[2], device=key.device)
        slots = run.slots.to(key.device)
        last = torch.where(slots & (column < key.shape[2] - run.extra), column, 0).argmax(1)
        row = query.gather(2, last[:, None, None, None].expand(-1, query.shape[1], 1, query.shape[3]))[:, :, 0]
        seen = slots & (column <= last[:, None])  # drafts and earlier answers follow the query
        run.scores = last_query_scores(row, key.transpose(1, 2), scale, seen)

    def _cut(self, run: Pass, args: tuple, kwargs: dict):
        hidden = _hidden(args, kwargs)
        slots, candidates = run.slots.to(hidden.device), run.candidates.to(hidden.device)
        chosen = _chosen(run.scores.to(hidden.device), candidates, run.after)
        columns, run.slots = masks.compact(slots & (chosen | ~candidates), run.width)
        run.rotary = tuple(masks.take_rotary(table, columns) for table in kwargs["position_embeddings"])
        run.columns = columns if run.columns is None else run.columns.to(columns.device).gather(1, columns)
        run.prompt.cut(run.width, _padding(run.slots, run.lengths, run.width))
        attention = refusals.attention_of(self.text)
        run.masks[1] = masks.attention_mask(attention, run.prompt.valid[1], run.width, 0, hidden)
        hidden = masks.take(hidden, columns)
        return ((hidden, *args[1:]), kwargs) if args else (args, dict(kwargs, hidden_states=hidden))

    # --- exit ---

    @staticmethod
    def leave(run: Pass, output) -> None:
        """The callers get their length back, and the cache learns what it holds."""
        run.prompt.running = False
        if output is None or not run.prefill:
            return
        if run.columns is not None:
            hidden = output.last_hidden_state
            spare = run.prompt.length  # pad slots go to a column of their own, cut off again
            home = run.columns.to(hidden.device).masked_fill(~run.slots.to(hidden.device), spare)
            full = hidden.new_zeros(hidden.shape[0], spare + 1, hidden.shape[2])
            output.last_hidden_state = full.scatter(1, home[..., None].expand_as(hidden), hidden)[:, :spare]
        if (cache := output_cache(output)) is not None:
            run.prompt.trim(run.extra)
            attach(cache, run.prompt)


def _hidden(args: tuple, kwargs: dict) -> torch.Tensor:
    return args[0] if args else kwargs["hidden_states"]


def _padding(slots: torch.Tensor, lengths: list[int], width: int) -> torch.Tensor | None:
    """`slots`, or None where the lengths say that no row has padding."""
    return None if all(length == width for length in lengths) else slots


def _joined(prompt, later, shape: tuple[int, int, int], device) -> torch.Tensor | None:
    """Which cached columns are tokens: those of the prompt and those after it."""
    if prompt is None and later is None:
        return None
    batch, held_columns, new = shape
    ones = torch.ones(1, 1, dtype=torch.bool, device=device)
    parts = (
        ones.expand(batch, held_columns) if prompt is None else prompt.to(device),
        ones.expand(batch, new) if later is None else later.to(device),
    )
    return torch.cat(parts, dim=1)


def _chosen(scores: torch.Tensor, candidates: torch.Tensor, after: list[int]) -> torch.Tensor:
    """(B, P) bool: the `after[b]` best scored candidates of each row."""
    chosen = torch.zeros_like(candidates)
    for count in sorted(set(after) - {0}):
        rows = torch.tensor([row for row, wanted in enumerate(after) if wanted == count], device=scores.device)
        positions, _ = keep_top(scores[rows], candidates[rows], count)
        chosen[rows[:, None], positions] = True
    return chosen


def _shrink_deepstack(kwargs: dict, dropped, columns, slots) -> None:
    """Qwen3-VL adds visual features to the first layers too, at the placeholders."""
    where = kwargs.get("visual_pos_masks")
    if where is not None:
        left = ~dropped[where]
        kwargs["deepstack_visual_embeds"] = [f[left.to(f.device)] for f in kwargs["deepstack_visual_embeds"]]
        kwargs["visual_pos_masks"] = where.gather(1, columns.to(where.device)) & slots.to(where.device)
