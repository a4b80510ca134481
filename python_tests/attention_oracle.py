"""float64 brute force for attention scores, and the inputs that the tests of both layouts share."""

import math

import torch

# What the ops are held to, for weights between 0 and 1: float32 sums of 256 products and of 131072 exponentials.
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
    """Row b starts with a few more padding keys than row b - 1; the last row has nothing but padding."""
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
