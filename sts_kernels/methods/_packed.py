"""Selection of packed items: items of equal (length, budget) run as one batch, without padding."""

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from typing import Any, TypeVar

import torch
from torch import Tensor

from .. import _checks
from ._pool import ARGUMENTS, Pool

_constants: ContextVar[dict[Any, Tensor] | None] = ContextVar("constants", default=None)


@contextlib.contextmanager
def constants(store: dict[Any, Tensor]) -> Iterator[None]:
    """Makes `host` copy each list once and cache it in `store`, in this thread.

    A CUDA graph must not copy from the host. `store` must live as long as the graph that reads it.
    """
    token = _constants.set(store)
    try:
        yield
    finally:
        _constants.reset(token)


def host(values: Sequence[int], device: Any, dtype: torch.dtype = torch.int64) -> Tensor:
    """Copies host ints to `device`, whatever torch's default device is; cached within `constants`. No read-back."""
    key = (tuple(values), str(device), dtype)
    store = None if torch.compiler.is_compiling() else _constants.get()
    if store is None:
        return copied(*key)
    if key not in store:
        store[key] = copied(*key)
    return store[key]


def copied(values: tuple[int, ...], device: str, dtype: torch.dtype) -> Tensor:
    """The uncached copy of `host`. A compiled graph may treat the result as a constant."""
    return torch.tensor(values, dtype=dtype, device="cpu").to(device, non_blocking=True)


def offsets(lengths: Sequence[int]) -> list[int]:
    """Exclusive prefix sums with the total appended, len(lengths) + 1 values, like `cu_seqlens`."""
    return [*itertools.accumulate(lengths, initial=0)]


def check(
    op: str,
    signals: Any,
    lengths: list[int],
    budgets: list[int],
    features: Tensor | None,
    scores: Tensor | None,
    text: Tensor | None,
    keys: Tensor | None,
) -> torch.device:
    """Checks the arguments of `Method.select_packed`, and returns the device of its tensors."""
    for name, values in (("lengths", lengths), ("budgets", budgets)):
        if not isinstance(values, Sequence):
            raise TypeError(f"{op}: {name} must be a list of ints, got {type(values).__name__}")
        for number in values:
            _checks.integer(op, name, number, 0)
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
        dtypes = _checks.SCORES if name == "scores" else _checks.FLOATING
        _checks.tensor(op, name, value, dtypes, shapes[name])
        rows, what = (len(lengths), "items") if name == "text" else (sum(lengths), "sum of lengths")
        if value.shape[0] != rows:
            raise ValueError(f"{op}: {name} must have {rows} rows, the {what}, got {tuple(value.shape)}")
        if like is not None:
            _checks.same_device(op, name, value, like[1], like[0])
        like = like or (name, value)
    return torch.device("cpu") if like is None else like[1].device


def groups(lengths: Sequence[int], budgets: Sequence[int]) -> dict[tuple[int, int], list[int]]:
    """Item indices grouped by (length, budget); items of budget 0 are left out."""
    found: dict[tuple[int, int], list[int]] = {}
    for item, shape in enumerate(zip(lengths, budgets, strict=True)):
        if shape[1]:
            found.setdefault(shape, []).append(item)
    return found


Rows = TypeVar("Rows", Tensor, Tensor | None)


def batch(value: Rows, items: Sequence[int], starts: Sequence[int], length: int) -> Rows:
    """(items, length, ...): stacks value[starts[i] : starts[i] + length] for each i in `items`."""
    return None if value is None else torch.stack([value[starts[i] : starts[i] + length] for i in items])


def pools(
    device: Any,
    lengths: list[int],
    budgets: list[int],
    features: Tensor | None,
    scores: Tensor | None,
    text: Tensor | None,
    keys: Tensor | None,
) -> Iterator[tuple[list[int], Pool]]:
    """Yields the item indices and the `Pool` of each group. The arguments must be checked."""
    starts = offsets(lengths)
    for (length, budget), items in groups(lengths, budgets).items():
        signals = {
            name: batch(value, items, starts, length)
            for name, value in (("features", features), ("scores", scores), ("keys", keys))
        }
        mine = None if text is None else torch.stack([text[item] for item in items])
        yield items, Pool.sized(budget, len(items), length, device, text=mine, **signals)


OF_TOKENS = {1: -1, 2: 0}  # per-token columns (assignment, weight) -> value of a token that is dropped


def columns(selection: Any) -> tuple[Tensor | None, ...]:
    """(order, assignment, weight, sources) of a Selection."""
    return selection.order, selection.assignment, selection.weight, selection.sources


def select(
    method: Any,
    lengths: list[int],
    budgets: list[int],
    features: Tensor | None,
    scores: Tensor | None,
    text: Tensor | None,
    keys: Tensor | None,
) -> Any:
    """`Method.select_packed`, one `selection` per group."""
    from .base import Selection

    parts: list[Any] = [None] * len(lengths)  # columns of each item's Selection; None: budget 0
    device = check(method.name, method.signals, lengths, budgets, features, scores, text, keys)
    for items, pool in pools(device, lengths, budgets, features, scores, text, keys):
        picked = method.selection(pool)
        for i, item in enumerate(items):
            parts[item] = [None if v is None else v[i] for v in columns(picked)]
    if not any(parts):
        return Selection(torch.empty(0, dtype=torch.int64, device=device), method=method)
    packed: list[Tensor | None] = []
    for column, value in enumerate(next(filter(None, parts))):
        if value is None:
            packed.append(None)
            continue
        rows = []
        for length, part in zip(lengths, parts, strict=True):
            if part:
                rows.append(part[column])
            elif column in OF_TOKENS:  # an item without a budget
                rows.append(value.new_full((length,), OF_TOKENS[column]))
        packed.append(torch.cat(rows))
    order, assignment, weight, sources = packed
    assert order is not None
    return Selection(order, assignment, weight, sources, method)


def fit_budgets(
    method: Any,
    lengths: list[int],
    budgets: list[int],
    features: Tensor | None,
    scores: Tensor | None,
    text: Tensor | None,
    keys: Tensor | None,
) -> list[int]:
    """`Method.fit_budgets` of an adaptive method, one device-to-host copy in all."""
    device = check(method.name, method.signals, lengths, budgets, features, scores, text, keys)
    found, owners = [], []
    for items, pool in pools(device, lengths, budgets, features, scores, text, keys):
        found.append(method.fitted(pool))
        owners += items
    fitted = list(budgets)
    for item, count in zip(owners, torch.cat(found).tolist() if found else (), strict=True):
        fitted[item] = count
    return fitted
