"""Selection of a cut: the visual tokens kept in each row, their merged hidden states, and their order."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import torch

from ... import methods
from ...methods import Cut, Method
from ...methods._keep_top import best_of
from ...methods._packed import host
from ...methods._pool import ABSENT
from ...methods.base import Inside
from . import masks
from .prompt import Row

Group: TypeAlias = tuple[tuple[int, int, int], torch.Tensor]  # tokens before, left and recycled; rows of a batch


class Run(Protocol):
    """A prompt between two layers: (B, P) tensors of its slots. See `layer_pruning.Prefill`."""

    slots: torch.Tensor
    candidates: torch.Tensor
    text: torch.Tensor
    text_width: int
    trailing: int
    scores: torch.Tensor | None
    raters: torch.Tensor | None


@dataclass
class PlannedCut:
    """A cut of the plan that drops tokens of this batch."""

    cut: Cut
    before: list[int]  # visual tokens of each row before the cut
    left: list[int]  # visual tokens of each row after the cut
    recycled: list[int]  # tokens among `left` that are merged from dropped ones
    lengths: list[int]  # all tokens of each row after the cut

    def alike(self, device: torch.device) -> list[Group]:
        """Groups of rows with equal counts: each group is a batch without padding."""
        found: dict[tuple[int, int, int], list[int]] = {}
        for row, numbers in enumerate(zip(self.before, self.left, self.recycled, strict=True)):
            found.setdefault(numbers, []).append(row)
        return [(numbers, host(rows, device)) for numbers, rows in found.items()]


def planned_cuts(cuts: Sequence[Cut], rows: list[Row], lengths: list[int]) -> list[PlannedCut]:
    """The cuts that drop tokens of these prompts. lengths: all tokens of each row that enter the LLM."""
    planned, before = [], [row.num_kept for row in rows]
    for index, cut in enumerate(cuts):
        left = [row.left[index] for row in rows]
        if left != before:
            here = [n - row.num_kept + mine for n, row, mine in zip(lengths, rows, left, strict=True)]
            planned.append(PlannedCut(cut, before, left, [row.recycled[index] for row in rows], here))
        before = left
    return planned


def select(
    run: Run,
    planned: PlannedCut,
    hidden: torch.Tensor,
    candidates: torch.Tensor,
    norm: Callable[[torch.Tensor], torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Selects the tokens that a cut keeps. Nothing is read back to the host.

    norm: the LLM's final norm.

    Returns:
        hidden (B, P, C): hidden states, with merged tokens written into them.
        chosen (B, P) bool: kept tokens among the candidates.
        place (B, P) int64: sort key of each column, where recycled tokens move. None: the order does not change.
    """
    scores = None if run.scores is None else run.scores.to(hidden.device)
    if planned.cut.select is None:
        assert scores is not None  # cuts without `select` rank by attention, computed before
        return hidden, best_of(scores, candidates, host(planned.left, scores.device)), None
    text, text_mask = masks.compact(run.text.to(hidden.device), run.text_width)
    chosen, width = torch.zeros_like(candidates), candidates.shape[1]
    place: torch.Tensor | None = None
    taken = torch.ones((), dtype=torch.bool, device=hidden.device)  # a Python bool would be copied from the host
    if any(planned.recycled):
        place = torch.arange(width, device=hidden.device).mul(width + 1).repeat(len(candidates), 1)
    for (before, left, recycled), rows in planned.alike(hidden.device):
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
            ABSENT if scores is None else scores[rows].gather(1, columns),
            ABSENT if scores is None else scores[rows].gather(1, text[rows]),
            norm,
        )
        with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
            picked = planned.cut.select(inside)
        at = columns.gather(1, picked.order)
        chosen[rows[:, None], at] = taken
        if picked.assignment is not None:
            hidden = hidden.index_put((rows[:, None], at), methods.merge(visual, picked))
        if recycled:
            assert place is not None  # any(planned.recycled)
            last = at[:, : left - recycled].amax(1, keepdim=True) * (width + 1)
            turn = torch.arange(1, recycled + 1, device=hidden.device)
            place[rows[:, None], at[:, left - recycled :]] = last + turn
    return hidden, chosen, place


def raters_of(method: Method, embeds: torch.Tensor, run: Run, width: int) -> torch.Tensor:
    """(B, text_width) float32: weights of the text tokens after the last image, whose attention rates visual tokens.

    width: max visual tokens of a row.
    """
    visual, visual_mask = masks.compact(run.candidates, width)
    text, text_mask = masks.compact(run.text, run.text_width)
    with torch.no_grad(), torch.autocast(embeds.device.type, enabled=False):
        return method.raters(masks.take(embeds, visual), masks.take(embeds, text), visual_mask, text_mask)
