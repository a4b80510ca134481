"""The nearest key of each query row."""

import math
from typing import Any

import torch

from .. import _checks
from .._registry import define_op, ops
from .._transforms import Derivative, fold

METRICS = ("cosine", "euclidean")
RANKS = (*_checks.SCORES, *_checks.INTEGER)
BLOCK = 1 << 22  # pairs per block of the reference, in float64


def _check(
    query: torch.Tensor,
    key: torch.Tensor,
    metric: str,
    query_rank: torch.Tensor | None,
    key_rank: torch.Tensor | None,
    exclude_self: bool,
    num_keys: torch.Tensor | None,
) -> None:
    op = "nearest"
    _checks.features(op, query, "(B, M, C)", "query")
    _checks.features(op, key, "(B, K, C)", "key")
    if key.dtype != query.dtype:
        raise TypeError(f"{op}: key must have the dtype of query, {query.dtype}, got {key.dtype}".replace("torch.", ""))
    _checks.same_device(op, "key", key, query, "query")
    if key.shape[0] != query.shape[0] or key.shape[2] != query.shape[2]:
        expected = f"(B, K, C) with B = {query.shape[0]} and C = {query.shape[2]} as query has"
        raise ValueError(f"{op}: key must have shape {expected}, got {tuple(key.shape)}")
    _checks.one_of(op, "metric", metric, METRICS)
    for name, value, like, shape, other in (
        ("query_rank", query_rank, query, "(B, M)", "query"),
        ("key_rank", key_rank, key, "(B, K)", "key"),
    ):
        if value is not None:
            _checks.per_token(op, name, value, RANKS, like, shape, other)
    if (query_rank is None) != (key_rank is None):
        given, missing = ("query_rank", "key_rank") if key_rank is None else ("key_rank", "query_rank")
        raise ValueError(f"{op}: {missing} must be given with {given}, got None")
    _checks.flag(op, "exclude_self", exclude_self)
    if num_keys is not None:
        _checks.index_vector(op, "num_keys", num_keys, query.shape[0], "(B,)", query)


