"""Raters: the text tokens that the visual tokens of a prompt are most like (SparseVLM, PolyMorphic)."""

import torch
from torch import Tensor


def alignment(visual: Tensor, text: Tensor, text_mask: Tensor, scale: float) -> Tensor:
    """(B, N, M) float64: the softmax over the text tokens of each row of `scale` visual text^T.

    Masked text tokens, and those with a NaN or infinity, get 0; so do all for a visual token with one.
    """
    (visual, seen), (text, usable) = _finite(visual), _finite(text)
    logits = (visual @ text.mT).double() * scale
    aligned = logits.masked_fill(~(usable & text_mask)[:, None], torch.finfo(torch.float64).min).softmax(-1)
    return aligned * (usable & text_mask)[:, None] * seen[..., None]


def _finite(x: Tensor) -> tuple[Tensor, Tensor]:
    finite = x.isfinite().all(-1)
    return torch.where(finite[..., None], x, 0).float(), finite


def raters(aligned: Tensor, text_mask: Tensor) -> Tensor:
    """(B, M) float32 of sum 1: the text tokens of more than average alignment, each alike; all where none has more.

    aligned: (B, N, M) of `alignment`; rows of absent visual tokens are 0. A prompt without text weighs 0 throughout.
    """
    score, count = aligned.sum(1), text_mask.sum(1, keepdim=True)
    # The mean over the text tokens is the sum over their number; the margin hides the rounding of equal ones.
    above = (score * count > score.sum(1, keepdim=True) * (1 + 1e-6)) & text_mask
    chosen = torch.where(above.any(1, keepdim=True), above, text_mask)
    return chosen.float() / chosen.sum(1, keepdim=True).clamp(min=1)
