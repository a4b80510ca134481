"""Attention that each key receives from all query rows, without storing the attention matrix."""

import math

import torch

from .. import _checks
from .._registry import define_op, ops
from .._transforms import fold
from .last_query_scores import check, check_keys, in_rows

BLOCK = 1 << 19  # attention weights per block of the reference
MIN_ROWS = 32  # min query rows per block: fewer would read the keys too often


def _check(
    query: torch.Tensor,
    key: torch.Tensor,
    scale: float | None,
    row_weight: torch.Tensor | None,
    row_position: torch.Tensor | None,
    key_mask: torch.Tensor | None,
    per_head: bool,
) -> None:
    op = "attention_received"
    check(op, query, key, scale, query_shape="(B, R, Hq, D)")
    check_keys(op, query, key, key_mask)
    if query.shape[1] == 0:
        raise ValueError(f"{op}: query must have at least one row, got shape {tuple(query.shape)}")
    for name, value, dtypes in (
        ("row_weight", row_weight, _checks.FLOATING),
        ("row_position", row_position, _checks.INTEGER),
    ):
        if value is not None:
            _checks.per_token(op, name, value, dtypes, query, "(B, R)", "query")
    _checks.flag(op, "per_head", per_head)


def _out(query: torch.Tensor, key: torch.Tensor, per_head: bool) -> torch.Tensor:
    (batch, keys), heads = key.shape[:2], query.shape[2]
    return query.new_empty((batch, heads, keys) if per_head else (batch, keys), dtype=torch.float32)


def _fake(
    query: torch.Tensor,
    key: torch.Tensor,
    scale: float | None = None,
    row_weight: torch.Tensor | None = None,
    row_position: torch.Tensor | None = None,
    key_mask: torch.Tensor | None = None,
    per_head: bool = False,
) -> torch.Tensor:
    _check(query, key, scale, row_weight, row_position, key_mask, per_head)
    return _out(query, key, per_head)


def _triton(
    query: torch.Tensor,
    key: torch.Tensor,
    scale: float | None = None,
    row_weight: torch.Tensor | None = None,
    row_position: torch.Tensor | None = None,
    key_mask: torch.Tensor | None = None,
    per_head: bool = False,
) -> torch.Tensor:
    from . import _attention_received_triton as kernels

    _check(query, key, scale, row_weight, row_position, key_mask, per_head)
    out = _out(query, key, per_head)
    return kernels.received(out, query, key, scale, row_weight, row_position, key_mask, per_head)


