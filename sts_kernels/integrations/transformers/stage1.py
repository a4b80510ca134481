"""Stage 1: of the features the projector consumes, it gets the K of each image that repel each other."""

from collections.abc import Sequence

import torch

from ... import repulsion_select, repulsion_select_varlen
from ...pruning.config import STSPlan, split_evenly
from .images import VisualItem


def budgets(plan: STSPlan, item: VisualItem) -> tuple[list[torch.Tensor], list[int]]:
    """The groups of units of one image that repel each other, and how many of each stay."""
    candidates = item.candidate_units()
    item.kept = plan.keep(item.candidates)
    if plan.config.scope == "image":
        return [torch.cat(candidates)], [item.kept]
    return candidates, split_evenly(item.kept, [len(c) for c in candidates])


def select(
    features: torch.Tensor, items: Sequence[VisualItem], plan: STSPlan, saliency: torch.Tensor | None = None
) -> torch.Tensor | None:
    """Which rows of features (units of all items, C) the projector gets: ascending, or None for all of them.

    Sets each item's `kept`. saliency (units,) is needed for anchor="saliency" only. Costs one launch of the selection
    kernel and, on a GPU, small copies to the device; nothing is read back.
    """
    groups, keeps, start = [], [], 0
    for item in items:
        for units, keep in zip(*budgets(plan, item), strict=True):
            groups.append(units + start)
            keeps.append(keep)
        start += item.units
    if start != features.shape[0]:
        raise RuntimeError(f"apply_sts: expected the features of {start} patches or groups, got {features.shape[0]}")
    if sum(keeps) == sum(item.candidates for item in items):
        return None
    lengths = [len(group) for group in groups]
    everything = sum(lengths) == start
    order = torch.cat(groups).to(features.device)
    pool = features if everything else features[order]
    config = plan.config
    anchor = _anchors(config.anchor, pool, lengths, saliency if everything or saliency is None else saliency[order])
    starts = _offsets(lengths)
    if min(lengths) == max(lengths) and min(keeps) == max(keeps) > 0:
        picks = repulsion_select(pool.unflatten(0, (len(groups), lengths[0])), keeps[0], config.eps, anchor)
        picks = picks.flatten()
    else:
        cu_seqlens = _cpu([*starts, sum(lengths)], torch.int32).to(pool.device)
        cu_budgets = _cpu([*_offsets(keeps), sum(keeps)], torch.int32).to(pool.device)
        picks = repulsion_select_varlen(pool, cu_seqlens, cu_budgets, sum(keeps), config.eps, anchor)
    first = _cpu(starts).repeat_interleave(_cpu(keeps)).to(pool.device)
    return order[picks + first].sort().values


def _cpu(values: list[int], dtype: torch.dtype = torch.int64) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype, device="cpu")  # whatever the default device


def _offsets(lengths: Sequence[int]) -> list[int]:
    return [sum(lengths[:i]) for i in range(len(lengths))]


def _anchors(kind: str, pool, lengths, saliency) -> torch.Tensor | None:
    if kind == "mean":
        return None
    if kind == "first":
        return torch.zeros(len(lengths), dtype=torch.int64, device=pool.device)
    if saliency is None:
        raise RuntimeError('apply_sts: anchor="saliency" saw no attention in the vision encoder; use another anchor')
    parts = saliency.to(pool.device).split(lengths)
    return torch.stack([part.argmax() if len(part) else part.new_zeros((), dtype=torch.int64) for part in parts])
