"""A row of NaN marks a dropped token, from the projector to the input of the LLM.

The mark survives whatever the model does to features on their way into the prompt: unpadding, newlines, batches, beams.
It cannot go unnoticed. No mark enters the LLM: marked rows are removed before its first layer.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import torch

from .prompt import KINDS
from .visual_item import VisualItem


def mark(projected: torch.Tensor, rows: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """Scatters projected rows into `shape`, with their own channels. All other rows are marks.

    A NaN of the projector becomes infinite, so it still spoils the output as in the plain model.
    """
    projected = torch.where(projected.isnan(), torch.inf, projected)
    full = projected.new_full((shape[:-1].numel(), projected.shape[-1]), torch.nan)
    full[rows.to(full.device)] = projected
    return full.view(*shape[:-1], projected.shape[-1])


def mark_features(output: Any, items: Sequence[VisualItem], rows: torch.Tensor, values: torch.Tensor | None) -> Any:
    """Marks dropped features in the output of get_image_features() or get_video_features(). Separators stay.

    rows: kept features, of all items. values: replace the kept features; None: they stay as they are. A NaN of the
    projector becomes infinite, as in `mark`.
    """
    features = getattr(output, "pooler_output", output)
    starts = itertools.accumulate((item.num_features for item in items), initial=0)
    kept = torch.full((sum(item.num_features for item in items),), -1, device=rows.device)
    kept[rows] = torch.arange(len(rows), device=rows.device)
    marked = []
    for part, item, start in zip(features, items, starts, strict=False):
        assert item.feature_of_token is not None  # items of features that are interpolated have separators
        feature = item.feature_of_token[: len(part)].to(part.device)  # transformers 4: a clip comes without newline
        row = torch.where(feature < 0, -1, kept.to(part.device)[(feature + start).clamp(min=0)])
        part = torch.where(part.isnan(), torch.inf, part)
        if values is not None:
            part = torch.where(row[:, None] < 0, part, values.to(part)[row.clamp(min=0)])
        marked.append(part.masked_fill(((feature >= 0) & (row < 0))[:, None], torch.nan))
    result = torch.stack(marked) if isinstance(features, torch.Tensor) else type(features)(marked)
    if output is features:
        return result
    output.pooler_output = result
    return output


def is_dropped(embeds: torch.Tensor) -> torch.Tensor:
    """(B, S) bool: True at dropped tokens of a prompt."""
    return embeds[..., 0].isnan()


def of_output(output: Any) -> torch.Tensor:
    """(tokens,) on the CPU: first channel of the output of get_image_features() or get_video_features(), image after
    image. Reads back from the device."""
    features = getattr(output, "pooler_output", output)
    if isinstance(features, list | tuple):
        # Before transformers 5, Qwen3-VL returns (features, deepstack features).
        features = torch.cat([x.flatten(0, -2) for x in (features[0] if _nested(features) else features)])
    return features[..., 0].flatten().to("cpu", copy=True)  # a view would keep all channels


def _nested(features: list[Any] | tuple[Any, ...]) -> bool:
    return isinstance(features[0], list | tuple)


def find(embeds: torch.Tensor, encoded: dict[str, tuple[list[VisualItem], torch.Tensor]]) -> torch.Tensor | None:
    """Modality ids, as `prompt.placeholders` gives them, of embeddings that a caller merged with encoded features.

    encoded: by kind, the items that the caller encoded last, and the first channel of their features. An item is found
    where its bits are. None: the prompt has none of the items. Reads back from the device.

    Raises:
        ValueError: there are marks, but not all items in their order.
    """
    values = embeds[..., 0].cpu()
    patterns = []
    for kind in KINDS:
        items, mine = encoded.get(kind, ([], values.new_empty(0)))
        lengths = [item.num_tokens for item in items]
        patterns += [(kind, pattern) for pattern in mine.to(values.dtype).split(lengths)]
    for repeats in (n for n in range(1, len(values) + 1) if len(values) % n == 0):  # beams repeat a row
        found = _place(values[::repeats], patterns)
        if found is not None and _equal(values[::repeats].repeat_interleave(repeats, 0), values).all():
            return found.repeat_interleave(repeats, 0).to(embeds.device)
    if not values.isnan().any():
        return None
    raise ValueError(
        "sts_kernels: inputs_embeds hold NaN rows, which mark the visual tokens that were dropped, but not those of "
        "the images encoded last; merge whole features of one get_image_features() call, or pass the model pixel values"
    )


def _equal(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (a == b) | (a.isnan() & b.isnan())


def _place(rows: torch.Tensor, patterns: list[tuple[str, torch.Tensor]]) -> torch.Tensor | None:
    """Finds the items in the rows, in order -> modality ids. None: they do not fit, or leave marks over."""
    found = torch.zeros(rows.shape, dtype=torch.int8, device="cpu")
    row, position = 0, 0
    for kind, pattern in patterns:
        while (start := _find(rows[row], pattern, position)) is None:
            row, position = row + 1, 0
            if row == len(rows):
                return None
        position = start + len(pattern)
        found[row, start:position] = 1 + KINDS.index(kind)
    return None if (rows.isnan() & (found == 0)).any() else found


def _find(row: torch.Tensor, pattern: torch.Tensor, position: int) -> int | None:
    """First start of the pattern in row[position:]."""
    last = len(row) - len(pattern) + 1
    for start in _equal(row[position : max(position, last)], pattern[0]).nonzero().flatten().tolist():
        begin = position + int(start)
        if _equal(row[begin : begin + len(pattern)], pattern).all():
            return begin
    return None
