"""Where the visual tokens of a batch of prompts are, and which images they belong to."""

from dataclasses import dataclass

import torch

from ...pruning.config import STSPlan
from .images import VisualItem

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
    """(B, S) int8: 0 for text, 1 + index in KINDS for a placeholder. Embeddings are compared, as the model does."""
    source = input_ids if input_ids is not None else inputs_embeds
    if source is None:
        return None
    found = torch.zeros(source.shape[:2], dtype=torch.int8, device=source.device)
    for kind, token in ids.items():
        if input_ids is not None:
            hit = input_ids == token
        else:
            embedding = base.get_input_embeddings()
            hit = (inputs_embeds == embedding(torch.full((), token, dtype=torch.long, device=source.device))).all(-1)
        found.masked_fill_(hit, 1 + KINDS.index(kind))
    return found


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

    images: list[VisualItem]  # images first, then clips
    length: int  # tokens, padding not counted
    after: int = 0  # visual tokens that stage 2 leaves, structure not counted

    @property
    def before(self) -> int:
        return sum(item.candidates for item in self.images)

    @property
    def kept(self) -> int:
        return sum(item.kept for item in self.images)


def read_rows(
    found: torch.Tensor, valid: torch.Tensor | None, items: dict[str, list[VisualItem]], plan: STSPlan
) -> list[Row]:
    """Deals the encoded images out to the prompts, by their numbers of placeholders. The one read-back of a prompt.

    Rows that generate() repeated for beams or several answers share the images of the prompt they repeat.
    """
    tokens = valid if valid is not None else torch.ones_like(found, dtype=torch.bool)
    counts = torch.stack([tokens.sum(1), *((found == 1 + index).sum(1) for index in range(len(KINDS)))]).tolist()
    rows = [Row([], length) for length in counts[0]]
    for kind, wanted in zip(KINDS, counts[1:], strict=True):
        if sum(wanted):
            _deal(kind, wanted, items.get(kind, []), rows)
    for row in rows:
        row.after = plan.keep_after([item.candidates for item in row.images])
    return rows


def _deal(kind: str, wanted: list[int], items: list[VisualItem], rows: list[Row]) -> None:
    total = sum(item.tokens for item in items)
    repeats = sum(wanted) // total if total else 0
    queue, fits = iter(items), bool(repeats) and repeats * total == sum(wanted) and len(rows) % repeats == 0
    for start in range(0, len(rows), repeats or 1) if fits else ():
        missing, mine = wanted[start], []
        while missing > 0 and (item := next(queue, None)) is not None:
            mine.append(item)
            missing -= item.tokens
        fits = fits and missing == 0 and len(set(wanted[start : start + repeats])) == 1
        for row in rows[start : start + repeats]:
            row.images += mine
    if not fits:
        raise RuntimeError(
            f"apply_sts: the prompts have {wanted} {kind} placeholders, but the {kind}s encoded last have "
            f"{[item.tokens for item in items]} tokens; encode and run one batch at a time"
        )


def structure(found: torch.Tensor, rows: list[Row]) -> torch.Tensor | None:
    """(B, S) bool: placeholders that stand for structure, not for a piece of an image. None: there are none."""
    if not any(item.candidates != item.tokens for row in rows for item in row.images):
        return None
    mask = torch.zeros_like(found, dtype=torch.bool)
    for index, kind in enumerate(KINDS):
        flags = [
            torch.zeros(item.tokens, dtype=torch.bool, device="cpu")
            if item.unit_of_token is None
            else item.unit_of_token < 0
            for row in rows
            for item in row.images
            if item.kind == kind
        ]
        if flags:
            mask = mask.masked_scatter(found == 1 + index, torch.cat(flags).to(found.device))
    return mask
