"""`VisualItem`: one image or clip between the vision encoder and the LLM."""

import itertools
import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class VisualItem:
    """One image, or one clip of a video.

    The projector gets its `num_features` features, crop after crop (tile after tile, frame after frame). Crop i has
    `crops[i]` features, in raster order of `grids[i]`. The LLM gets `num_tokens` tokens.
    """

    kind: str  # "image" or "video"
    crops: list[int]
    grids: list[tuple[int, int]]  # rows and columns of each crop; a crop longer than its grid starts with a [CLS] token
    feature_of_token: torch.Tensor | None = None  # (num_tokens,) int64 on the CPU, -1: a separator. None: in order
    kept: int = 0  # tokens that enter the LLM, separators not counted

    @property
    def num_features(self) -> int:
        return sum(self.crops)

    @property
    def num_tokens(self) -> int:
        return self.num_features if self.feature_of_token is None else len(self.feature_of_token)

    @property
    def num_visual(self) -> int:
        """Tokens that may be pruned: all but separators."""
        return self.num_features if self.feature_of_token is None else int((self.feature_of_token >= 0).sum())

    def candidates(self) -> list[torch.Tensor]:
        """For each crop, indices of the features that become tokens, ascending. Features that the model discards are
        left out."""
        bounds = list(itertools.pairwise(itertools.accumulate(self.crops, initial=0)))
        if self.feature_of_token is None:
            return [torch.arange(a, b, device="cpu") for a, b in bounds]
        used = self.feature_of_token[self.feature_of_token >= 0].sort().values
        return [used[(used >= a) & (used < b)] for a, b in bounds]

    def patches(self) -> torch.Tensor:
        """(num_tokens, 3) int64: crop, row and column of each token of the LLM; -1, -1, -1 for a separator, row and
        column -1 for a [CLS] token."""
        rows = []
        for crop, (count, (height, width)) in enumerate(zip(self.crops, self.grids, strict=True)):
            extra = count - height * width
            rows += [(crop, -1, -1)] * extra + [(crop, y, x) for y in range(height) for x in range(width)]
        table = torch.tensor([*rows, (-1, -1, -1)], device="cpu")
        return table[:-1] if self.feature_of_token is None else table[self.feature_of_token]


def square(tokens: int) -> tuple[int, int]:
    """Grid of a square crop of this many tokens, with or without [CLS]."""
    side = math.isqrt(tokens)
    return (side, side)
