"""Attention of the last instruction token to the visual tokens, for a layer that runs SDPA and returns no weights.

    python examples/last_query_scores.py

One attention layer with grouped-query heads and rotary embeddings, on a left-padded batch of two prompts, computed by
scaled_dot_product_attention. Needs PyTorch and this package; no GPU, no weights.
"""

import torch
from torch.nn.functional import scaled_dot_product_attention

from sts_kernels import keep_top, last_query_scores, last_query_scores_varlen

BATCH, TOKENS, HEADS, KV_HEADS, DIM = 2, 48, 8, 2, 64
VISUAL = slice(10, 42)  # positions of the image tokens
KEEP = 8


def rotary(x, position, base=10000.0):
    """Rotary embedding: rotates the pairs (x[i], x[i + D/2]) of x (B, S, H, D) by position (B, S) * frequency[i]."""
    frequency = base ** -(torch.arange(0, DIM, 2, device=x.device) / DIM)
    angle = (position[..., None] * frequency)[:, :, None]
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()], dim=-1)


def main():
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    hidden = torch.randn(BATCH, TOKENS, HEADS * DIM, device=device)
    project = lambda heads: torch.nn.Linear(HEADS * DIM, heads * DIM, device=device)  # noqa: E731
    query, key, value = (
        project(n)(hidden).detach().mul(3).view(BATCH, TOKENS, n, DIM) for n in (HEADS, KV_HEADS, KV_HEADS)
    )
    mask = torch.ones(BATCH, TOKENS, dtype=torch.bool, device=device)
    mask[1, :6] = False  # the second prompt has six left-padding tokens

    # The layer: queries and keys are rotated before attention; the cache holds the rotated keys.
    position = (mask.cumsum(1) - 1).clamp(min=0)
    query, key = rotary(query, position), rotary(key, position)
    allowed = mask[:, None, None] & torch.ones(TOKENS, TOKENS, dtype=torch.bool, device=device).tril()
    allowed |= torch.eye(TOKENS, dtype=torch.bool, device=device)  # padding attends to itself: no row is fully masked
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))  # SDPA and Hugging Face caches: (B, H, S, D)
    scaled_dot_product_attention(q, k, v, allowed, enable_gqa=True)

    # The attention of the last token, mean over heads, computed from the cached keys.
    scores = last_query_scores(query[:, -1], k.transpose(1, 2), key_mask=mask)

    # The same from the full attention matrix.
    logits = q @ k.repeat_interleave(HEADS // KV_HEADS, 1).mT / DIM**0.5
    weights = logits.masked_fill(~allowed, -torch.inf).softmax(-1)
    expected = weights[:, :, -1].mean(1)
    print(f"largest difference from the whole attention matrix: {(scores - expected).abs().max():.1e}")
    torch.testing.assert_close(scores, expected, rtol=0, atol=2e-6)

    # Packed without padding, as for flash_attn_varlen_func: the same scores, prompts concatenated.
    lengths = mask.sum(1)
    cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
    packed = last_query_scores_varlen(query[:, -1], key[mask], cu_seqlens, max_seqlen=TOKENS)
    torch.testing.assert_close(packed, scores[mask], rtol=0, atol=2e-6)

    # Stage 2: keep the visual tokens with the highest scores, in sequence order.
    visual = torch.zeros_like(mask)
    visual[:, VISUAL] = True
    positions, _ = keep_top(scores, visual & mask, KEEP)
    for row, kept in enumerate(positions.tolist()):
        share = scores[row, positions[row]].sum() / scores[row, VISUAL].sum()
        print(f"prompt {row}: visual tokens {kept} stay, with {share:.0%} of the attention paid to the image")


if __name__ == "__main__":
    main()
