"""Stage 2 of STS: attention of one query row to every cached key, without storing the attention matrix."""

import math

import torch

from .. import _checks
from .._registry import define_op, ops
from .._transforms import fold

CHUNK = 1 << 18  # elements of a 16-bit KV cache that the reference converts to float32 at a time: fits the CPU's cache


def check(
    op: str,
    query: torch.Tensor,
    key: torch.Tensor,
    scale: float | None,
    key_shape: str = "(B, S, Hkv, D)",
    query_shape: str = "(B, Hq, D)",
) -> None:
    """The checks that all attention ops share."""
    _checks.tensor(op, "query", query, _checks.FLOATING, query_shape)
    _checks.tensor(op, "key", key, _checks.FLOATING, key_shape)
    if key.dtype != query.dtype:
        raise TypeError(f"{op}: key must have the dtype of query, {query.dtype}, got {key.dtype}".replace("torch.", ""))
    _checks.same_device(op, "key", key, query, "query")
    (heads, dim), (kv_heads, key_dim) = query.shape[-2:], key.shape[-2:]
    if dim < 1:
        raise ValueError(f"{op}: the head dimension of query must be at least 1, got {dim}")
    if key_dim != dim:
        raise ValueError(f"{op}: key must have the head dimension of query, {dim}, got {key_dim}")
    if kv_heads < 1 or heads < 1 or heads % kv_heads:
        raise ValueError(f"{op}: the heads of query must be a multiple of the heads of key, got {heads} and {kv_heads}")
    for name, value in (("query", query), ("key", key)):
        if dim > 1 and value.stride(-1) != 1 and not torch._C._functorch.is_functorch_wrapped_tensor(value):
            raise ValueError(
                f"{op}: {name} must be contiguous in its last dimension, got strides {tuple(value.stride())}; "
                f"give a view that keeps D last, or {name}.contiguous()"
            )
    if scale is not None:
        _checks.number(op, "scale", scale)
        _checks.in_float32(op, "scale", scale)


def in_rows(value: torch.Tensor) -> torch.Tensor:
    """`value` with its last dimension contiguous, which vmap may have changed."""
    return value if value.stride(-1) == 1 else value.contiguous()


def _check(query: torch.Tensor, key: torch.Tensor, scale: float | None, key_mask: torch.Tensor | None) -> None:
    op = "last_query_scores"
    check(op, query, key, scale)
    check_keys(op, query, key, key_mask)


def check_keys(op: str, query: torch.Tensor, key: torch.Tensor, key_mask: torch.Tensor | None) -> None:
    """The checks of padded keys (B, S, Hkv, D)."""
    if key.shape[0] != query.shape[0]:
        raise ValueError(f"{op}: key must have the batch size of query, {query.shape[0]}, got {key.shape[0]}")
    if key.shape[1] == 0:
        raise ValueError(f"{op}: key must have at least one position, got shape {tuple(key.shape)}")
    if key_mask is not None:
        _checks.per_token(op, "key_mask", key_mask, (torch.bool,), key, "(B, S)", "query")


def _fake(
    query: torch.Tensor, key: torch.Tensor, scale: float | None = None, key_mask: torch.Tensor | None = None
) -> torch.Tensor:
    _check(query, key, scale, key_mask)
    return query.new_empty((key.shape[0], key.shape[1]), dtype=torch.float32)


def _triton(
    query: torch.Tensor, key: torch.Tensor, scale: float | None = None, key_mask: torch.Tensor | None = None
) -> torch.Tensor:
    from . import _last_query_scores_triton as kernels

    _check(query, key, scale, key_mask)
    return kernels.scores(query, key, scale, key_mask)


def item_scores(
    query: torch.Tensor, key: torch.Tensor, scale: float | None, allowed: torch.Tensor | None = None
) -> torch.Tensor:
    """One item: query (Hq, D), key (S, Hkv, D), allowed (S,) bool or None -> (S,) float32."""
    (heads, dim), (keys, kv_heads, _) = query.shape, key.shape
    groups = query.float().mul(dim**-0.5 if scale is None else scale).reshape(kv_heads, heads // kv_heads, dim)
    logits = groups.new_empty(kv_heads, heads // kv_heads, keys)
    chunk = keys if key.dtype == torch.float32 else max(1, CHUNK // (kv_heads * dim))
    for part, out in zip(key.split(chunk), logits.split(chunk, dim=-1), strict=True):
        out.copy_(torch.bmm(groups, part.float().permute(1, 2, 0)))
    if allowed is None:
        return logits.softmax(-1).mean((0, 1))
    return torch.where(allowed, logits.masked_fill_(~allowed, -math.inf).softmax(-1).mean((0, 1)), 0.0)


@define_op(
    "last_query_scores(Tensor query, Tensor key, float? scale=None, Tensor? key_mask=None) -> Tensor",
    fake=_fake,
    triton=_triton,
    vmap=fold(lambda query, key, *rest: last_query_scores(in_rows(query), in_rows(key), *rest)),
)
def last_query_scores_reference(
    query: torch.Tensor, key: torch.Tensor, scale: float | None = None, key_mask: torch.Tensor | None = None
) -> torch.Tensor:
    _check(query, key, scale, key_mask)
    out = query.new_empty(key.shape[:2], dtype=torch.float32)
    for item in range(len(out)):
        out[item] = item_scores(query[item], key[item], scale, None if key_mask is None else key_mask[item])
    return out


def last_query_scores(
    query: torch.Tensor, key: torch.Tensor, scale: float | None = None, key_mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Attention weights of one query row over the cached keys, mean over its heads (STS Eq. 6).

    ``mean_h softmax_s(scale * query[b, h] . key[b, s, h // (Hq // Hkv)])``: one row of the attention matrix, which
    FlashAttention and scaled_dot_product_attention never store. The op reads the keys once.

    Args:
        query: (B, Hq, D) float32, float16 or bfloat16: the query row, after rotary embedding. D is at least 1.
        key: (B, S, Hkv, D) of the same dtype, FlashAttention's layout, after rotary embedding. Hkv divides Hq; query
            head h reads key head h // (Hq // Hkv). Any strides, but D must be contiguous. Pass a Hugging Face cache
            (B, Hkv, S, D) as ``cache.transpose(1, 2)``, without a copy. S is at least 1; tested to 131072.
        scale: multiplies the dot products; None: 1 / sqrt(D).
        key_mask: (B, S) bool, True where a key may be attended to (padding, causality). None: everywhere.

    Returns:
        (B, S) float32. Masked keys score 0, whatever they hold. The allowed keys of an item sum to 1. An item without
        allowed keys is 0. A NaN or infinity in `query` or in an allowed key, or a scaled dot product beyond float32's
        range, may make all allowed scores of its item NaN. The same input gives the same output, bit for bit, whatever
        else is in the batch. requires_grad is False: the scores have no derivative.

    Raises:
        TypeError, ValueError: wrong dtype, shape, device, strides or scale.
        NotImplementedError: forward-mode AD or torch.func differentiates `query` or `key`.

    Cost:
        reads the keys once: B S Hkv D elements, for 2 B S Hq D flops. Scratch of B S Hq floats, none proportional to D.
        On a GPU two kernel launches, or one if an item has few keys; nothing is read back to the host.
    """
    _check(query, key, scale, key_mask)
    return ops.last_query_scores.default(query, key, scale, key_mask)
