"""A batch of prompts -> host tensors of fixed shapes, from ids, masks and sizes alone."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ....methods import Plan
from .. import prompt
from ..cut_selection import planned_cuts
from ..prompt import Row
from ..visual_item import VisualItem
from .runner import CutShape, Shape


@dataclass
class Prompt:
    """ids, valid, modality: (B, S) on the host, S columns of the full prompt. positions: (axes, B, S), rotary."""

    ids: Tensor
    valid: Tensor
    modality: Tensor
    positions: Tensor
    rows: list[Row]

    @property
    def entering(self) -> list[int]:
        """Tokens of each row that enter the LLM."""
        return [row.length - row.num_visual + row.num_kept for row in self.rows]


def read(
    ids: Tensor, valid: Tensor, modality: Tensor, positions: Tensor, items: dict[str, list[VisualItem]], plan: Plan
) -> Prompt:
    """Assigns images to prompts. Raises the errors of `prompt.read_rows`."""
    return Prompt(ids, valid, modality, positions, prompt.read_rows(modality, valid, None, 0, items, plan))


def of_length(items: Sequence[VisualItem], slots: int, plan: Plan) -> Prompt | None:
    """One prompt for each image, with as much text as fills `slots`. None: an image does not fit."""
    texts = [slots - survivors(item) for item in items]
    if min(texts) < 2:
        return None
    with torch.device("cpu"):
        lengths = [1 + item.num_tokens + text - 1 for item, text in zip(items, texts, strict=True)]
        column = torch.arange(max(lengths))
        valid = column < torch.tensor(lengths)[:, None]
        tokens = torch.tensor([item.num_tokens for item in items])[:, None]
        modality = ((column >= 1) & (column <= tokens)).to(torch.int8)
        return read(modality, valid, modality, modality[None], {items[0].kind: list(items)}, plan)


def shape_of(given: Prompt, plan: Plan, batch: int, slots: int, new: int, step: int = 1) -> Shape:
    """Shape for every batch of the bucket whose rows have the same counts of visual tokens as `given`.

    Slots after a cut are multiples of `step`, max `slots`.
    """
    entering, cuts, text = given.entering, [], 0
    spare = batch - len(given.rows)
    for planned in planned_cuts(plan.cuts, given.rows, entering):
        index = plan.cuts.index(planned.cut)
        counts = None
        if planned.cut.select is not None:
            counts = (*zip(planned.before, planned.left, planned.recycled, strict=True), *[(0, 0, 0)] * spare)
        if planned.cut.queries != "last" or planned.cut.select is not None:
            text = slots - min(row.num_kept for row in given.rows)  # upper bound for these counts
        width = -(-_width(slots, entering, planned.lengths) // step) * step
        cuts.append(CutShape(index, min(slots, width), counts))
    return Shape(batch, slots, new, tuple(cuts), text)


def _width(slots: int, entering: Sequence[int], lengths: Sequence[int]) -> int:
    """Slots after a cut: `max(2, slots - n)`.

    n: the largest number of tokens that one row drops and that leaves room for the longest row,
    `max(lengths) <= slots - n`. No smaller width serves every prompt of the bucket with the same numbers of dropped
    tokens.
    """
    dropped = sorted({n - left for n, left in zip(entering, lengths, strict=True)}, reverse=True)
    return max(2, next(slots - n for n in dropped if max(lengths) <= slots - n))  # one slot: a decode step


def fill(given: Prompt, shape: Shape, plan: Plan) -> tuple[dict[str, Tensor], Tensor]:
    """-> the tensors of `runner.layout_shapes`, and places (1 + axes, N) of all placeholders, image after image.

    places: column in the full prompt and rotary positions.
    """
    axes, batch = given.positions.shape[0], shape.batch
    with torch.device("cpu"):
        ids = torch.zeros(batch, shape.slots, dtype=torch.int64)
        source, places = torch.full_like(ids, -1), ids.new_zeros(1 + axes, batch, shape.slots)
        lengths, after = ids.new_zeros(1 + len(shape.cuts), batch), ids.new_zeros(len(shape.cuts), batch)
        behind, position = ids.new_zeros(batch), ids.new_zeros(batch)
        placeholders, first = [], 0
        for index, row in enumerate(given.rows):
            columns = given.valid[index].nonzero()[:, 0]
            full = torch.cat([columns[None], given.positions[:, index, columns]])
            visual = given.modality[index, columns] > 0
            placeholders.append(full[:, visual])
            survives = [torch.arange(item.num_tokens) < survivors(item) for item in row.items]
            keep = ~visual
            keep[visual] = torch.cat([keep[:0], *survives])
            _check_contiguous(visual, row)
            count = int(keep.sum())
            ids[index, :count] = given.ids[index, columns[keep]]
            places[:, index, :count] = full[:, keep]
            kept_visual = visual[keep]
            many = int(kept_visual.sum())
            source[index, :count][kept_visual] = torch.arange(first, first + many)
            first += many
            behind[index] = int(kept_visual.nonzero()[-1]) + 1 if many else 0
            if len(columns) and visual[-1] and axes > 1:
                raise NotImplementedError("a prompt that ends with an image")
            position[index] = full[1:].max() + 1 if count else 0
        made = planned_cuts(plan.cuts, given.rows, given.entering)
        for number, numbers in enumerate([given.entering, *(planned.lengths for planned in made)]):
            lengths[number, : len(given.rows)] = torch.tensor(numbers)
        for number, planned in enumerate(made):
            after[number, : len(given.rows)] = torch.tensor(planned.left)
        values = {"ids": ids, "source": source, "places": places, "lengths": lengths, "after": after}
        return values | {"behind": behind, "position": position}, torch.cat(placeholders, dim=1)


def survivors(item: VisualItem) -> int:
    """Tokens of an image that enter the LLM, separators included."""
    return item.kept + item.num_tokens - item.num_visual


def _check_contiguous(visual: Tensor, row: Row) -> None:
    start = 0
    where = visual.nonzero()[:, 0]
    for item in row.items:
        mine = where[start : start + item.num_tokens]
        start += item.num_tokens
        if len(mine) and int(mine[-1] - mine[0]) != len(mine) - 1:
            raise NotImplementedError("an image whose placeholders do not follow one another")
