"""Segments: runs of decoder layers that hold the same columns of a pruned prompt."""

import bisect
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers.cache_utils import StaticLayer

    from .static_cache import StaticSlots


@dataclass
class Segment:
    """Layers from `start` on, up to the next segment."""

    start: int
    length: int  # columns of the prompt that these layers hold
    valid: torch.Tensor | None = None  # (B, length) bool: tokens, not pad slots. None: all are tokens


class PrunedPrompt:
    """The columns of a prompt that a cache holds, per segment. length: columns of the full prompt."""

    def __init__(self, length: int, segments: list[Segment]):
        self.length = length
        self.segments = segments
        self.ragged = False  # whether a later turn came with an attention mask, which may hold padding
        self.running = False  # whether the hooks are around the text model right now
        self.later = 0  # columns after the prompt in a static cache; other caches tell by shape
        self.slots: StaticSlots | None = None  # source of the layers of a static cache; None: another cache
        self.plain_layers: list[StaticLayer] = []  # original layers of the static cache

    @property
    def hidden(self) -> int:
        """Columns that callers count and layer 0 does not hold."""
        return self.length - self.segments[0].length

    def segment_of(self, layer: int) -> int:
        return bisect.bisect_right([segment.start for segment in self.segments], layer) - 1

    def trim(self, columns: int) -> None:
        """Removes the last columns from the prompt. They follow the prompt, and the caller may crop them."""
        self.length -= columns
        self.later += columns
        for segment in self.segments:
            segment.length -= columns
            if segment.valid is not None:
                segment.valid = segment.valid[:, : segment.length]

    def select_rows(self, index: torch.Tensor) -> None:
        for segment in self.segments:
            if segment.valid is not None:
                segment.valid = segment.valid.index_select(0, index.to(segment.valid.device))

    def repeat_rows(self, repeats: int) -> None:
        for segment in self.segments:
            if segment.valid is not None:
                segment.valid = segment.valid.repeat_interleave(repeats, dim=0)
