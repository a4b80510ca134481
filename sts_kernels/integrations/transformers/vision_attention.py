"""How much attention the vision encoder pays each of its tokens."""

import itertools
import math
from typing import TypeAlias

import torch

from ...ops import attention_received, last_query_scores
from .untyped import Kwargs

AttentionCall: TypeAlias = tuple[torch.Tensor, torch.Tensor, float]  # query and key (n, heads, tokens, D), scale


def cls_attention(query: torch.Tensor, key: torch.Tensor, scale: float) -> torch.Tensor:
    """What [CLS], token 0, pays each token: query and key (n, heads, tokens, D) -> (n, tokens) float32."""
    return last_query_scores(query[:, :, 0].contiguous(), key.transpose(1, 2), scale)


def mean_attention(query: torch.Tensor, key: torch.Tensor, scale: float) -> torch.Tensor:
    """What all tokens pay each token on average, for encoders without [CLS]: -> (n, tokens) float32."""
    return attention_received(query.transpose(1, 2), key.transpose(1, 2), scale)


def received(query: torch.Tensor, key: torch.Tensor, scale: float) -> torch.Tensor:
    """By [CLS] where there is one: 1 + n^2 tokens of a square picture. -> (n, tokens) float32."""
    has_class_token = math.isqrt(query.shape[2] - 1) ** 2 == query.shape[2] - 1
    return (cls_attention if has_class_token else mean_attention)(query, key, scale)


def calls_of(query: torch.Tensor, key: torch.Tensor, kwargs: Kwargs) -> list[AttentionCall]:
    """One forward of the vision attention -> (query, key, scale) of what attends to itself in it. Qwen's encoder packs
    images along the tokens of one row and says so in cu_seq_lens_q, or calls once an image."""
    scale = kwargs.get("scaling") or query.shape[-1] ** -0.5
    bounds = kwargs.get("cu_seq_lens_q")
    if bounds is None:
        return [(query, key, scale)]
    bounds = bounds.tolist()
    return [(query[:, :, a:b], key[:, :, a:b], scale) for a, b in itertools.pairwise(bounds)]


def one_head(query: torch.Tensor, key: torch.Tensor, scale: float) -> AttentionCall:
    """The same call with the channels of all heads side by side as one head's."""
    query, key = (x.transpose(1, 2).flatten(2)[:, None] for x in (query, key))
    return query, key, query.shape[-1] ** -0.5
