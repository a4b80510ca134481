"""Where the visual tokens of a batch of prompts are, and which images they belong to."""

import itertools
from dataclasses import dataclass, field

import torch

from ...methods import Plan
from . import masks
from .untyped import Config, Model
from .visual_item import VisualItem

KINDS = ("image", "video")


def token_ids(config: Config) -> dict[str, int]:
    """Placeholder ids by kind: `<kind>_token_id` or `<kind>_token_index` of the configuration."""
    ids = {}
    for kind in KINDS:
        for name in (f"{kind}_token_id", f"{kind}_token_index"):
            if getattr(config, name, None) is not None:
                ids[kind] = int(getattr(config, name))
                break
    return ids


def placeholders(
    base: Model, ids: dict[str, int], input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None
) -> torch.Tensor | None:
    """Modality ids (B, S) int8: 0 for text, 1 + index in KINDS for a placeholder.

    Without ids, embeddings are compared with that of the placeholder, as the model does.
    """
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
    rows = (input_ids == token).tolist()
    return [len(list(run)) for row in rows for hit, run in itertools.groupby(row) if hit]


@dataclass
class Row:
    """One prompt of the batch."""

    items: list[VisualItem]  # images first, then clips
    length: int  # tokens of the prompt, without padding and trailing columns
    tail: int = 0  # tokens after the prompt
    text: int = 0  # text tokens after the last image, up to the end of the prompt
    left: list[int] = field(default_factory=list)  # visual tokens after each cut of the plan, without separators
    recycled: list[int] = field(default_factory=list)  # tokens among `left` that are merged from dropped ones

    @property
    def num_visual(self) -> int:
        return sum(item.num_visual for item in self.items)

    @property
    def num_kept(self) -> int:
        return sum(item.kept for item in self.items)


def read_rows(
    modality: torch.Tensor,
    valid: torch.Tensor | None,
    dropped: torch.Tensor | None,
    trailing: int,
    items: dict[str, list[VisualItem]],
    plan: Plan,
) -> list[Row]:
    """Assigns the encoded images to the prompts, by their numbers of placeholders. One read-back from the device.

    Rows that generate() repeated for beams or several answers share the images of their prompt.

    Args:
        valid, dropped: (B, S) bool: tokens that are not padding (None: all), tokens marked as dropped (None: no marks).
        trailing: columns after the prompt.

    Raises:
        RuntimeError: placeholders or marks do not match the images encoded last under this pruning.
        ValueError: a visual token is masked or follows the prompt, or a cut needs text after the last image.
    """
    tokens = valid if valid is not None else torch.ones_like(modality, dtype=torch.bool)
    visual, end = modality > 0, modality.shape[1] - trailing
    text = tokens & masks.behind(visual, trailing)
    found = [tokens[:, :end], tokens[:, end:], text, visual & tokens, visual[:, end:]]
    found.append(torch.zeros_like(tokens) if dropped is None else dropped & tokens)
    found += [modality == 1 + index for index in range(len(KINDS))]
    lengths, tails, texts, seen, late, marks, *kinds = torch.stack([x.sum(1) for x in found]).tolist()
    rows = [Row([], *counts) for counts in zip(lengths, tails, texts, strict=True)]
    for kind, wanted in zip(KINDS, kinds, strict=True):
        if sum(wanted):
            _assign(kind, wanted, items.get(kind, []), rows)
    for index, row in enumerate(rows):
        placeholders = sum(item.num_tokens for item in row.items)
        if seen[index] != placeholders:
            raise ValueError(
                f"sts_kernels: attention_mask must be 1 at every visual token, row {index} has {seen[index]} of "
                f"{placeholders}"
            )
        if late[index]:
            raise ValueError(
                f"sts_kernels: prompt_length must lie behind the last visual token, row {index} has {late[index]} "
                "visual tokens that follow its prompt"
            )
        if dropped is not None and marks[index] != row.num_visual - row.num_kept:
            raise RuntimeError(
                f"sts_kernels: the features of row {index} have {marks[index]} dropped tokens where this pruning drops "
                f"{row.num_visual - row.num_kept}; they are NaN, or they were encoded without it or with other "
                "options: encode them again, or pass pixel values"
            )
    for index, row in enumerate(rows):
        left, images = row.num_kept, [item.num_visual for item in row.items]
        for cut in plan.cuts:
            before, left = left, min(left, cut.keep(images))
            row.left.append(left)
            row.recycled.append(cut.recycled(images) if cut.recycled and left < before else 0)
            if left < before and cut.queries != "last" and not row.text:
                raise ValueError(
                    f"sts_kernels: this method goes by the text behind the last image, and row {index} has none; put "
                    "the image before the question"
                )
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
            f"{[item.num_tokens for item in items]} tokens; encode and run one batch at a time, under this pruning"
        )


def texts(
    base: Model,
    ids: dict[str, int],
    kind: str,
    input_ids: torch.Tensor | None,
    mask: torch.Tensor | None,
    items: list[VisualItem],
) -> list[torch.Tensor]:
    """For each item, the embeddings (M, C) of its prompt's text tokens. Reads back from the device."""
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
    first: dict[int, int] = {}
    for index, row in enumerate(rows):
        for item in row.items:
            first.setdefault(id(item), index)
    embedding = base.get_input_embeddings()
    by_row = {index: embedding(input_ids[index][text[index]]).detach() for index in set(first.values())}
    return [by_row[first[id(item)]] for item in items]


def separators(modality: torch.Tensor, rows: list[Row]) -> torch.Tensor | None:
    """(B, S) bool: placeholders that stand for no feature, such as newlines. None: there are none."""
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
