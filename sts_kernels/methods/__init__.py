"""Visual-token pruning methods as plain tensor code. `names()` lists them; `<name>.py` defines the method `<name>`."""

import functools
import importlib
import pkgutil
from dataclasses import MISSING, fields
from typing import Any

import torch
from torch import Tensor

from .. import _checks
from . import _merge, _packed
from ._budget import split_evenly
from .base import Budget, Cut, Inside, Method, Plan, Pool, Selection, option

__all__ = [
    "Budget",
    "Cut",
    "Inside",
    "Method",
    "Plan",
    "Pool",
    "Selection",
    "create",
    "describe",
    "merge",
    "merge_packed",
    "names",
    "option",
    "split_evenly",
]


def names() -> list[str]:
    """Sorted names of all methods: the modules of this folder, except base.py and those whose name starts with _."""
    found = (module.name for module in pkgutil.iter_modules(__path__))
    return sorted(name for name in found if not name.startswith("_") and name != "base")


@functools.cache
def _class(name: str) -> type[Method]:
    module = importlib.import_module(f".{name}", __name__)
    for value in vars(module).values():
        if isinstance(value, type) and issubclass(value, Method) and vars(value).get("name") == name:
            return value
    raise TypeError(f"methods: {name}.py must define a Method whose name is {name!r}")


def _known(name: str) -> type[Method]:
    if not isinstance(name, str):
        raise TypeError(f"methods: name must be a str, got {type(name).__name__}")
    if name not in names():
        raise ValueError(f"methods: name must be one of {', '.join(names())}, got {name!r}")
    return _class(name)


def create(name: str, **options: Any) -> Method:
    """Creates the method `name`. `describe(name)` lists its options.

    Raises:
        TypeError, ValueError: unknown method, unknown option, or bad value. The message names the allowed ones.
    """
    kind = _known(name)
    allowed = [field.name for field in fields(kind)]
    for given in options:
        if given not in allowed:
            takes = f"it takes {', '.join(allowed)}" if allowed else "it takes none"
            raise TypeError(f"{name}: {given} is not an option of this method, {takes}")
    return kind(**options)


def describe(name: str) -> dict[str, Any]:
    """Metadata of a method as a dict.

    Keys: name, paper, site, signals, scope, positions, takes (`Budget` options), cuts and options. The cuts are those
    of a 32-layer LLM whose family prunes at layer 16 by default. Each option has its default and documentation.
    """
    kind = _known(name)
    cuts = kind().plan(Budget(budget=0.5), 32, 16).cuts
    return {
        "name": kind.name,
        "paper": kind.paper,
        "site": kind.site,
        "signals": sorted(kind.signals),
        "scope": kind.scope,
        "positions": kind.positions,
        "takes": list(kind.takes),
        "cuts": [{"layer": cut.layer, "queries": cut.queries, "score_from": cut.score_from} for cut in cuts],
        "options": {
            field.name: {
                "default": None if field.default is MISSING else field.default,
                "doc": field.metadata.get("doc", ""),
            }
            for field in fields(kind)
        },
    }


def _check_merge(op: str, features: Tensor, selection: Selection, ndim: int) -> None:
    if not isinstance(selection, Selection):
        raise TypeError(f"{op}: selection must be a Selection, got {type(selection).__name__}")
    _checks.features(op, features, "(B, N, C)" if ndim == 3 else "(T, C)")
    if selection.order.ndim != ndim - 1:
        raise ValueError(f"{op}: selection must have an order of {ndim - 1} dimensions, got {selection.order.ndim}")
    for name in ("assignment", "weight"):
        value = getattr(selection, name)
        if value is not None and value.shape != features.shape[:-1]:
            raise ValueError(
                f"{op}: selection.{name} must have shape {tuple(features.shape[:-1])}, got {tuple(value.shape)}"
            )
    sources = selection.sources
    if sources is not None and (sources.ndim != ndim or sources.shape[:-1] != selection.order.shape):
        raise ValueError(
            f"{op}: selection.sources must have shape (*order, M) = ({', '.join(map(str, selection.order.shape))}, M), "
            f"got {tuple(sources.shape)}"
        )
    _checks.same_device(op, "selection", selection.order, features)


def _merge_rows(op: str, features: Tensor, selection: Selection) -> Tensor:
    _checks.picks(op, "selection.order", selection.order, features.shape[1])
    if selection.assignment is None:
        return _merge.rows(features, selection.order)
    if selection.method is not None:
        return selection.method.merge(features, selection)
    return _merge.weighted_mean(features, selection.order, selection.assignment, selection.weight)


def merge(features: Tensor, selection: Selection) -> Tensor:
    """Gathers the kept rows of features (B, N, C) at selection.order and merges the assigned tokens into them.

    Returns:
        (B, k, C) in the dtype of `features`; zero rows where the order is -1. Without an assignment, rows are only
        gathered. With one, `Method.merge` computes them, by default as weighted means. Merging accumulates in float32
        or wider and is deterministic.
    """
    _check_merge("merge", features, selection, 3)
    if selection.order.shape[0] != features.shape[0]:
        raise ValueError(
            f"merge: selection must have the {features.shape[0]} items of features, got {selection.order.shape[0]}"
        )
    return _merge_rows("merge", features, selection)


def merge_packed(features: Tensor, selection: Selection, lengths: list[int], budgets: list[int]) -> Tensor:
    """`merge` of a packed selection: features (T, C) -> (sum of budgets, C), items concatenated, in pick order."""
    op = "merge_packed"
    _check_merge(op, features, selection, 2)
    _packed.check(op, (), lengths, budgets, features, None, None, None)
    starts, slots = _packed.offsets(lengths), _packed.offsets(budgets)
    if selection.order.shape[0] != slots[-1]:
        raise ValueError(
            f"{op}: selection must have {slots[-1]} picks, the sum of budgets, got {selection.order.shape[0]}"
        )
    parts: list[Any] = [None] * len(lengths)
    for (length, budget), items in _packed.groups(lengths, budgets).items():
        part = Selection(
            _packed.batch(selection.order, items, slots, budget),
            _packed.batch(selection.assignment, items, starts, length),
            _packed.batch(selection.weight, items, starts, length),
            _packed.batch(selection.sources, items, slots, budget),
            selection.method,
        )
        rows = _merge_rows(op, _packed.batch(features, items, starts, length), part)
        for i, item in enumerate(items):
            parts[item] = rows[i]
    kept = [part for part in parts if part is not None]
    return torch.cat(kept) if kept else features.new_empty((0, features.shape[1]))
