"""What the integration knows of one image or clip, between the vision encoder and the LLM."""

import itertools
from dataclasses import dataclass, field

import torch


@dataclass
class VisualItem:
    """One image, or one clip of a video.

    The projector consumes `units` feature rows of it, crop after crop, tile after tile or frame after frame (`parts`
    rows each, numbered as `grids` describes them); the LLM gets `tokens` tokens.
    """

    kind: str  # "image" or "video"
    parts: list[int]
    grids: list[tuple[int, int]]  # rows and columns of each part; a part longer than its grid starts with a [CLS] token
    unit_of_token: torch.Tensor | None = None  # (tokens,) int64 on the CPU, -1: structure (a newline). None: in order
    kept: int = field(default=0, init=False)  # tokens that stage 1 keeps, structure not counted

    @property
    def units(self) -> int:
        return sum(self.parts)

    @property
    def tokens(self) -> int:
        return self.units if self.unit_of_token is None else len(self.unit_of_token)

    @property
    def candidates(self) -> int:
        """Tokens that may be pruned: all but structure."""
        return self.units if self.unit_of_token is None else int((self.unit_of_token >= 0).sum())

    def candidate_units(self) -> list[torch.Tensor]:
        """For each part, the units that become tokens, in order; those that the model would discard are left out."""
        bounds = list(itertools.pairwise(itertools.accumulate(self.parts, initial=0)))
        if self.unit_of_token is None:
            return [torch.arange(a, b, device="cpu") for a, b in bounds]
        used = self.unit_of_token[self.unit_of_token >= 0].sort().values
        return [used[(used >= a) & (used < b)] for a, b in bounds]

    def patches(self) -> torch.Tensor:
        """(tokens, 3) int64: part, row and column of each token of the LLM; -1, -1, -1 for a newline, row and column -1
        for a [CLS] token."""
        rows = []
        for part, (count, (height, width)) in enumerate(zip(self.parts, self.grids, strict=True)):
            extra = count - height * width
            rows += [(part, -1, -1)] * extra + [(part, y, x) for y in range(height) for x in range(width)]
        table = torch.tensor([*rows, (-1, -1, -1)], device="cpu")
        return table[:-1] if self.unit_of_token is None else table[self.unit_of_token]


def square(count: int) -> tuple[int, int]:
    """The grid of a square crop of `count` tokens, with or without a [CLS] token."""
    side = int(count**0.5)
    return side, side
