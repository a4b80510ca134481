"""Raters: the text tokens most similar to the visual tokens of a prompt (SparseVLM, PolyMorphic)."""

import torch
from torch import Tensor


def alignment(visual: Tensor, text: Tensor, text_mask: Tensor, scale: float) -> Tensor:
    """(B, N, M) float64: softmax over the text tokens of scale * visual @ text^T.

    visual: (B, N, C). text: (B, M, C). text_mask: (B, M) bool, False: padding. Masked and non-finite text tokens get 0.
    The row of a non-finite visual token is all 0.
    """
    (visual, seen), (text, usable) = _finite(visual), _finite(text)
    logits = (visual @ text.mT).double() * scale
    aligned = logits.masked_fill(~(usable & text_mask)[:, None], torch.finfo(torch.float64).min).softmax(-1)
    return aligned * (usable & text_mask)[:, None] * seen[..., None]


def _finite(x: Tensor) -> tuple[Tensor, Tensor]:
    finite = x.isfinite().all(-1)
    return torch.where(finite[..., None], x, 0).float(), finite


def raters(aligned: Tensor, text_mask: Tensor) -> Tensor:
    """(B, M) float32 weights of sum 1, equal over the text tokens whose alignment is above the mean, else 0.

    If no text token is above the mean, all unmasked ones weigh the same. A prompt without text gets 0 throughout.
    aligned: (B, N, M) from `alignment`; rows of absent visual tokens must be 0.
    """
    score, count = aligned.sum(1), text_mask.sum(1, keepdim=True)
    # score > mean, multiplied by count. The margin absorbs rounding among equal scores.
    above = (score * count > score.sum(1, keepdim=True) * (1 + 1e-6)) & text_mask
    chosen = torch.where(above.any(1, keepdim=True), above, text_mask)
    return chosen.float() / chosen.sum(1, keepdim=True).clamp(min=1)
