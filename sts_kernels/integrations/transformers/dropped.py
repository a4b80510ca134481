"""The mark of a dropped token: a row of NaN, from the projector to the entrance of the LLM.

It survives whatever the model does to features on their way into the prompt (unpadding, newlines, batches, beams), and
cannot go unnoticed. No NaN enters the LLM: at the entrance marked rows are taken out.
"""

from typing import Any

import torch

from .prompt import KINDS
from .visual_item import VisualItem


def mark(projected: torch.Tensor, rows: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """Puts the projected rows back at their places of `shape`, with marks in all others.

    A NaN of the projector's own becomes infinite, so that it still spoils the output as it would in the plain model.
    """
    projected = torch.where(projected.isnan(), torch.inf, projected)
    full = projected.new_full((shape[:-1].numel(), projected.shape[-1]), torch.nan)
    full[rows.to(full.device)] = projected
    return full.view(*shape[:-1], projected.shape[-1])


def is_dropped(embeds: torch.Tensor) -> torch.Tensor:
    """(B, S) bool: which tokens of a prompt were dropped."""
    return embeds[..., 0].isnan()


def of_output(output: Any) -> torch.Tensor:
    """(tokens,) bool: the marks in what get_image_features() or get_video_features() returned, image after image."""
    features = getattr(output, "pooler_output", output)
    if isinstance(features, list | tuple):
        # Before transformers 5 Qwen3-VL returns its deepstack features beside them.
        features = torch.cat([x.flatten(0, -2) for x in (features[0] if _nested(features) else features)])
    return is_dropped(features).flatten()


def _nested(features: list[Any] | tuple[Any, ...]) -> bool:
    return isinstance(features[0], list | tuple)


def find(embeds: torch.Tensor, encoded: dict[str, tuple[list[VisualItem], torch.Tensor]]) -> torch.Tensor | None:
    """Placeholders, as `prompt.placeholders` finds them, of embeddings that a caller merged with encoded features.

    encoded: by kind, the items that the caller encoded last and the marks in their features. The marks of each item
    must stand in the prompt as they stood there. None: no mark. Reads back from the device.
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
    """Deals the items out to the rows in order, or None where they do not fit."""
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
