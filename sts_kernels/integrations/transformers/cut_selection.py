"""Which visual tokens a cut leaves of each prompt, what they hold from there on, and where they stand."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ... import methods
from ...methods import Cut, Method
from ...methods._keep_top import keep_top
from ...methods._packed import host
from ...methods.base import Inside
from . import masks


@dataclass
class PlannedCut:
    """A cut of the plan that drops something of this batch."""

    cut: Cut
    before: list[int]  # visual tokens of each row
    left: list[int]  # those that it leaves
    recycled: list[int]  # those of them that it makes of the dropped ones
    lengths: list[int]  # all tokens of each row from here on


def leave(
    run, planned: PlannedCut, hidden: torch.Tensor, candidates: torch.Tensor, norm: Callable
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """-> hidden states (B, P, C) with merged tokens in them, chosen (B, P) bool among the candidates, and the place
    (B, P) int64 of each column in the prompt where some move; None: all stay where they are. Nothing is read back.

    run: the Prefill. norm: the LLM's final norm.
    """
    scores = None if run.scores is None else run.scores.to(hidden.device)
    if planned.cut.select is None:
        return hidden, _best(scores, candidates, planned.left), None
    text, text_mask = masks.compact(run.text.to(hidden.device), run.text_width)
    chosen, place, width = torch.zeros_like(candidates), None, candidates.shape[1]
    if any(planned.recycled):
        place = torch.arange(width, device=hidden.device).mul(width + 1).repeat(len(candidates), 1)
    for (before, left, recycled), rows in _alike(planned, hidden.device):
        if before == left:
            chosen[rows] = candidates[rows]
            continue
        if not left:
            continue
        columns, _ = masks.compact(candidates[rows], before)
        visual = masks.take(hidden[rows], columns)
        inside = Inside(
            left,
            recycled,
            visual,
            masks.take(hidden[rows], text[rows]),
            text_mask[rows],
            None if scores is None else scores[rows].gather(1, columns),
            None if scores is None else scores[rows].gather(1, text[rows]),
            norm,
        )
        with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
            picked = planned.cut.select(inside)
        at = columns.gather(1, picked.order)
        chosen[rows[:, None], at] = True
        if picked.assignment is not None:
            hidden = hidden.index_put((rows[:, None], at), methods.merge(visual, picked))
        if recycled:
            last = at[:, : left - recycled].amax(1, keepdim=True) * (width + 1)
            turn = torch.arange(1, recycled + 1, device=hidden.device)
            place[rows[:, None], at[:, left - recycled :]] = last + turn
    return hidden, chosen, place


def _alike(planned: PlannedCut, device) -> list[tuple[tuple[int, int, int], torch.Tensor]]:
    """Rows with equal numbers of tokens, which are batches without padding."""
    found: dict[tuple[int, int, int], list[int]] = {}
    for row, numbers in enumerate(zip(planned.before, planned.left, planned.recycled, strict=True)):
        found.setdefault(numbers, []).append(row)
    return [(numbers, host(rows, device)) for numbers, rows in found.items()]


def raters_of(method: Method, embeds: torch.Tensor, run, width: int) -> torch.Tensor:
    """(B, text_width) float32: the weights of the text behind the last image, for attention that rates. width: the
    largest number of visual tokens."""
    visual, visual_mask = masks.compact(run.candidates, width)
    text, text_mask = masks.compact(run.text, run.text_width)
    with torch.no_grad(), torch.autocast(embeds.device.type, enabled=False):
        return method.raters(masks.take(embeds, visual), masks.take(embeds, text), visual_mask, text_mask)


def _best(scores: torch.Tensor, candidates: torch.Tensor, left: list[int]) -> torch.Tensor:
    """(B, P) bool: the `left[b]` best scored candidates of each row."""
    chosen = torch.zeros_like(candidates)
    for count in sorted(set(left) - {0}):
        mine = [row for row, wanted in enumerate(left) if wanted == count]
        rows = host(mine, scores.device)  # no sync in the middle of the LLM
        everyone = len(mine) == len(left)
        positions, _ = keep_top(*((scores, candidates) if everyone else (scores[rows], candidates[rows])), count)
        chosen[rows[:, None], positions] = True
    return chosen
