"""Attention that each token of the vision encoder receives."""

import itertools
import math
from typing import TypeAlias

import torch

from ...ops import attention_received, last_query_scores
from .untyped import Kwargs

AttentionCall: TypeAlias = tuple[torch.Tensor, torch.Tensor, float]  # query and key (n, heads, tokens, D), scale


def cls_attention(query: torch.Tensor, key: torch.Tensor, scale: float) -> torch.Tensor:
    """Attention of [CLS], token 0, to each token. query, key: (n, heads, tokens, D) -> (n, tokens) float32."""
    return last_query_scores(query[:, :, 0].contiguous(), key.transpose(1, 2), scale)


def mean_attention(query: torch.Tensor, key: torch.Tensor, scale: float) -> torch.Tensor:
    """Attention to each token, mean over all tokens: for encoders without [CLS]. -> (n, tokens) float32."""
    return attention_received(query.transpose(1, 2), key.transpose(1, 2), scale)


def received(query: torch.Tensor, key: torch.Tensor, scale: float) -> torch.Tensor:
    """`cls_attention` if tokens = 1 + s^2, a square grid with [CLS]; else `mean_attention`. -> (n, tokens) float32."""
    has_class_token = math.isqrt(query.shape[2] - 1) ** 2 == query.shape[2] - 1
    return (cls_attention if has_class_token else mean_attention)(query, key, scale)


def calls_of(query: torch.Tensor, key: torch.Tensor, kwargs: Kwargs) -> list[AttentionCall]:
    """One forward of the vision attention -> (query, key, scale) of each set of tokens that attend to each other.

    Qwen's encoder packs images along the tokens of one row, with bounds in cu_seq_lens_q, or calls once per image.
    """
    scale = kwargs.get("scaling") or query.shape[-1] ** -0.5
    bounds = kwargs.get("cu_seq_lens_q")
    if bounds is None:
        return [(query, key, scale)]
    bounds = bounds.tolist()
    return [(query[:, :, a:b], key[:, :, a:b], scale) for a, b in itertools.pairwise(bounds)]


def one_head(query: torch.Tensor, key: torch.Tensor, scale: float) -> AttentionCall:
    """The same call with the channels of all heads concatenated into one head."""
    query, key = (x.transpose(1, 2).flatten(2)[:, None] for x in (query, key))
    return query, key, query.shape[-1] ** -0.5