def _item(
    query: torch.Tensor,
    key: torch.Tensor,
    scale: float,
    weight: torch.Tensor | None,
    position: torch.Tensor | None,
    allowed: torch.Tensor | None,
) -> torch.Tensor:
    """One item: query (R, Hq, D), key (S, Hkv, D), weight and position (R,), allowed (S,) -> (Hq, S) float32."""
    (rows, heads, _), (keys, kv_heads, _) = query.shape, key.shape
    group = heads // kv_heads
    received = query.new_zeros(heads, keys, dtype=torch.float32)
    column = torch.arange(keys, device=key.device)
    if allowed is not None:
        column, key = column[allowed], key[allowed]
    weight = query.new_ones(rows, dtype=torch.float32) if weight is None else weight.float()
    row = weight.nonzero()[:, 0]
    if position is not None and len(column):
        row = row[position[row] >= column[0]]
    total = weight[row].sum()
    if not len(row) or not len(column) or total == 0:
        return received
    weight = weight / total
    size = min(len(row), -(-max(MIN_ROWS, BLOCK // len(column)) // group))
    buffer = received.new_empty(group * size * len(column))
    sums = received if allowed is None else received.new_zeros(heads, len(column))
    for kv_head in range(kv_heads):
        mine = slice(kv_head * group, (kv_head + 1) * group)
        keys_of_head = key[:, kv_head].float().T
        for part in row.split(size):
            queries = (query[part, mine].float() * scale).transpose(0, 1).flatten(0, 1)
            seen = len(column)
            if position is not None:
                seen = int((column <= position[part].max()).sum())
            logits = buffer[: len(queries) * seen].view(len(queries), seen)
            torch.mm(queries, keys_of_head[:, :seen], out=logits)
            if position is not None:
                logits.view(group, len(part), seen).masked_fill_(column[:seen] > position[part, None], -math.inf)
            weights = torch.softmax(logits, -1, out=logits).view(group, len(part), seen)
            sums[mine, :seen].unsqueeze(1).baddbmm_(weight[part].expand(group, 1, -1), weights)
    if allowed is not None:
        received[:, column] = sums
    return received


@define_op(
    "attention_received(Tensor query, Tensor key, float? scale=None, Tensor? row_weight=None, "
    "Tensor? row_position=None, Tensor? key_mask=None, bool per_head=False) -> Tensor",
    fake=_fake,
    triton=_triton,
    vmap=fold(lambda query, key, *rest: attention_received(in_rows(query), in_rows(key), *rest)),
)
def attention_received_reference(
    query: torch.Tensor,
    key: torch.Tensor,
    scale: float | None = None,
    row_weight: torch.Tensor | None = None,
    row_position: torch.Tensor | None = None,
    key_mask: torch.Tensor | None = None,
    per_head: bool = False,
) -> torch.Tensor:
    _check(query, key, scale, row_weight, row_position, key_mask, per_head)
    out = _out(query, key, per_head)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    for item in range(len(out)):
        weight, position, mask = (None if v is None else v[item] for v in (row_weight, row_position, key_mask))
        received = _item(query[item], key[item], scale, weight, position, mask)
        out[item] = received if per_head else received.mean(0)
    return out


def attention_received(
    query: torch.Tensor,
    key: torch.Tensor,
    scale: float | None = None,
    row_weight: torch.Tensor | None = None,
    row_position: torch.Tensor | None = None,
    key_mask: torch.Tensor | None = None,
    per_head: bool = False,
) -> torch.Tensor:
    """Attention that each key receives: the weighted mean over query rows, and the mean over heads.

    ``mean_h sum_r w_r softmax_s(scale * query[b, r, h] . key[b, s, h // (Hq // Hkv)])`` with ``w = row_weight /
    row_weight.sum()``: the column means of the attention matrix, which FlashAttention and scaled_dot_product_attention
    never store. With one row the op is `last_query_scores`.

    Args:
        query: (B, R, Hq, D) float32, float16 or bfloat16, FlashAttention's layout, after rotary embedding. R and D are
            at least 1.
        key: (B, S, Hkv, D) of the same dtype, after rotary embedding. Hkv divides Hq; query head h reads key head h //
            (Hq // Hkv). S is at least 1. `query` and `key` take any strides, but D must be contiguous. Pass a Hugging
            Face layer's (B, H, S, D) as ``x.transpose(1, 2)``, without a copy.
        scale: multiplies the dot products; None: 1 / sqrt(D).
        row_weight: (B, R) float32, float16 or bfloat16, at least 0; their sum is 0 or a normal float32 (1.2e-38 to
            3.4e38). None: all weights equal. A row of weight 0 does not count, whatever it holds.
        row_position: (B, R) int64 or int32: row r sees keys 0 to row_position[r], as in causal attention. Negative: no
            key. S - 1 or more: all keys. None: all rows see all keys.
        key_mask: (B, S) bool, True where a key may be attended to. None: everywhere.
        per_head: True: no mean over heads.

    Returns:
        (B, S) float32; (B, Hq, S) with per_head. Masked keys receive 0, whatever they hold. Rows that see no key do not
        count. The output of an item (and head) sums to 1, or is 0 if no row counts or the weights sum to 0. A NaN or
        infinity in a row that counts, or in a key that such a row sees, or their scaled dot product beyond float32's
        range, may make the item NaN at all allowed keys. The same input gives the same output, bit for bit, whatever
        else is in the batch. requires_grad is False: the attention received has no derivative.

    Raises:
        TypeError, ValueError: wrong dtype, shape, device, strides or scale.
        NotImplementedError: forward-mode AD or torch.func differentiates `query`, `key` or `row_weight`.

    Cost:
        no (R, S) matrix. On a GPU two passes, 4 B R S Hq D flops and scratch of 2 B Hq R + B Hq S floats; nothing is
        read back to the host. On the CPU one pass, 2 B R S Hq D flops, in blocks of 2 MB (32 rows if S > 16384). Rows
        of weight 0 cost nothing. With row_position, keys that no row of a block sees cost nothing.
    """
    _check(query, key, scale, row_weight, row_position, key_mask, per_head)
    return ops.attention_received.default(query, key, scale, row_weight, row_position, key_mask, per_head)
