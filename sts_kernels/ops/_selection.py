"""Shared by the greedy selection ops: argument checks, packed items, and the loop of the references."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import _checks
from .._transforms import stack_offsets
from ._unit_rows import unit_rows

# Potential of a token with a NaN or infinity: it is picked only when no finite token is left. Potentials of finite
# tokens are far below. A picked token holds +inf.
LAST_RESORT = torch.finfo(torch.float32).max


# ---- Checks ------------------------------------------------------------------------------------------------------


def check_padded(
    op: str, features: torch.Tensor, k: int, anchor: torch.Tensor | None = None, num_tokens: torch.Tensor | None = None
) -> None:
    _checks.features(op, features)
    batch, tokens, _ = features.shape
    _checks.integer(op, "k", k, 1, tokens, " (the number of tokens)")
    if anchor is not None:
        _checks.index_vector(op, "anchor", anchor, batch, "(B,)", features)
    if num_tokens is not None:
        _checks.index_vector(op, "num_tokens", num_tokens, batch, "(B,)", features)


def check_padded_values(
    op: str, features: torch.Tensor, anchor: torch.Tensor | None = None, num_tokens: torch.Tensor | None = None
) -> None:
    tokens, counts = features.shape[1], None
    if num_tokens is not None:
        _checks.counts(op, "num_tokens", num_tokens, tokens, "tokens")
        if not _checks.values_readable(num_tokens):
            return
        counts = num_tokens.tolist()
    if anchor is not None and _checks.values_readable(anchor):
        for item, value in enumerate(anchor.tolist()):
            count = tokens if counts is None else counts[item]
            if count and not 0 <= value < count:
                raise ValueError(f"{op}: anchor[{item}] must be between 0 and {count - 1}, got {value}")


def check_packed(
    op: str,
    features: torch.Tensor,
    cu_seqlens: torch.Tensor,
    cu_budgets: torch.Tensor,
    total_k: int,
    anchor: torch.Tensor | None = None,
    max_seqlen: int | None = None,
) -> None:
    _checks.features(op, features, "(T, C)", least_tokens=0)
    _checks.tensor(op, "cu_seqlens", cu_seqlens, _checks.INTEGER, "(B+1,)")
    items = cu_seqlens.shape[0] - 1
    if items < 0:
        raise ValueError(
            f"{op}: cu_seqlens must have shape (B+1,), so at least one element, got {tuple(cu_seqlens.shape)}"
        )
    _checks.same_device(op, "cu_seqlens", cu_seqlens, features)
    _checks.index_vector(op, "cu_budgets", cu_budgets, items + 1, "(B+1,)", features)
    _checks.integer(op, "total_k", total_k, 0, features.shape[0], " (the number of tokens)")
    if anchor is not None:
        _checks.index_vector(op, "anchor", anchor, items, "(B,)", features)
    if max_seqlen is not None:
        _checks.integer(op, "max_seqlen", max_seqlen, 1 if features.shape[0] else 0)


def _check_offsets(op: str, name: str, values: Any, total: Any, what: str) -> None:
    if values[0] != 0 or values[-1] != total or any(b < a for a, b in itertools.pairwise(values)):
        raise ValueError(f"{op}: {name} must rise from 0 to {total}, {what}, got {values}")


def check_packed_values(
    op: str,
    features: torch.Tensor,
    cu_seqlens: torch.Tensor,
    cu_budgets: torch.Tensor,
    total_k: int,
    anchor: torch.Tensor | None = None,
    max_seqlen: int | None = None,
) -> None:
    if not all(_checks.values_readable(v) for v in (cu_seqlens, cu_budgets, anchor) if v is not None):
        return
    starts, budgets = cu_seqlens.tolist(), cu_budgets.tolist()
    _check_offsets(op, "cu_seqlens", starts, features.shape[0], "the number of tokens")
    _check_offsets(op, "cu_budgets", budgets, total_k, "total_k")
    anchors = [0] * (len(starts) - 1) if anchor is None else anchor.tolist()
    for item, first in enumerate(anchors):
        count, budget = starts[item + 1] - starts[item], budgets[item + 1] - budgets[item]
        if max_seqlen is not None and count > max_seqlen:
            raise ValueError(f"{op}: max_seqlen must be at least the {count} tokens of item {item}, got {max_seqlen}")
        if budget > count:
            raise ValueError(f"{op}: cu_budgets must give item {item} at most its {count} tokens, got {budget}")
        if budget and not 0 <= first < count:
            raise ValueError(f"{op}: anchor[{item}] must be between 0 and {count - 1}, got {first}")


def check_token_values(op: str, name: str, value: Any, dtypes: tuple[Any, ...], features: torch.Tensor) -> None:
    """Checks one number per token: (B, N), or (T,) for packed features."""
    _checks.per_token(op, name, value, dtypes, features, "(B, N)" if features.ndim == 3 else "(T,)")


# ---- Packed items ------------------------------------------------------------------------------------------------


def vmap_packed(
    check_values: Callable[..., Any],
    call: Callable[..., Any],
    tokens: list[Any],
    cu_seqlens: torch.Tensor,
    cu_budgets: torch.Tensor,
    total_k: int,
    anchor: torch.Tensor | None = None,
) -> Any:
    """vmap rule of a packed op: one call for the items of all lanes.

    Args:
        check_values: checks one lane's (features, cu_seqlens, cu_budgets, total_k, anchor).
        call: (tokens, cu_seqlens, cu_budgets, total_k, anchor) -> (total_k,).
        tokens: features (lanes, T, C), then tensors (lanes, T) or None.
    """
    lanes, length = tokens[0].shape[:2]
    if lanes == 0:
        return tokens[0].new_empty((0, total_k), dtype=torch.int64)
    for lane in range(lanes):
        first = None if anchor is None else anchor[lane]
        check_values(tokens[0][lane], cu_seqlens[lane], cu_budgets[lane], total_k, first)
    if anchor is not None:
        anchor = torch.nn.functional.pad(anchor, (0, 1)).flatten()[:-1]  # one per item between lanes
    packed = stack_offsets(cu_seqlens, length), stack_offsets(cu_budgets, total_k)
    flat = [None if value is None else value.flatten(0, 1) for value in tokens]
    return call(flat, *packed, total_k * lanes, anchor).unflatten(0, (lanes, total_k))


def by_item(
    select: Callable[..., Any],
    tokens: list[Any],
    cu_seqlens: torch.Tensor,
    cu_budgets: torch.Tensor,
    total_k: int,
    anchor: torch.Tensor | None = None,
) -> Tensor:
    """Calls `select(tokens, budget, anchor)` for each packed item, as a batch of one -> (total_k,).

    For the references: the offsets are read back to the host. The compiled kernels do not.
    """
    starts, budgets = cu_seqlens.tolist(), cu_budgets.tolist()
    out = tokens[0].new_empty((total_k,), dtype=torch.int64)
    for item in range(len(starts) - 1):
        budget = budgets[item + 1] - budgets[item]
        if budget:
            own = [None if v is None else v[None, starts[item] : starts[item + 1]] for v in tokens]
            first = None if anchor is None else anchor[item : item + 1]
            out[budgets[item] : budgets[item + 1]] = select(own, budget, first)[0]
    return out


# ---- The plain loop ----------------------------------------------------------------------------------------------


def pick(potential: Tensor) -> Tensor:
    """(B,): argmin of the potential (B, N), lowest index among ties; -1 if every token is picked."""
    token = potential.argmin(-1)
    taken = potential.gather(-1, token[:, None])[:, 0] == math.inf
    return torch.where(taken, -1, token)


def counts(features: Tensor, num_tokens: Tensor | None) -> Tensor:
    """(B,) tokens of each item; 0 if num_tokens[b] is out of range."""
    batch, tokens, _ = features.shape
    if num_tokens is None:
        return torch.full((batch,), tokens, device=features.device)
    count = num_tokens.long()
    return torch.where((count >= 0) & (count <= tokens), count, 0)


def greedy(x: Tensor, k: int, count: Tensor, potential: Tensor, token: Tensor, add: Callable[..., Any]) -> Tensor:
    """Greedy selection -> (B, k) int64: first `token` (B,), then argmins of the potential, lowest index among ties.

    Args:
        x: (B, N, C) float32, contiguous, so that equal tokens are summed in the same order and tie.
        count: (B,) tokens of each item. An item whose first token is out of range comes out as -1 throughout.
        potential: (B, N) float32, before the first pick.
        add: (potential, sqdist to the picks (B, N), picks (B, 1)) -> the potential after them.
    """
    batch, tokens, channels = x.shape
    position = torch.arange(tokens, device=x.device)
    token = torch.where((token >= 0) & (token < count), token, -1)
    potential = potential.masked_fill((position >= count[:, None]) | (token < 0)[:, None], math.inf)
    # Filled in place: small tensors that stay between freed large tensors would fragment the heap.
    out = x.new_empty((batch, k), dtype=torch.int64)
    for step in range(k):
        out[:, step] = token
        row = token.clamp(min=0)[:, None]
        centre = x.gather(1, row[..., None].expand(-1, 1, channels))
        potential = add(potential, (x - centre).square_().sum(-1), row)
        potential.masked_fill_(position == row, math.inf)
        token = pick(potential)
    return out


# ---- Unit rows ---------------------------------------------------------------------------------------------------


def unit_or_zero(x: Tensor) -> tuple[Tensor, Tensor]:
    """`unit_rows` of x (..., C), and (...) bool: zero rows. A row with a NaN or infinity becomes NaN."""
    largest = x.abs().amax(-1, keepdim=True)
    return torch.where(largest.isfinite(), unit_rows(x), math.nan), largest[..., 0] == 0


def unit_sqdist(sqdist: Tensor, zero: Tensor, row: Tensor) -> Tensor:
    """2 - 2 cosine (B, N) of all tokens and the picks `row` (B, 1), from the squared distances of unit rows. A zero row
    has cosine 0 to every token."""
    return torch.where((zero | zero.gather(1, row)) & ~sqdist.isnan(), 2.0, sqdist)
