"""Statistics of visual tokens, of their attention and of a selection, for reports. Plain tensor code.

Shared by all functions:
    features: (B, N, C) float32, float16 or bfloat16, any strides. scores: (B, N) float, at least 0, larger is better.
    num_tokens: (B,) int64 or int32, only the first num_tokens[b] tokens of item b count; None: all N do. An item
        without tokens returns 0.
    Returns float32, computed in float64: the rest of the batch and the padding change at most the last bit. An item
        with a NaN, an infinity or a negative score returns NaN; other items are unaffected. No gradient.
    Raises TypeError or ValueError: the message names the function, the argument, the expected and the given value.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _checks

__all__ = [
    "Coverage",
    "attention_entropy",
    "coverage",
    "erank",
    "knn_consistency",
    "participation_ratio",
    "quartile_shares",
    "share_of_top",
]

TIE = 2.0**40  # cosines are rounded to multiples of 1 / TIE, so that equal tokens tie
CHUNK = 1 << 24  # float64 distances per block in coverage: 128 MB


class Coverage(NamedTuple):
    """Distance of the tokens of each item to their nearest kept token: (B,) float32 each."""

    mean: Tensor
    largest: Tensor


def _present(op: str, like: Tensor, num_tokens: Tensor | None) -> Tensor:
    """(B, N) bool: the tokens that count."""
    batch, tokens = like.shape[:2]
    position = torch.arange(tokens, device=like.device)
    if num_tokens is None:
        return (position >= 0).expand(batch, tokens)
    _checks.index_vector(op, "num_tokens", num_tokens, batch, "(B,)", like)
    _checks.counts(op, "num_tokens", num_tokens, tokens, "tokens")
    return position < num_tokens[:, None]


def _tokens(op: str, features: Tensor, num_tokens: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """x (B, N, C) float64, 0 outside the item and in bad items; present (B, N) bool; bad (B,) bool: result is NaN."""
    _checks.features(op, features)
    present = _present(op, features, num_tokens)
    bad = (present & ~features.isfinite().all(-1)).any(1)
    counts = present & ~bad[:, None]
    return torch.where(counts[..., None], features, 0).double(), present, bad


def _scores(op: str, scores: Tensor, num_tokens: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """`_tokens` for scores: (B, N) float64, present, bad."""
    _checks.tensor(op, "scores", scores, _checks.SCORES, "(B, N)")
    if scores.shape[1] == 0:
        raise ValueError(f"{op}: scores must have at least one token, got shape {tuple(scores.shape)}")
    present = _present(op, scores, num_tokens)
    bad = (present & ~(scores.isfinite() & (scores >= 0))).any(1)
    return torch.where(present & ~bad[:, None], scores, 0).double(), present, bad


def _ratio(part: Tensor, whole: Tensor) -> Tensor:
    """part / whole, 0 where the whole is 0."""
    return torch.where(whole > 0, part / whole, 0.0)


def _result(value: Tensor, bad: Tensor) -> Tensor:
    return value.masked_fill(bad.reshape(-1, *[1] * (value.ndim - 1)), math.nan).float()


def _gram(x: Tensor) -> Tensor:
    """X X^T or X^T X, the smaller one: the squared singular values of X are the eigenvalues of either."""
    return x @ x.mT if x.shape[1] <= x.shape[2] else x.mT @ x


@torch.no_grad()
def erank(features: Tensor, num_tokens: Tensor | None = None) -> Tensor:
    """Effective rank of each item's tokens (AdaVTP Eq. 3, 7).

    Equivalent to ``exp(-(q * q.log()).sum())`` with ``s = torch.linalg.svdvals(features)``, ``q = s / s.sum()``. The
    features are not centred: a common offset of all tokens lowers the rank.

    Args:
        features: (B, N, C). A selection's rows are `methods.merge(features, selection)`; zero rows change nothing.
        num_tokens: (B,).

    Returns:
        (B,) float32 between 1 and min(N, C); 0 if all tokens are zero. Singular values come from the eigenvalues of the
        Gram matrix in float64, clipped at 0. In float32 the rounding noise of the Gram matrix would count as rank.

    Cost:
        2 B N C min(N, C) flops and the eigenvalues of B matrices of side min(N, C), in float64. On CUDA
        torch.linalg.eigvalsh synchronises; `participation_ratio` and `attention_entropy` do not.
    """
    x, _, bad = _tokens("erank", features, num_tokens)
    s = torch.linalg.eigvalsh(_gram(x)).clamp_(min=0).sqrt_()
    q = _ratio(s, s.sum(1, keepdim=True))
    return _result(torch.where(s.sum(1) > 0, torch.special.entr(q).sum(1).exp(), 0.0), bad)


@torch.no_grad()
def participation_ratio(features: Tensor, num_tokens: Tensor | None = None) -> Tensor:
    """Participation ratio of each item's tokens: (sum s^2)^2 / sum s^4 of their singular values s.

    Equivalent to ``trace(G)**2 / G.square().sum()`` with ``G = features @ features.mT``. Like `erank`, the number of
    directions that the tokens span; strong directions weigh more. No eigenvalues are computed and nothing is read back
    to the host, so a CUDA graph can capture it.

    Args:
        features: (B, N, C), not centred.
        num_tokens: (B,).

    Returns:
        (B,) float32 between 1 and min(N, C); 0 where all tokens are zero.

    Cost:
        2 B N C min(N, C) flops in float64.
    """
    x, _, bad = _tokens("participation_ratio", features, num_tokens)
    gram = _gram(x)
    trace = gram.diagonal(dim1=1, dim2=2).sum(1)
    return _result(_ratio(trace.square(), gram.square().sum((1, 2))), bad)


@torch.no_grad()
def attention_entropy(scores: Tensor, num_tokens: Tensor | None = None) -> Tensor:
    """Shannon entropy of each item's attention in nats (AdaVTP Eq. 1-2).

    Equivalent to ``-(p * p.log()).sum(1)`` with ``p = scores / scores.sum(1, keepdim=True)`` and 0 log 0 = 0.

    Args:
        scores: (B, N), need not sum to 1.
        num_tokens: (B,).

    Returns:
        (B,) float32 between 0 and log N; 0 where all scores are zero.

    Cost:
        one pass over the scores; nothing is read back to the host.
    """
    s, _, bad = _scores("attention_entropy", scores, num_tokens)
    return _result(torch.special.entr(_ratio(s, s.sum(1, keepdim=True))).sum(1), bad)


@torch.no_grad()
def knn_consistency(features: Tensor, scores: Tensor, k: int, num_tokens: Tensor | None = None) -> Tensor:
    """How much similar tokens agree in attention (STS 3.1, A.1).

    ``1 - sigma_local / sigma``. sigma is the population standard deviation of all scores. A token's local standard
    deviation is that of its k nearest tokens by cosine, itself excluded; sigma_local is the mean over tokens. 1: the
    scores of neighbours are equal. 0: they vary as much as all scores.

    Args:
        features: (B, N, C). A zero row has cosine 0 to every token. Cosines are rounded to multiples of 2^-40; ties go
            to the lowest index.
        scores: (B, N).
        k: neighbours, 1 <= k < N. In an item of at most k tokens, all other tokens.
        num_tokens: (B,).

    Returns:
        (B,) float32, at most 1; NaN where all scores are equal or the item has one token.

    Cost:
        2 B N^2 C flops in float64, 32 N^2 bytes of scratch: one item at a time.
    """
    op = "knn_consistency"
    x, present, bad = _tokens(op, features, num_tokens)
    s, _, bad_scores = _scores(op, scores, num_tokens)
    if scores.shape != features.shape[:2]:
        raise ValueError(
            f"{op}: scores must have shape (B, N) = {tuple(features.shape[:2])}, got {tuple(scores.shape)}"
        )
    _checks.same_device(op, "scores", scores, features)
    tokens = features.shape[1]
    _checks.integer(op, "k", k, 1, max(1, tokens - 1), " (the other tokens)")
    items = [_consistency(*item, k) for item in zip(x, s, present, strict=True)]
    value = torch.stack(items) if items else s.new_empty(0)
    return _result(torch.where(present.any(1), value, 0.0), bad | bad_scores)


def _consistency(x: Tensor, scores: Tensor, present: Tensor, k: int) -> Tensor:
    """`knn_consistency` of one item: x (N, C), scores (N,), present (N,)."""
    norm = x.square().sum(1, keepdim=True).sqrt()
    x = torch.where(norm > 0, x / norm, 0.0)
    cosine = (x @ x.T).mul_(TIE).round_()  # the product may round the columns of equal tokens differently
    cosine.masked_fill_(~present, -math.inf).fill_diagonal_(-math.inf)
    value, near = cosine.sort(dim=1, descending=True, stable=True)
    value, near = value[:, :k], near[:, :k]
    local = _std(scores[near], value > -math.inf)
    mean = torch.where(present, local, 0.0).sum() / present.sum()
    return 1 - mean / _std(scores[None], present[None])[0]


def _std(values: Tensor, counts: Tensor) -> Tensor:
    """Population standard deviation of each row over the entries with `counts`."""
    number = counts.sum(1, keepdim=True)
    mean = torch.where(counts, values, 0.0).sum(1, keepdim=True) / number
    return (torch.where(counts, values - mean, 0.0).square().sum(1) / number[:, 0]).sqrt()


def _best(
    op: str, scores: Tensor, share: Any, num_tokens: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(value, index, best, count, bad): scores in descending order, their indices, whether in the top `share`, (B, 1)
    tokens of each item, bad items."""
    s, present, bad = _scores(op, scores, num_tokens)
    _checks.share(op, "share", share)
    value, index = s.masked_fill(~present, -math.inf).sort(dim=1, descending=True, stable=True)
    count = present.sum(1, keepdim=True)
    number = (share * count.double()).round().clamp(min=1).minimum(count)
    return value, index, torch.arange(s.shape[1], device=s.device) < number, count, bad


