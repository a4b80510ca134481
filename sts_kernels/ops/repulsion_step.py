"""One step of STS Algorithm 1, for callers with their own loop."""

import math
from typing import Any

import torch

from .. import _checks
from .._registry import define_op, ops
from .._transforms import fold
from ._selection import LAST_RESORT, pick


def weight(sqdist: torch.Tensor, eps: float) -> torch.Tensor:
    """Repulsion 1 / (sqdist + eps); 0 for a NaN distance."""
    return torch.where(sqdist.isnan(), 0.0, 1 / (sqdist + eps))


def _check(potential: torch.Tensor, features: torch.Tensor, picked: torch.Tensor, eps: float) -> None:
    op = "repulsion_step_"
    _checks.features(op, features)
    _checks.per_token(op, "potential", potential, (torch.float32,), features)
    _checks.index_vector(op, "picked", picked, features.shape[0], "(B,)", features)
    _checks.eps(op, eps)
    _checks.writable(op, "potential", potential, features=features, picked=picked)


def _check_values(features: torch.Tensor, picked: torch.Tensor) -> None:
    if not _checks.values_readable(picked):
        return
    tokens = features.shape[1]
    for item, value in enumerate(picked.tolist()):
        if not -1 <= value < tokens:
            raise ValueError(f"repulsion_step_: picked[{item}] must be between -1 and {tokens - 1}, got {value}")


def _fake(potential: torch.Tensor, features: torch.Tensor, picked: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    _check(potential, features, picked, eps)
    return features.new_empty((features.shape[0],), dtype=torch.int64)


def _vmap(potential: torch.Tensor, features: torch.Tensor, picked: torch.Tensor, *eps: float) -> Any:
    _checks.writable("repulsion_step_", "potential", potential)
    folded = potential.flatten(0, 1).clone()
    token = fold(lambda x, *arguments: repulsion_step_(folded, x, *arguments))(features, picked, *eps)
    potential.copy_(folded.view_as(potential))
    return token


@define_op(
    "repulsion_step_(Tensor(a!) potential, Tensor features, Tensor picked, float eps=1e-6) -> Tensor",
    fake=_fake,
    vmap=_vmap,
)
def repulsion_step_reference(
    potential: torch.Tensor, features: torch.Tensor, picked: torch.Tensor, eps: float = 1e-6
) -> torch.Tensor:
    _check(potential, features, picked, eps)
    _check_values(features, picked)
    x = features.float().contiguous()  # so that equal tokens are summed in the same order and tie
    valid = (picked >= 0) & (picked < x.shape[1])
    row = torch.where(valid, picked, 0).long()
    centre = x.gather(1, row[:, None, None].expand(-1, 1, x.shape[2]))
    grown = potential + torch.where(valid[:, None], weight((x - centre).square().sum(-1), eps), 0.0)
    grown = torch.where(x.isfinite().all(-1), grown, grown.clamp(min=LAST_RESORT))
    grown = torch.where(grown.isnan(), LAST_RESORT, grown)
    own = torch.arange(x.shape[1], device=x.device) == row[:, None]
    potential.copy_(torch.where(own & valid[:, None], math.inf, grown))
    return pick(potential)


def repulsion_step_(
    potential: torch.Tensor, features: torch.Tensor, picked: torch.Tensor, eps: float = 1e-6
) -> torch.Tensor:
    """Adds the repulsion of the picked tokens to `potential` and returns the tokens to pick next (STS Eq. 4 and 5).

    Starting from zeros and any first token, K - 1 calls are Algorithm 1::

        potential[b, i] += 1 / (|features[b, i] - features[b, picked[b]]|^2 + eps)
        potential[b, picked[b]] = inf
        return potential.argmin(1)

    Args:
        potential: (B, N) float32, updated in place. Any strides, but its elements must not overlap each other,
            `features` or `picked`. Under torch.no_grad() it may require grad. Tokens holding +inf are never picked, so
            a ragged batch starts with +inf on its padding. torch.vmap must map it.
        features: (B, N, C) float32, float16 or bfloat16, on the same device. Any strides; unless the channels are
            contiguous a contiguous copy is made.
        picked: (B,) int64 or int32. -1 adds no repulsion: only NaN potentials and tokens with a NaN or infinity
            change, to FLT_MAX. Other values outside [0, N) raise on the CPU. On a GPU they act as -1;
            STS_KERNELS_CHECK=1 raises instead, at the cost of a sync.
        eps: 1e-30 to 1e30, in units of features squared; the repulsion of a duplicate is 1 / eps.

    Returns:
        (B,) int64: the token of smallest potential, the lowest index among ties, -1 if every token is picked. A token
        with a NaN or infinity is returned only when no finite token is left, and repels none. requires_grad is False,
        and the potential gets no gradient from the features.

    Raises:
        TypeError, ValueError: wrong dtype, shape, device or eps; a potential that must not be written to; on the CPU,
            `picked` out of range. Nothing is written on an error.
        NotImplementedError: forward-mode AD or torch.func differentiates `potential` or `features`.

    Cost:
        one read of the features, 3 B N C flops.
    """
    _check(potential, features, picked, eps)
    _check_values(features, picked)
    return ops.repulsion_step_.default(potential, features, picked, eps)
