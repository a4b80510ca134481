"""Density of each token, from its nearest neighbours."""

import math

import torch

from .. import _checks
from .._registry import define_op, ops
from .._transforms import fold
from .nearest import BLOCK, finite_rows, sqdist


def _check(features: torch.Tensor, k: int, num_tokens: torch.Tensor | None) -> None:
    op = "knn_density"
    _checks.features(op, features)
    _checks.integer(op, "k", k, 1, features.shape[1], " (the number of tokens)")
    if num_tokens is not None:
        _checks.index_vector(op, "num_tokens", num_tokens, features.shape[0], "(B,)", features)


def _fake(features: torch.Tensor, k: int, num_tokens: torch.Tensor | None = None) -> torch.Tensor:
    _check(features, k, num_tokens)
    return features.new_empty(features.shape[:2], dtype=torch.float32)


@define_op(
    "knn_density(Tensor features, SymInt k, Tensor? num_tokens=None) -> Tensor",
    fake=_fake,
    vmap=fold(lambda *arguments: knn_density(*arguments)),
)
def knn_density_reference(features: torch.Tensor, k: int, num_tokens: torch.Tensor | None = None) -> torch.Tensor:
    _check(features, k, num_tokens)
    _checks.counts("knn_density", "num_tokens", num_tokens, features.shape[1], "tokens")
    out = _fake(features, k)
    batch, tokens, channels = features.shape
    x, usable = finite_rows(features)
    if num_tokens is not None:
        count = torch.where((num_tokens >= 0) & (num_tokens <= tokens), num_tokens, 0)
        usable = usable & (torch.arange(tokens, device=x.device) < count[:, None])
    step = max(1, BLOCK // max(1, batch * tokens))
    for start in range(0, tokens, step):
        part = slice(start, start + step)
        distance = torch.where(usable[:, None], sqdist(x[:, part], x), math.inf)
        near = distance.topk(k, largest=False).values
        found = near < math.inf
        mean = torch.where(found, near, 0.0).sum(-1) / found.sum(-1).clamp(min=1) / channels
        out[:, part] = torch.where(usable[:, part], (-mean).exp(), 0.0)
    return out


def knn_density(features: torch.Tensor, k: int, num_tokens: torch.Tensor | None = None) -> torch.Tensor:
    """Density of each token for density-peak clustering (DPC-KNN): ``exp(-mean_j |x_i - x_j|^2 / C)`` over its k
    nearest tokens, itself included.

    Equivalent to ``(-(torch.cdist(x, x).square() / C).topk(k, largest=False).values.mean(-1)).exp()``.

    Args:
        features: (B, N, C) float32, float16 or bfloat16, N and C at least 1. Any strides; unless the channels are
            contiguous a contiguous copy is made.
        k: neighbours, 1 <= k <= N. An item with fewer than k tokens takes the mean over all its tokens.
        num_tokens: (B,) int64 or int32, 0 to N: only the first num_tokens[b] rows of item b count. None: all do.

    Returns:
        (B, N) float32, in [0, 1]; 1 for k = 1. Differences are taken before squaring wherever squares would cancel, so
        near-duplicates far from the origin keep their relative accuracy: the mean is accurate to 1e-5. Tokens past
        num_tokens[b], and tokens with a NaN or infinity, have density 0 and are no token's neighbours. The same input
        gives the same output, bit for bit, whatever else is in the batch. requires_grad is False: the densities have no
        derivative.

    Raises:
        TypeError, ValueError: wrong dtype, shape, device or k; on the CPU, values of `num_tokens` out of range. On a
        GPU such an item has no tokens; STS_KERNELS_CHECK=1 raises instead, at the cost of a sync.
        NotImplementedError: forward-mode AD or torch.func differentiates `features`.

    Cost:
        3 B N^2 C flops; on the CPU 2 B N^2 C if k is small. Scratch on a GPU: the distances of as many rows as fit
        256 MiB. 16-bit features of at most 8192 tokens on a GPU of compute capability 9.0: B N^2 C flops on tensor
        cores, with further scratch of 9/8 the size of the features. Scratch on the CPU: a float32 copy of the features,
        and 64 rows of distances per thread.
    """
    _check(features, k, num_tokens)
    _checks.counts("knn_density", "num_tokens", num_tokens, features.shape[1], "tokens")
    return ops.knn_density.default(features, k, num_tokens)