@torch.no_grad()
def share_of_top(scores: Tensor, share: float = 0.2, num_tokens: Tensor | None = None) -> Tensor:
    """Fraction of an item's attention that its top tokens have (VisPruner Fig. 3a).

    Args:
        scores: (B, N).
        share: fraction of the tokens, 0 < share <= 1; rounded to a number of tokens, at least 1.
        num_tokens: (B,).

    Returns:
        (B,) float32 between 0 and 1; 0 where all scores are zero.

    Cost:
        one stable sort of (B, N); nothing is read back to the host.
    """
    value, _, best, _, bad = _best("share_of_top", scores, share, num_tokens)
    total = torch.where(value > -math.inf, value, 0.0).sum(1)
    return _result(_ratio(torch.where(best, value, 0.0).sum(1), total), bad)


@torch.no_grad()
def quartile_shares(scores: Tensor, share: float = 0.25, num_tokens: Tensor | None = None) -> Tensor:
    """Positions of the top tokens: the fraction of them in each quarter of the index range (VisPruner Fig. 2b).

    Args:
        scores: (B, N). Equal scores go to the lowest index.
        share: fraction of the tokens, 0 < share <= 1; rounded to a number of tokens, at least 1.
        num_tokens: (B,). The quarters divide the range 0 to num_tokens[b] - 1.

    Returns:
        (B, 4) float32, each row of sum 1.

    Cost:
        one stable sort of (B, N); nothing is read back to the host.
    """
    _, index, best, count, bad = _best("quartile_shares", scores, share, num_tokens)
    quarter = index * 4 // count.clamp(min=1)
    number = torch.stack([(best & (quarter == q)).sum(1) for q in range(4)], 1).double()
    return _result(_ratio(number, best.sum(1, keepdim=True)), bad)


