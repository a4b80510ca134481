"""Pruning before the LLM: which features of each image become tokens, and what is merged into them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ... import methods
from ...methods import Method, Plan, Selection, _packed, split_evenly
from ...methods._packed import host, offsets
from .visual_item import VisualItem


@dataclass(frozen=True)
class Kept:
    rows: torch.Tensor  # indices of the kept features, ascending
    values: torch.Tensor | None = None  # merged features at these rows; None: the features themselves
    counts: list[int] | None = None  # kept tokens per item, where they depend on data; None: as planned


def with_budgets(items: Sequence[VisualItem], plan: Plan) -> list[VisualItem]:
    return [replace(item, kept=plan.keep(item.num_visual)) for item in items]


@dataclass(frozen=True)
class Pools:
    """Packed candidates. A pool is the unit of one selection: an image or a crop. Tables are on the features'
    device."""

    lengths: list[int]
    budgets: list[int]
    owners: list[int]  # the item of each pool
    rows: torch.Tensor  # indices of features, pool after pool
    first: torch.Tensor  # (sum of budgets,): start in `rows` of the pool of each pick

    @staticmethod
    def of(items: Sequence[VisualItem], scope: str, device: torch.device) -> "Pools | None":
        """None: all tokens stay."""
        if all(item.kept == item.num_visual for item in items):
            return None
        pools, budgets, owners = [], [], []
        starts = offsets([item.num_features for item in items])[:-1]
        for index, (item, start) in enumerate(zip(items, starts, strict=True)):
            crops = item.candidates()
            mine = [item.kept] if scope == "image" else split_evenly(item.kept, [len(crop) for crop in crops])
            pools += [pool + start for pool in ([torch.cat(crops)] if scope == "image" else crops)]
            budgets += mine
            owners += [index] * len(mine)
        lengths = [len(pool) for pool in pools]
        return Pools(lengths, budgets, owners, torch.cat(pools).to(device), _first(lengths, budgets, device))

    def with_budgets(self, budgets: list[int]) -> "Pools":
        return replace(self, budgets=budgets, first=_first(self.lengths, budgets, self.rows.device))


def _first(lengths: list[int], budgets: list[int], device: torch.device) -> torch.Tensor:
    return host(offsets(lengths)[:-1], "cpu").repeat_interleave(host(budgets, "cpu")).to(device)


def select(
    method: Method,
    scope: str,
    features: torch.Tensor,
    items: Sequence[VisualItem],
    attention: torch.Tensor | None = None,
    keys: torch.Tensor | None = None,
    texts: list[torch.Tensor] | None = None,
) -> Kept | None:
    """Selects the features that become tokens. None: all of them, unchanged.

    features: (features of all items, C).
    attention (features,), keys (features, D), texts (for each item, (M, C)): where the method asks for them.

    Cost: one call of the method's kernel (one for each length of text) and, on a GPU, small copies to the device. The
    integration reads nothing back, except the numbers of tokens of an `adaptive` method. A method that `synchronises`
    waits for the device.
    """
    if sum(item.num_features for item in items) != features.shape[0]:
        raise RuntimeError(
            f"sts_kernels: expected the features of {sum(item.num_features for item in items)} patches or groups, got "
            f"{features.shape[0]}"
        )
    pools = Pools.of(items, scope, features.device)
    if pools is None:
        return None
    counts = None
    if method.adaptive:
        signals = _pooled(pools, features, attention, keys)
        pools = pools.with_budgets(method.fit_budgets(pools.lengths, pools.budgets, **signals))
        of_pool = list(zip(pools.budgets, pools.owners, strict=True))
        counts = [sum(n for n, owner in of_pool if owner == i) for i in range(len(items))]
    texts = None if texts is None else [texts[owner] for owner in pools.owners]
    return replace(select_from(method, pools, features, attention, keys, texts), counts=counts)


def select_from(
    method: Method,
    pools: Pools,
    features: torch.Tensor,
    attention: torch.Tensor | None = None,
    keys: torch.Tensor | None = None,
    texts: list[torch.Tensor] | None = None,
) -> Kept:
    """`select` with the budgets of `pools`. texts: one for each pool."""
    signals = _pooled(pools, features, attention, keys)
    if texts is None:
        picked = method.select_packed(pools.lengths, pools.budgets, **signals)
    else:
        picked = _beside_text(method, pools.lengths, pools.budgets, signals, texts)
    rows, ascending = pools.rows[picked.order + pools.first].sort()
    if picked.assignment is None:
        return Kept(rows)
    pool = signals["features"]
    assert pool is not None  # made of `features`
    merged = methods.merge_packed(pool, picked, pools.lengths, pools.budgets)
    return Kept(rows, merged[ascending])


def _pooled(
    pools: Pools, features: torch.Tensor, attention: torch.Tensor | None, keys: torch.Tensor | None
) -> dict[str, torch.Tensor | None]:
    """Signals with a row for each of `pools.rows`."""
    signals = {"features": features, "scores": attention, "keys": keys}
    everything = len(pools.rows) == features.shape[0]
    moved = {name: None if x is None else x.to(features.device) for name, x in signals.items()}
    return {name: x if x is None or everything else x[pools.rows] for name, x in moved.items()}


def _beside_text(
    method: Method,
    lengths: list[int],
    budgets: list[int],
    signals: dict[str, torch.Tensor | None],
    texts: list[torch.Tensor],
) -> Selection:
    """`select_packed` of pools with one text each: one call for each length of text."""
    parts: list[Any] = [None] * len(lengths)  # for each pool: the columns of a Selection
    for size in sorted({len(text) for text in texts}):
        mine = [i for i, text in enumerate(texts) if len(text) == size]
        given = {
            name: None if x is None else torch.cat([x.split(lengths)[i] for i in mine]) for name, x in signals.items()
        }
        sizes, counts = [lengths[i] for i in mine], [budgets[i] for i in mine]
        picked = method.select_packed(sizes, counts, **given, text=torch.stack([texts[i] for i in mine]))
        whole = zip(_packed.columns(picked), (counts, sizes, sizes, counts), strict=True)
        columns: list[Sequence[torch.Tensor | None]] = [
            [None] * len(mine) if x is None else x.split(n) for x, n in whole
        ]
        for index, part in zip(mine, zip(*columns, strict=True), strict=True):
            parts[index] = part
    order, assignment, weight, sources = (
        None if column[0] is None else torch.cat(column) for column in zip(*parts, strict=True)
    )
    assert order is not None
    return Selection(order, assignment, weight, sources, method)
