"""Tensor helpers for pruning inside the LLM: compact and gather rows, build masks and positions."""

import torch


def compact(
    keep: torch.Tensor, width: int, trailing: int = 0, place: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Kept columns of each row in order, padded on the left to `width`. The last `trailing` columns are always kept.

    keep: (B, S) bool, at most `width` True per row -> columns (B, width) int64, kept (B, width) bool. Pad slots hold
    dropped columns. place: (B, S) int64, at least 0; the kept columns are then in ascending order of place.
    """
    if trailing:
        column = torch.arange(keep.shape[1], device=keep.device)
        keep = keep | (column >= keep.shape[1] - trailing)
    rank = keep.to(torch.int8) if place is None else torch.where(keep, place, -1)
    columns = torch.argsort(rank, dim=1, stable=True)[:, keep.shape[1] - width :]
    return columns, keep.gather(1, columns)


def compact_right(keep: torch.Tensor, width: int, place: torch.Tensor | None = None) -> torch.Tensor:
    """`compact` with padding on the right -> columns (B, width) only. The kept columns of a row come first."""
    last = keep.shape[1] * (keep.shape[1] + 1)  # larger than every place that a cut gives
    rank = (~keep).to(torch.int8) if place is None else torch.where(keep, place, last)
    return torch.argsort(rank, dim=1, stable=True)[:, :width]


def take(x: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """x (B, S, ...) -> (B, P, ...) at columns (B, P)."""
    index = columns.to(x.device).reshape(columns.shape + (1,) * (x.ndim - 2))
    return x.gather(1, index.expand(columns.shape + x.shape[2:]))


def take_positions(positions: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Like `take` for rotary positions (..., B, S), whose leading axes are those of mrope."""
    columns = columns.to(positions.device)
    return positions.gather(-1, columns.expand(positions.shape[:-1] + columns.shape[-1:]))


def take_rotary(table: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Like `take` for a cos or sin table (B or 1, S, D), or (3, B, S, D) before mrope's axes are merged."""
    if table.ndim == 4:
        return torch.stack([take(axis, columns) for axis in table])
    return take(table.expand(columns.shape[0], -1, -1), columns)


def attention_mask(
    attention: str, valid: torch.Tensor | None, queries: int, past: int, like: torch.Tensor, slots: int | None = None
) -> torch.Tensor | None:
    """Causal mask in the form that attention layers of this implementation take. Nothing is read back to the host.

    The library gives all layers one mask, but the segments of a pruned prompt have different cache lengths.

    valid: (B, past + queries) bool, True at tokens. None: all are tokens.
    slots: key slots of a static cache, filled or not.

    Returns:
        None where the kernel needs no mask; (B, keys) for FlashAttention; (B or 1, 1, queries, keys) bool for SDPA, the
        same shape and additive for eager.
    """
    if "flash" in attention:
        return valid
    if slots is None and valid is None and (queries == 1 or (past == 0 and attention == "sdpa")):
        return None
    key = torch.arange(slots or past + queries, device=like.device)
    query = key[past : past + queries, None]
    allowed = (key <= query)[None, None]
    if valid is not None:
        valid = torch.nn.functional.pad(valid, (0, len(key) - valid.shape[1]))
        # A pad slot attends to itself: a row without any key would be NaN in some kernels.
        allowed = (allowed & valid.to(like.device)[:, None, None, :]) | (key == query)
    if attention == "sdpa":
        return allowed
    return torch.zeros(allowed.shape, dtype=like.dtype, device=like.device).masked_fill(
        ~allowed, torch.finfo(like.dtype).min
    )


def contiguous_positions(valid: torch.Tensor, end: torch.Tensor) -> torch.Tensor:
    """(B, P) int64: tokens numbered without gaps, the last token of row b as end[b]. Pad slots: arbitrary, at least 0.

    Rotary attention depends on position differences only, so the start does not matter. The end is that of the full
    prompt, so the caller's positions of later tokens are right in every segment.
    """
    number = valid.long().cumsum(1)
    return (end.to(valid.device)[:, None] - number[:, -1:] + number).clamp(min=0)


def last_column(marked: torch.Tensor) -> torch.Tensor:
    """(B, 1) int64: the last marked column of each row; -1: none."""
    return torch.where(marked, torch.arange(marked.shape[1], device=marked.device), -1).amax(1, keepdim=True)


def last_positions(valid: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """(B,) int64: the position of each row's last token."""
    return positions.gather(1, last_column(valid).clamp(min=0).to(positions.device))[:, 0]


def behind(marked: torch.Tensor, trailing: int) -> torch.Tensor:
    """(B, P) bool: columns after the last marked column of a row, without the last `trailing` columns."""
    column = torch.arange(marked.shape[1], device=marked.device)
    return (column > last_column(marked)) & (column < len(column) - trailing)
