"""How much attention the vision encoder pays each of its tokens, for STSConfig(anchor="saliency")."""

import itertools
import math

import torch

from ... import last_query_scores

CHUNK = 1 << 24  # attention weights held at a time


def of_class_token(query: torch.Tensor, key: torch.Tensor, scale: float) -> torch.Tensor:
    """What [CLS], token 0, pays each token: query and key (n, heads, tokens, D) -> (n, tokens) float32."""
    return last_query_scores(query[:, :, 0].contiguous(), key.transpose(1, 2), scale)


def of_all_tokens(query: torch.Tensor, key: torch.Tensor, scale: float) -> torch.Tensor:
    """What all tokens pay each token on average, for encoders without [CLS]: -> (n, tokens) float32."""
    items, heads, tokens, _ = query.shape
    received = torch.zeros(items, tokens, device=query.device)
    rows = max(1, CHUNK // (items * heads * tokens))
    for chunk in query.split(rows, dim=2):
        weights = (chunk.float() * scale) @ key.float().transpose(-1, -2)
        received += weights.softmax(-1).sum((1, 2))
    return received / (heads * tokens)


def calls_of(query: torch.Tensor, key: torch.Tensor, kwargs: dict) -> list[tuple]:
    """One forward of the vision attention -> (query, key, scale) of what attends to itself in it. Qwen's encoder packs
    images along the tokens of one row and says so in cu_seq_lens_q, or calls once an image."""
    scale = kwargs.get("scaling") or query.shape[-1] ** -0.5
    bounds = kwargs.get("cu_seq_lens_q")
    if bounds is None:
        return [(query, key, scale)]
    bounds = bounds.tolist()
    return [(query[:, :, a:b], key[:, :, a:b], scale) for a, b in itertools.pairwise(bounds)]


def of_square_images(calls: list[tuple]) -> torch.Tensor:
    """Encoders with one square image a row -> (n, patches or 1 + patches): by [CLS] if there is one."""
    (query, key, scale) = calls[0]
    tokens = query.shape[2]
    has_class_token = math.isqrt(tokens - 1) ** 2 == tokens - 1
    return (of_class_token if has_class_token else of_all_tokens)(query, key, scale)
