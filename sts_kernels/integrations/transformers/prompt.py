"""Where the visual tokens of a batch of prompts are, and which images they belong to."""

from dataclasses import dataclass, field

import torch

from ...methods import Plan
from .visual_item import VisualItem

KINDS = ("image", "video")


def token_ids(config) -> dict[str, int]:
    """Placeholder ids by kind, under whichever name the configuration has them."""
    ids = {}
    for kind in KINDS:
        for name in (f"{kind}_token_id", f"{kind}_token_index"):
            if getattr(config, name, None) is not None:
                ids[kind] = int(getattr(config, name))
                break
    return ids


def placeholders(base, ids: dict[str, int], input_ids, inputs_embeds) -> torch.Tensor | None:
    """Modality ids (B, S) int8: 0 for text, 1 + index in KINDS for a placeholder. Embeddings are compared, as the model
    does."""
    source = input_ids if input_ids is not None else inputs_embeds
    if source is None:
        return None
    modality = torch.zeros(source.shape[:2], dtype=torch.int8, device=source.device)
    for kind, token in ids.items():
        if input_ids is not None:
            hit = input_ids == token
        else:
            embedding = base.get_input_embeddings()
            hit = (inputs_embeds == embedding(torch.full((), token, dtype=torch.long, device=source.device))).all(-1)
        modality.masked_fill_(hit, 1 + KINDS.index(kind))
    return modality


def runs(input_ids: torch.Tensor | None, token: int) -> list[int]:
    """Lengths of the runs of `token`, row after row."""
    if input_ids is None:
        return []
    lengths = []
    for row in (input_ids == token).tolist():
        length = 0
        for hit in [*row, False]:
            if hit:
                length += 1
            elif length:
                lengths.append(length)
                length = 0
    return lengths


@dataclass
class Row:
    """One prompt of the batch."""

    items: list[VisualItem]  # images first, then clips
    length: int  # tokens, padding not counted
    left: list[int] = field(default_factory=list)  # visual tokens after each cut of the plan, separators not counted

    @property
    def num_visual(self) -> int:
        return sum(item.num_visual for item in self.items)

    @property
    def num_kept(self) -> int:
        return sum(item.kept for item in self.items)


def read_rows(
    modality: torch.Tensor, valid: torch.Tensor | None, items: dict[str, list[VisualItem]], plan: Plan
) -> list[Row]:
    """Assigns the encoded images to the prompts, by their numbers of placeholders. The one read-back of a prompt.

    Rows that generate() repeated for beams or several answers share the images of the prompt they repeat.
    """
    tokens = valid if valid is not None else torch.ones_like(modality, dtype=torch.bool)
    counts = torch.stack([tokens.sum(1), *((modality == 1 + index).sum(1) for index in range(len(KINDS)))]).tolist()
    rows = [Row([], length) for length in counts[0]]
    for kind, wanted in zip(KINDS, counts[1:], strict=True):
        if sum(wanted):
            _assign(kind, wanted, items.get(kind, []), rows)
    for row in rows:
        left = row.num_kept
        for cut in plan.cuts:
            left = min(left, cut.keep([item.num_visual for item in row.items]))
            row.left.append(left)
    return rows


def _assign(kind: str, wanted: list[int], items: list[VisualItem], rows: list[Row]) -> None:
    total = sum(item.num_tokens for item in items)
    repeats = sum(wanted) // total if total else 0
    queue, fits = iter(items), bool(repeats) and repeats * total == sum(wanted) and len(rows) % repeats == 0
    for start in range(0, len(rows), repeats or 1) if fits else ():
        missing, mine = wanted[start], []
        while missing > 0 and (item := next(queue, None)) is not None:
            mine.append(item)
            missing -= item.num_tokens
        fits = fits and missing == 0 and len(set(wanted[start : start + repeats])) == 1
        for row in rows[start : start + repeats]:
            row.items += mine
    if not fits:
        raise RuntimeError(
            f"sts_kernels: the prompts have {wanted} {kind} placeholders, but the {kind}s encoded last have "
            f"{[item.num_tokens for item in items]} tokens; encode and run one batch at a time"
        )


def texts(
    base, ids: dict[str, int], kind: str, input_ids: torch.Tensor | None, mask: torch.Tensor | None, items
) -> list[torch.Tensor]:
    """Of each item, the embeddings (M, C) of the text tokens of its prompt. Reads back from the device."""
    if input_ids is None or (mask is not None and mask.shape != input_ids.shape):
        raise NotImplementedError(
            "sts_kernels: this method looks at the text of the prompt, and images are encoded without the prompt's ids "
            "here; pass ids and pixel values to the model together"
        )
    text = torch.ones_like(input_ids, dtype=torch.bool) if mask is None else mask.bool()
    for token in ids.values():
        text = text & (input_ids != token)
    rows = [Row([], 0) for _ in input_ids]
    _assign(kind, (input_ids == ids[kind]).sum(1).tolist(), items, rows)
    first = {}
    for index, row in enumerate(rows):
        for item in row.items:
            first.setdefault(id(item), index)
    embedding = base.get_input_embeddings()
    by_row = {index: embedding(input_ids[index][text[index]]).detach() for index in set(first.values())}
    return [by_row[first[id(item)]] for item in items]


def separators(modality: torch.Tensor, rows: list[Row]) -> torch.Tensor | None:
    """(B, S) bool: placeholders that stand for no piece of an image, as newlines. None: there are none."""
    if not any(item.num_visual != item.num_tokens for row in rows for item in row.items):
        return None
    mask = torch.zeros_like(modality, dtype=torch.bool)
    for index, kind in enumerate(KINDS):
        flags = [
            torch.zeros(item.num_tokens, dtype=torch.bool, device="cpu")
            if item.feature_of_token is None
            else item.feature_of_token < 0
            for row in rows
            for item in row.items
            if item.kind == kind
        ]
        if flags:
            mask = mask.masked_scatter(modality == 1 + index, torch.cat(flags).to(modality.device))
    return mask
