"""float64 brute force for attention scores, and the inputs that the tests of both layouts share."""

import math

import torch

# Absolute tolerance of scores, which lie in [0, 1]: float32 sums of 256 products and of 131072 exponentials.
ATOL = 2e-6


def scores(query, key, scale=None, key_mask=None):
    """query (B, Hq, D), key (B, S, Hkv, D) -> (B, S) float64 on the CPU, one head of one item at a time."""
    query, key = query.detach().cpu().double(), key.detach().cpu().double()
    group = query.shape[1] // key.shape[2]
    scale = query.shape[2] ** -0.5 if scale is None else scale
    out = torch.zeros(key.shape[:2], dtype=torch.float64)
    for b in range(len(out)):
        allowed = torch.ones(key.shape[1], dtype=torch.bool) if key_mask is None else key_mask[b].cpu()
        for head in range(query.shape[1]):
            logits = scale * (key[b, :, head // group][allowed] @ query[b, head])
            if len(logits):
                weight = (logits - logits.max()).exp()
                out[b, allowed] += weight / weight.sum() / query.shape[1]
    return out


def inputs(batch, keys, heads, kv_heads, dim, dtype=torch.float32, device="cpu", seed=0):
    """Normal query (B, Hq, D) and key (B, S, Hkv, D), rounded to dtype."""
    rng = torch.Generator().manual_seed(seed)
    query = torch.randn(batch, heads, dim, generator=rng).to(dtype)
    key = torch.randn(batch, keys, kv_heads, dim, generator=rng).to(dtype)
    return query.to(device), key.to(device)


def left_padding(batch, keys):
    """(B, S) mask: row b starts with more padding than row b - 1; the last of several rows is all padding."""
    mask = torch.arange(keys) >= torch.arange(batch)[:, None] * math.ceil(keys / 7)
    mask[-1] &= batch == 1
    return mask


def holes(batch, keys):
    rng = torch.Generator().manual_seed(1)
    return torch.rand(batch, keys, generator=rng) > 0.4


def error(got, expected) -> float:
    assert got.dtype == torch.float32
    assert got.shape == expected.shape
    return (got.cpu().double() - expected).abs().max().item() if expected.numel() else 0.0


def received(query, key, scale=None, row_weight=None, row_position=None, key_mask=None, per_head=False):
    """query (B, R, Hq, D), key (B, S, Hkv, D) -> (B, Hq, S) or (B, S) float64 on the CPU, one row at a time."""
    query, key = query.detach().cpu().double(), key.detach().cpu().double()
    batch, rows, heads, dim = query.shape
    keys = key.shape[1]
    key = key.repeat_interleave(heads // key.shape[2], 2)
    scale = dim**-0.5 if scale is None else scale
    out = torch.zeros(batch, heads, keys, dtype=torch.float64)
    for b in range(batch):
        counted = 0.0
        for r in range(rows):
            weight = 1.0 if row_weight is None else row_weight[b, r].item()
            allowed = torch.ones(keys, dtype=torch.bool) if key_mask is None else key_mask[b].cpu().clone()
            if row_position is not None:
                allowed[max(0, row_position[b, r].item() + 1) :] = False
            if weight and allowed.any():
                logits = scale * torch.einsum("shd,hd->hs", key[b, allowed], query[b, r])
                out[b, :, allowed] += weight * logits.softmax(-1)
                counted += weight
        if counted:
            out[b] /= counted
    return out if per_head else out.mean(1)


def received_inputs(batch, rows, keys, heads, kv_heads, dim, dtype=torch.float32, device="cpu", seed=0):
    """Normal query (B, R, Hq, D) and key (B, S, Hkv, D), rounded to dtype."""
    rng = torch.Generator().manual_seed(seed)
    query = torch.randn(batch, rows, heads, dim, generator=rng).to(dtype)
    key = torch.randn(batch, keys, kv_heads, dim, generator=rng).to(dtype)
    return query.to(device), key.to(device)


def row_options(batch, rows, keys, kinds, device="cpu", seed=2):
    """row_weight, row_position and key_mask by name, for `kinds` out of "weight", "position" and "mask"."""
    rng = torch.Generator().manual_seed(seed)
    made = {}
    if "weight" in kinds:
        weight = torch.rand(batch, rows, generator=rng)
        made["row_weight"] = weight * (torch.rand(batch, rows, generator=rng) > 0.3)
    if "position" in kinds:  # causal; the last rows see all keys, every 11th row any number or none
        position = torch.arange(rows).expand(batch, rows) + keys - rows + 3
        wild = torch.randint(-2 * keys, 3 * keys, (batch, rows), generator=rng)
        made["row_position"] = torch.where(torch.arange(rows) % 11 == 5, wild, position)
    if "mask" in kinds:
        made["key_mask"] = holes(batch, keys)
    return {name: value.to(device) for name, value in made.items()}