def _fake(
    query: torch.Tensor,
    key: torch.Tensor,
    metric: str = "cosine",
    query_rank: torch.Tensor | None = None,
    key_rank: torch.Tensor | None = None,
    exclude_self: bool = False,
    num_keys: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    _check(query, key, metric, query_rank, key_rank, exclude_self, num_keys)
    size = query.shape[:2]
    return query.new_empty(size, dtype=torch.int64), query.new_empty(size, dtype=torch.float32)


def unit_rows(x: torch.Tensor) -> torch.Tensor:
    """Rows of unit length, in float64. A zero row stays zero."""
    x = x.double()
    norm = x.norm(dim=-1, keepdim=True)
    return x / torch.where(norm > 0, norm, 1.0)


def sqdist(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """(B, M, K) float64, by differences: no cancellation."""
    return torch.cdist(query.double(), key.double(), compute_mode="donot_use_mm_for_euclid_dist").square_()


def finite_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x (B, N, C) with 0 for rows that have a NaN or infinity, and (B, N) bool: the finite rows."""
    finite = x.isfinite().all(-1)
    return torch.where(finite[..., None], x, 0), finite


# ---- Derivative of the value of each pair (i, index[i]), in float64 ----------------------------------------------


def _pairs(query: torch.Tensor, key: torch.Tensor, index: torch.Tensor) -> Any:
    """(q, k, row, matched): rows (B, M, C) in float64, 0 without a match; key index for gather; (B, M, 1) bool."""
    matched = (index >= 0)[..., None]
    row = index.clamp(min=0)[..., None].expand(-1, -1, key.shape[2])
    q, k = torch.where(matched, query.double(), 0.0), torch.where(matched, key.double().gather(1, row), 0.0)
    return q, k, row, matched


def _slopes(q: torch.Tensor, k: torch.Tensor, metric: str) -> Any:
    """Derivatives (B, M, C) of each pair's value with respect to q and to k."""
    if metric == "euclidean":
        return 2 * (q - k), 2 * (k - q)
    unit_q, per_q = _normalised(q)
    unit_k, per_k = _normalised(k)
    cosine = (unit_q * unit_k).sum(-1, keepdim=True)
    return (unit_k - cosine * unit_q) * per_q, (unit_q - cosine * unit_k) * per_k


def _normalised(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    square = x.square().sum(-1, keepdim=True)
    per_norm = torch.where(square > 0, square, 1.0).rsqrt() * (square > 0)
    return x * per_norm, per_norm


def _vjp(
    grad: torch.Tensor, index: torch.Tensor, query: torch.Tensor, key: torch.Tensor, metric: str, *rest: Any
) -> Any:
    q, k, row, matched = _pairs(query, key, index)
    by_query, by_key = _slopes(q, k, metric)
    pull = torch.where(matched, grad.double()[..., None], 0.0)
    for_key = torch.zeros_like(key, dtype=torch.float64).scatter_add(1, row, pull * by_key)
    return (pull * by_query).to(query.dtype), for_key.to(key.dtype), None, *(None for _ in rest)


def _jvp(query_tangent: Any, key_tangent: Any, *arguments: Any) -> Any:
    index, query, key, metric, *_ = arguments[5:]
    q, k, row, matched = _pairs(query, key, index)
    by_query, by_key = _slopes(q, k, metric)
    change = by_key * key_tangent.double().gather(1, row) + by_query * query_tangent.double()
    return torch.where(matched, change, 0.0).sum(-1).float()


@define_op(
    'nearest(Tensor query, Tensor key, str metric="cosine", Tensor? query_rank=None, Tensor? key_rank=None, '
    "bool exclude_self=False, Tensor? num_keys=None) -> (Tensor, Tensor)",
    fake=_fake,
    vmap=fold(lambda *arguments: nearest(*arguments)),
    derivative=Derivative(_vjp, _jvp),
)
def nearest_reference(
    query: torch.Tensor,
    key: torch.Tensor,
    metric: str = "cosine",
    query_rank: torch.Tensor | None = None,
    key_rank: torch.Tensor | None = None,
    exclude_self: bool = False,
    num_keys: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    _check(query, key, metric, query_rank, key_rank, exclude_self, num_keys)
    _checks.counts("nearest", "num_keys", num_keys, key.shape[1], "keys")
    batch, rows, keys = query.shape[0], query.shape[1], key.shape[1]
    (query, finite), (key, usable) = finite_rows(query), finite_rows(key)
    position = torch.arange(max(rows, keys), device=query.device)
    if num_keys is not None:
        count = torch.where((num_keys >= 0) & (num_keys <= keys), num_keys, 0)
        usable = usable & (position[:keys] < count[:, None])
    if metric == "cosine":
        query, key = unit_rows(query), unit_rows(key)
    index, value = _fake(query.float(), key.float())
    step = max(1, BLOCK // max(1, batch * keys))
    for start in range(0, rows, step):
        part = slice(start, start + step)
        # Rounding float64 to float32 hides the order of summation: equal keys tie, whatever the batch.
        q = query[:, part]
        distance = (-(q @ key.mT).clamp(-1, 1) if metric == "cosine" else sqdist(q, key)).float()
        allowed = usable[:, None] & finite[:, part, None]
        if query_rank is not None and key_rank is not None:  # both, or none
            allowed = allowed & (key_rank.double()[:, None] < query_rank.double()[:, part, None])
        if exclude_self:
            allowed = allowed & (position[:rows][part, None] != position[:keys])
        # A distance beyond float32's range sorts after all others, and before pairs that are not allowed.
        order = torch.where(allowed, distance.clamp(max=_checks.MAX_FLOAT32), math.inf)
        best = order.argmin(-1, keepdim=True)
        matched = allowed.gather(2, best)
        index[:, part] = torch.where(matched, best, -1)[..., 0]
        value[:, part] = torch.where(matched, distance.gather(2, best), math.inf)[..., 0]
    return index, 0 - value if metric == "cosine" else value


def nearest(
    query: torch.Tensor,
    key: torch.Tensor,
    metric: str = "cosine",
    query_rank: torch.Tensor | None = None,
    key_rank: torch.Tensor | None = None,
    exclude_self: bool = False,
    num_keys: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The key of largest cosine, or of smallest squared distance, to each query row.

    With ``metric="cosine"`` equivalent to ``(normalize(query) @ normalize(key).mT).max(-1)``, with
    ``metric="euclidean"`` to ``torch.cdist(query, key).square().min(-1)``. The (M, K) matrix is not stored, but in the
    case named under Cost.

    Args:
        query: (B, M, C) float32, float16 or bfloat16, M and C at least 1. Any strides; unless the channels are
            contiguous a contiguous copy is made.
        key: (B, K, C) of the same dtype, K at least 1. May be `query`.
        metric: "cosine": a zero row has cosine 0 to every row. "euclidean": squared L2 distance; beyond float32's range
            it counts as infinite.
        query_rank, key_rank: (B, M) and (B, K), integer or floating point, both or neither: query i is matched only
            with keys j of ``key_rank[j] < query_rank[i]``, compared in float64. A comparison with NaN is False.
        exclude_self: True: query i is not matched with key i.
        num_keys: (B,) int64 or int32, 0 to K: only the first num_keys[b] keys of item b count. None: all do.

    Returns:
        index (B, M) int64 and value (B, M) float32: the cosine, in [-1, 1], or the squared distance. Ties go to the
        lowest index. Accuracy is 1e-5, absolute for cosines and relative for distances. Differences are taken before
        squaring wherever squares would cancel, so near-duplicates far from the origin are told apart. A row with a NaN
        or infinity is never matched. Without an allowed key, index is -1 and value is -inf (cosine) or inf (euclidean).
        The same input gives the same output, bit for bit, whatever else is in the batch; in the case named under Cost
        `query` must be the same tensor as `key` both times. `value` is differentiable any number of times with respect
        to `query` and `key`, in reverse and forward mode, at fixed index. Derivatives are computed in float64.

    Raises:
        TypeError, ValueError: wrong dtype, shape, device or metric; one rank without the other; on the CPU, values of
        `num_keys` out of range. On a GPU such an item has no keys; STS_KERNELS_CHECK=1 raises instead, at the cost of a
        sync.

    Cost:
        cosine: 2 B M K C flops, on a GPU on tensor cores if rows are 16-bit and aligned and C is a multiple of 8.
        Euclidean: 3 B M K C flops; on the CPU 2 B M K C as long as few keys are about equally near. Scratch:
        8 B (M + K) bytes on a GPU; on the CPU float32 copies of both sets, C padded to a multiple of 32. Euclidean,
        `query` the same 16-bit tensor as `key`, at most 8192 rows, on a GPU of compute capability 9.0: B M^2 C flops on
        tensor cores, and as further scratch the distances of as many items as fit 256 MiB, and 9/8 the size of the
        features.
    """
    _check(query, key, metric, query_rank, key_rank, exclude_self, num_keys)
    _checks.counts("nearest", "num_keys", num_keys, key.shape[1], "keys")
    return ops.nearest.default(query, key, metric, query_rank, key_rank, exclude_self, num_keys)
