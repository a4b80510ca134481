"""A row of NaN marks a dropped token, from the projector to the input of the LLM.

The mark survives whatever the model does to features on their way into the prompt: unpadding, newlines, batches, beams.
It cannot go unnoticed. No mark enters the LLM: marked rows are removed before its first layer.
"""

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


def is_dropped(embeds: torch.Tensor) -> torch.Tensor:
    """(B, S) bool: True at dropped tokens of a prompt."""
    return embeds[..., 0].isnan()


def of_output(output: Any) -> torch.Tensor:
    """(tokens,) bool: marks in the output of get_image_features() or get_video_features(), image after image."""
    features = getattr(output, "pooler_output", output)
    if isinstance(features, list | tuple):
        # Before transformers 5, Qwen3-VL returns (features, deepstack features).
        features = torch.cat([x.flatten(0, -2) for x in (features[0] if _nested(features) else features)])
    return is_dropped(features).flatten()


def _nested(features: list[Any] | tuple[Any, ...]) -> bool:
    return isinstance(features[0], list | tuple)


def find(embeds: torch.Tensor, encoded: dict[str, tuple[list[VisualItem], torch.Tensor]]) -> torch.Tensor | None:
    """Modality ids, as `prompt.placeholders` gives them, of embeddings that a caller merged with encoded features.

    encoded: by kind, the items that the caller encoded last and the marks in their features. The marks of each item
    must be in the prompt in the same pattern, else ValueError. None: there is no mark. Reads back from the device.
    """
    marks = is_dropped(embeds).cpu()
    if not marks.any():
        return None
    patterns = []
    for kind in KINDS:
        items, mine = encoded.get(kind, ([], embeds.new_empty(0)))
        patterns += [(kind, pattern) for pattern in mine.cpu().split([item.num_tokens for item in items])]
    for repeats in (n for n in range(1, len(marks) + 1) if len(marks) % n == 0):  # beams repeat a row
        rows = marks[::repeats]
        found = _place(rows, patterns)
        if found is not None and torch.equal(rows.repeat_interleave(repeats, 0), marks):
            return found.repeat_interleave(repeats, 0).to(embeds.device)
    raise ValueError(
        "sts_kernels: inputs_embeds hold NaN rows, which mark the visual tokens that were dropped, but not those of "
        "the images encoded last; merge whole features of one get_image_features() call, or pass the model pixel values"
    )


def _place(marks: torch.Tensor, patterns: list[tuple[str, torch.Tensor]]) -> torch.Tensor | None:
    """Matches the patterns of the items with the rows of marks, in order -> modality ids. None: they do not fit."""
    found = torch.zeros(marks.shape, dtype=torch.int8, device="cpu")
    queue = iter(patterns)
    for row, out in zip(marks, found, strict=True):
        position, length = 0, len(row)
        while row[position:].any():
            kind, pattern = next(queue, ("", None))
            if pattern is None or not pattern.any():
                return None
            start = position + int(row[position:].int().argmax() - pattern.int().argmax())
            position_after = start + len(pattern)
            if start < position or position_after > length or not torch.equal(row[start:position_after], pattern):
                return None
            out[start:position_after] = 1 + KINDS.index(kind)
            position = position_after
    return found if next(queue, None) is None else None
