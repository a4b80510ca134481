"""Squared distances between all pairs of tokens."""

from typing import Any

import torch

from .. import _checks
from .._registry import define_op, ops
from .._transforms import Derivative, fold


def _check(features: torch.Tensor) -> None:
    _checks.features("pairwise_sqdist", features)


def _fake(features: torch.Tensor) -> torch.Tensor:
    _check(features)
    batch, tokens, _ = features.shape
    return features.new_empty((batch, tokens, tokens), dtype=torch.float32)


def _jvp(tangent: torch.Tensor, features: torch.Tensor) -> Any:
    """2 (x_i - x_j) . (t_i - t_j). In float64 the expanded form does not cancel, whatever x and t are rounded to."""
    x, t = features.double(), tangent.double()
    cross = x @ t.mT
    own = cross.diagonal(dim1=1, dim2=2)
    return (2 * (own[:, :, None] + own[:, None, :] - cross - cross.mT)).float()


def _vjp(grad: torch.Tensor, features: torch.Tensor) -> Any:
    """2 sum_j (g_ij + g_ji) (x_i - x_j), in float64 as well. Equal tokens add nothing, however large their g."""
    equal = pairwise_sqdist(features.detach()) == 0
    x, pull = features.double(), grad.double().masked_fill(equal, 0.0)
    pull = pull + pull.mT
    return ((2 * (pull.sum(-1, keepdim=True) * x - pull @ x)).to(features.dtype),)


@define_op(
    "pairwise_sqdist(Tensor features) -> Tensor",
    fake=_fake,
    vmap=fold(lambda features: pairwise_sqdist(features)),
    derivative=Derivative(_vjp, _jvp),
)
def pairwise_sqdist_reference(features: torch.Tensor) -> torch.Tensor:
    _check(features)
    x = features.float().contiguous()  # so that every pair is summed in the same order
    # Row by row by differences: the expanded form |a|^2 + |b|^2 - 2ab cancels for near-duplicates.
    out = _fake(x)
    for i in range(x.shape[1]):
        out[:, i] = (x - x[:, i : i + 1]).square_().sum(-1)
    out.diagonal(dim1=1, dim2=2).zero_()
    return out


def pairwise_sqdist(features: torch.Tensor) -> torch.Tensor:
    """Squared L2 distance of every pair of tokens of each item, d_ij of STS Eq. 3.

    Equivalent to ``(x[:, :, None] - x[:, None, :]).square().sum(-1)`` with ``x = features.float()``.

    Args:
        features: (B, N, C) float32, float16 or bfloat16, N and C at least 1. Any strides; unless the channels are
            contiguous a contiguous copy is made.

    Returns:
        (B, N, N) float32, in units of features squared. The diagonal is exactly 0, the matrix symmetric to the bit and
        never negative. Differences are taken before squaring wherever squares would cancel, so near-duplicates far
        from the origin keep their relative accuracy. A token with a NaN or infinity gives NaN or infinity off the
        diagonal, in its own row and column only. Differentiable any number of times, in reverse and forward mode;
        derivatives are computed in float64. Tokens of distance 0, equal or so near that the square underflows, add
        nothing to a gradient.

    Raises:
        TypeError, ValueError: wrong dtype or shape.

    Cost:
        at most 3 B N^2 C flops (half where symmetry is used) and 4 B N^2 bytes written. 16-bit features on a GPU of
        compute capability 9.0: B N^2 C flops on tensor cores, with scratch of 9/8 the size of the features. A gradient
        takes another call of the op, 2 B N^2 C flops in float64, and scratch of 20 B N^2 bytes.
    """
    _check(features)
    return ops.pairwise_sqdist.default(features)
