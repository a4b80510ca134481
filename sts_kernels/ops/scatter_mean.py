"""Weighted means of the tokens assigned to each slot."""

from typing import Any

import torch

from .. import _checks
from .._registry import define_op, ops
from .._transforms import Derivative, fold

MOST_SLOTS = 2**31 - 1  # also in csrc/common/scatter_glue.h


def _check(features: torch.Tensor, assignment: torch.Tensor, count: int, weight: torch.Tensor | None) -> None:
    op = "scatter_mean"
    _checks.features(op, features)
    _checks.per_token(op, "assignment", assignment, _checks.INTEGER, features)
    _checks.integer(op, "count", count, 1, MOST_SLOTS)
    if weight is not None:
        _checks.per_token(op, "weight", weight, _checks.FLOATING, features)


def _check_values(assignment: torch.Tensor, count: int) -> None:
    if not _checks.values_readable(assignment):
        return
    wrong = ((assignment < -1) | (assignment >= count)).nonzero()
    if len(wrong):
        item, token = wrong[0].tolist()
        raise ValueError(
            f"scatter_mean: assignment[{item}, {token}] must be between -1 and {count - 1}, "
            f"got {assignment[item, token].item()}"
        )


def _fake(
    features: torch.Tensor, assignment: torch.Tensor, count: int, weight: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    _check(features, assignment, count, weight)
    batch, _, channels = features.shape
    return features.new_empty((batch, count, channels)), features.new_empty((batch, count), dtype=torch.float32)


def _members(
    features: torch.Tensor, assignment: torch.Tensor, count: int, weight: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x (B, N, C) and weights (B, N) in float64, 0 for dropped tokens; slots (B, N), `count` for dropped tokens."""
    counts = features.isfinite().all(-1) & (assignment >= 0) & (assignment < count)
    if weight is not None:
        counts = counts & weight.isfinite()
    slot = torch.where(counts, assignment.long(), count)
    x = torch.where(counts[..., None], features.double(), 0.0)
    return x, counts.double() if weight is None else torch.where(counts, weight.double(), 0.0), slot


def _sums(values: torch.Tensor, slot: torch.Tensor, count: int) -> torch.Tensor:
    """(B, count, ...) sums of values (B, N, ...) by slot."""
    out = values.new_zeros((values.shape[0], count + 1, *values.shape[2:]))
    index = slot if values.ndim == 2 else slot[..., None].expand(values.shape)
    return out.scatter_add(1, index, values)[:, :-1]


def _statistics(x: torch.Tensor, w: torch.Tensor, slot: torch.Tensor, count: int) -> Any:
    """Means, masses, and 1 / mass, which is 0 if the mass is not positive."""
    mass = _sums(w, slot, count)
    per_mass = torch.where(mass > 0, 1 / torch.where(mass > 0, mass, 1.0), 0.0)
    return _sums(x * w[..., None], slot, count) * per_mass[..., None], mass, per_mass


def _at(values: torch.Tensor, slot: torch.Tensor) -> torch.Tensor:
    """The row of values (B, count, ...) at the slot of each token, zero for a token of no slot."""
    padded = torch.cat([values, torch.zeros_like(values[:, :1])], 1)
    return padded.gather(1, slot if values.ndim == 2 else slot[..., None].expand(-1, -1, values.shape[2]))


def _vjp(
    mean_grad: torch.Tensor,
    mass_grad: torch.Tensor,
    features: torch.Tensor,
    assignment: torch.Tensor,
    count: int,
    weight: torch.Tensor | None,
) -> Any:
    x, w, slot = _members(features, assignment, count, weight)
    mean, _, per_mass = _statistics(x, w, slot, count)
    pull = _at(mean_grad.double() * per_mass[..., None], slot)
    for_features = (pull * w[..., None]).to(features.dtype)
    if weight is None:
        return for_features, None, None, None
    for_weight = (pull * (x - _at(mean, slot))).sum(-1) + _at(mass_grad.double(), slot)
    return for_features, None, None, for_weight.to(weight.dtype)


def _jvp(
    features_tangent: Any,
    _: Any,
    __: Any,
    weight_tangent: Any,
    features: torch.Tensor,
    assignment: torch.Tensor,
    count: int,
    weight: torch.Tensor | None,
) -> Any:
    x, w, slot = _members(features, assignment, count, weight)
    mean, mass, per_mass = _statistics(x, w, slot, count)
    moved = torch.where((slot < count)[..., None], features_tangent.double(), 0.0) * w[..., None]
    mass_tangent = torch.zeros_like(mass)
    if weight is not None:
        turned = torch.where(slot < count, weight_tangent.double(), 0.0)
        moved = moved + turned[..., None] * (x - _at(mean, slot))
        mass_tangent = _sums(turned, slot, count)
    return (_sums(moved, slot, count) * per_mass[..., None]).to(features.dtype), mass_tangent.float()


@define_op(
    "scatter_mean(Tensor features, Tensor assignment, SymInt count, Tensor? weight=None) -> (Tensor, Tensor)",
    fake=_fake,
    vmap=fold(lambda *arguments: scatter_mean(*arguments)),
    derivative=Derivative(_vjp, _jvp),
)
def scatter_mean_reference(
    features: torch.Tensor, assignment: torch.Tensor, count: int, weight: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    _check(features, assignment, count, weight)
    _check_values(assignment, count)
    out, total = _fake(features, assignment, count, weight)
    x, w, slot = _members(features, assignment, count, weight)
    mean, mass, _ = _statistics(x, w, slot, count)
    return out.copy_(mean.float()), total.copy_(mass)


def scatter_mean(
    features: torch.Tensor, assignment: torch.Tensor, count: int, weight: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weighted mean of the tokens assigned to each of `count` slots.

    ``mean[s] = sum_{i: a_i = s} w_i x_i / mass[s]`` with ``mass[s] = sum_{i: a_i = s} w_i``, all w_i = 1 without
    weights. Equivalent to ``index_add_`` and a division, but summed in a fixed order.

    Args:
        features: (B, N, C) float32, float16 or bfloat16, N and C at least 1. Any strides; unless the channels are
            contiguous a contiguous copy is made.
        assignment: (B, N) int64 or int32, the slot of each token, 0 to count - 1; -1: dropped.
        count: slots of each item, 1 to 2^31 - 1.
        weight: (B, N) float32, float16 or bfloat16, at least 0. None: all 1.

    Returns:
        mean (B, count, C) in the dtype of `features`, and mass (B, count) float32. Sums are float64, rounded once to
        float32. The mean is 0 if the mass is not positive. An empty slot has mass 0. A token with a NaN or infinity in
        its row or weight counts as dropped. The same input gives the same output, bit for bit, whatever else is in the
        batch. Both outputs are differentiable any number of times with respect to `features` and `weight`, in reverse
        and forward mode. Derivatives are computed in float64, and are 0 for dropped tokens and slots without mass.

    Raises:
        TypeError, ValueError: wrong dtype, shape, device or count; on the CPU, an assignment out of range. On a GPU
        such a token counts as dropped; STS_KERNELS_CHECK=1 raises instead, at the cost of a sync.

    Cost:
        2 B N C flops in float64; reads the features once on the CPU, twice on a GPU. Scratch of O(B N).
    """
    _check(features, assignment, count, weight)
    _check_values(assignment, count)
    return ops.scatter_mean.default(features, assignment, count, weight)