@torch.no_grad()
def coverage(features: Tensor, order: Tensor, num_tokens: Tensor | None = None) -> Coverage:
    """How well the kept tokens represent all tokens: distance of each token to its nearest kept token.

    Equivalent to ``torch.cdist(features, features[order]).min(-1)``, its mean and its maximum. A kept token's distance
    is 0 and counts in the mean.

    Args:
        features: (B, N, C).
        order: (B, K) int64 or int32, the kept tokens, as in `Selection.order`; -1: no token.
        num_tokens: (B,).

    Returns:
        Coverage(mean, largest), (B,) float32 each, L2 in units of features; infinite if an item keeps no token.

    Cost:
        2 B N K C flops in float64, distances in blocks of 128 MB.
    """
    op = "coverage"
    x, present, bad = _tokens(op, features, num_tokens)
    _checks.tensor(op, "order", order, _checks.INTEGER, "(B, K)")
    if order.shape[0] != features.shape[0] or order.shape[1] == 0:
        raise ValueError(
            f"{op}: order must have shape (B, K) with B = {features.shape[0]} and K at least 1, "
            f"got {tuple(order.shape)}"
        )
    _checks.same_device(op, "order", order, features)
    batch, tokens = present.shape
    _checks.picks(op, "order", order, tokens)
    valid = (order >= 0) & (order < tokens)
    slots = order.long().masked_fill(~valid, tokens)
    is_kept = present.new_zeros(batch, tokens + 1).scatter(1, slots, True)[:, :tokens] & present
    valid &= is_kept.gather(1, slots.clamp(max=tokens - 1))  # picks in the padding do not count
    x = x - _ratio(x.sum(1), present.sum(1, keepdim=True))[:, None]  # less cancellation in |x|^2 - 2xy + |y|^2
    kept = x.gather(1, slots.clamp(max=tokens - 1)[..., None].expand(-1, -1, x.shape[2]))
    own = kept.square().sum(2).masked_fill_(~valid, math.inf)[:, None]
    rows = max(1, CHUNK // max(1, batch * order.shape[1]))
    parts = [(own - 2 * (part @ kept.mT)).amin(2) for part in x.split(rows, dim=1)]
    distance = (torch.cat(parts, 1) + x.square().sum(2)).clamp(min=0).sqrt().masked_fill(is_kept, 0.0)
    distance = torch.where(present, distance, 0.0)
    mean = _ratio(distance.sum(1), present.sum(1))
    return Coverage(_result(mean, bad), _result(distance.amax(1), bad))
