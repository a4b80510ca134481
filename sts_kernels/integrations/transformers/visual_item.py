"""`VisualItem`: one image or clip between the vision encoder and the LLM."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Blend:
    """Interpolation between projector and LLM: a feature is the weighted sum of four of the projector's rows."""

    rows: torch.Tensor  # (features, 4) int64
    weights: torch.Tensor  # (features, 4) float32
    num_rows: int  # of the projector

    def __call__(self, values: torch.Tensor) -> torch.Tensor:
        """(num_rows,) or (num_rows, D) -> (features,) or (features, D) of the same dtype, summed in float32."""
        if values.ndim == 1:
            return self(values[:, None])[:, 0]
        out = torch.zeros(len(self.rows), values.shape[-1], dtype=torch.float32, device=values.device)
        for row, weight in zip(self.rows.unbind(1), self.weights.unbind(1), strict=True):
            out = out + values[row].float() * weight[:, None]
        return out.to(values.dtype)

    @staticmethod
    def same(rows: torch.Tensor, num_rows: int) -> "Blend":
        """Feature f is row `rows[f]`."""
        weights = torch.tensor([1.0, 0.0, 0.0, 0.0], device="cpu")
        return Blend(rows[:, None].expand(-1, 4), weights.expand(len(rows), 4), num_rows)

    @staticmethod
    def bilinear(rows: torch.Tensor, size: tuple[int, int], num_rows: int) -> "Blend":
        """`interpolate(mode="bilinear")` to `size`. rows: (height, width) row numbers."""
        (row, down), (column, right) = (_between(n, to) for n, to in zip(rows.shape, size, strict=True))
        corners = rows[row[:, None, :, None], column[None, :, None, :]]  # (height, width, 2, 2)
        weights = down[:, None, :, None] * right[None, :, None, :]
        return Blend(corners.reshape(-1, 4), weights.reshape(-1, 4).float(), num_rows)

    @staticmethod
    def joined(parts: Sequence["Blend"], shared: bool = False) -> "Blend":
        """Features of all parts. shared: of the same rows; else rows of a part follow those of the part before."""
        total = parts[0].num_rows if shared else sum(part.num_rows for part in parts)
        starts = itertools.accumulate((0 if shared else part.num_rows for part in parts), initial=0)
        rows = [part.rows + start for part, start in zip(parts, starts, strict=False)]
        return Blend(torch.cat(rows), torch.cat([part.weights for part in parts]), total)

    @staticmethod
    def of(items: Sequence["VisualItem"], device: torch.device) -> "Blend | None":
        """Of the features of all items. None: no item is interpolated."""
        if all(item.blend is None for item in items):
            return None
        plain = [torch.arange(item.num_features, device="cpu") for item in items]
        parts = [item.blend or Blend.same(rows, len(rows)) for item, rows in zip(items, plain, strict=True)]
        whole = Blend.joined(parts)
        return Blend(whole.rows.to(device), whole.weights.to(device), whole.num_rows)


def _between(size: int, to: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(to, 2) int64 and float64: two of `size` places and their weights, for each of `to` places between them."""
    place = ((torch.arange(to, dtype=torch.float64, device="cpu") + 0.5) * size / to - 0.5).clamp(min=0)
    low = place.long()
    part = place - low
    return torch.stack([low, (low + 1).clamp(max=size - 1)], 1), torch.stack([1 - part, part], 1)


@dataclass(frozen=True)
class VisualItem:
    """One image, or one clip of a video.

    The projector gets its `num_features` features, crop after crop (tile after tile, frame after frame). Crop i has
    `crops[i]` features, in raster order of `grids[i]`. The LLM gets `num_tokens` tokens. With a `blend`, the projector
    gets other rows, and the model interpolates the features from its output.
    """

    kind: str  # "image" or "video"
    crops: list[int]
    grids: list[tuple[int, int]]  # rows and columns of each crop; a crop longer than its grid starts with a [CLS] token
    feature_of_token: torch.Tensor | None = None  # (num_tokens,) int64 on the CPU, -1: a separator. None: in order
    blend: Blend | None = None  # on the CPU. None: the features are the projector's rows
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
