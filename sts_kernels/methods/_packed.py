"""Selections of packed items: groups of equal length and budget run as padded batches without padding."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import _checks
from ._pool import ARGUMENTS, SCORES, Pool


def host(values: Sequence[int], device, dtype: torch.dtype = torch.int64) -> Tensor:
    """Host ints on `device`, whatever the default device is. A copy to the device; nothing comes back."""
    return torch.tensor(values, dtype=dtype, device="cpu").to(device, non_blocking=True)


def offsets(lengths: Sequence[int]) -> list[int]:
    """Prefix sums: where each item starts, and where the last one ends."""
    starts = [0]
    for length in lengths:
        starts.append(starts[-1] + length)
    return starts


def check(op: str, signals, lengths, budgets, features, scores, text, keys) -> torch.device:
    """Checks the arguments of `Method.select_packed`, and returns the device of its tensors."""
    for name, values in (("lengths", lengths), ("budgets", budgets)):
        if not isinstance(values, Sequence):
            raise TypeError(f"{op}: {name} must be a list of ints, got {type(values).__name__}")
        for value in values:
            _checks.integer(op, name, value, 0)
    if len(lengths) != len(budgets):
        raise ValueError(f"{op}: budgets must have one number for each of the {len(lengths)} items, got {len(budgets)}")
    for item, (length, budget) in enumerate(zip(lengths, budgets, strict=True)):
        if budget > length:
            raise ValueError(f"{op}: budgets[{item}] must be at most {length}, the item's tokens, got {budget}")
    given = {"features": features, "scores": scores, "keys": keys, "text": text}
    shapes = {"features": "(T, C)", "scores": "(T,)", "keys": "(T, D)", "text": "(items, M, C)"}
    for signal in sorted(signals):
        name = ARGUMENTS[signal]
        if given[name] is None:
            raise ValueError(f"{op}: {name} must be a tensor of shape {shapes[name]}, got None")
    like = None
    for name, value in given.items():
        if value is None:
            continue
        dtypes = SCORES if name == "scores" else _checks.FLOATING
        _checks.tensor(op, name, value, dtypes, shapes[name], shapes[name].count(",") + (name != "scores"))
        rows, what = (len(lengths), "items") if name == "text" else (sum(lengths), "sum of lengths")
        if value.shape[0] != rows:
            raise ValueError(f"{op}: {name} must have {rows} rows, the {what}, got {tuple(value.shape)}")
        if like is not None:
            _checks.same_device(op, name, value, like[1], like[0])
        like = like or (name, value)
    return torch.device("cpu") if like is None else like[1].device


def groups(lengths: Sequence[int], budgets: Sequence[int]) -> dict[tuple[int, int], list[int]]:
    """Items by (length, budget), without those that keep nothing."""
    found: dict[tuple[int, int], list[int]] = {}
    for item, shape in enumerate(zip(lengths, budgets, strict=True)):
        if shape[1]:
            found.setdefault(shape, []).append(item)
    return found


def batch(value: Tensor | None, items: Sequence[int], starts: Sequence[int], length: int) -> Tensor | None:
    """(items, length, ...): the rows of `items` of a packed value, each from its start on."""
    return None if value is None else torch.stack([value[starts[i] : starts[i] + length] for i in items])


def select(method, lengths, budgets, features, scores, text, keys):
    """`Method.select_packed` by groups."""
    from .base import Selection

    device = check(method.name, method.signals, lengths, budgets, features, scores, text, keys)
    starts = offsets(lengths)
    parts: list = [None] * len(lengths)  # of each item: order, assignment, weight
    for (length, budget), items in groups(lengths, budgets).items():
        signals = {
            name: batch(value, items, starts, length)
            for name, value in (("features", features), ("scores", scores), ("keys", keys))
        }
        pool = Pool.sized(budget, len(items), length, device, text=batch_text(text, items), **signals)
        picked = method.selection(pool)
        for i, item in enumerate(items):
            parts[item] = [None if v is None else v[i] for v in (picked.order, picked.assignment, picked.weight)]
    nothing = ((0, torch.int64), (-1, torch.int64), (0, torch.float32))  # the rows of an item without a budget
    packed = []
    for column, (fill, dtype) in enumerate(nothing):
        if column and not any(part and part[column] is not None for part in parts):
            packed.append(None)
            continue
        rows = [torch.empty(0, dtype=dtype, device=device)]
        for length, part in zip(lengths, parts, strict=True):
            without = (length if column else 0,)
            rows.append(part[column] if part else torch.full(without, fill, dtype=dtype, device=device))
        packed.append(torch.cat(rows))
    return Selection(*packed, method)


def batch_text(text: Tensor | None, items: Sequence[int]) -> Tensor | None:
    return None if text is None else torch.stack([text[item] for item in items])
