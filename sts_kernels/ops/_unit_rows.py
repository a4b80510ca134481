"""Rows of unit length, for the ops that compare directions."""

import torch

SMALLEST_NORMAL = torch.finfo(torch.float32).tiny


def unit_rows(x: torch.Tensor) -> torch.Tensor:
    """Rows of x (..., C) float32 divided by their length. A zero row stays zero.

    A row is first divided by the power of two of its largest entry, which is exact. So squares neither overflow nor
    underflow to a zero length, and a row whose length is a power of two stays exact.
    """
    largest = x.abs().amax(-1, keepdim=True).contiguous()
    power = (largest.view(torch.int32) & 0x7F800000).view(torch.float32).clamp(min=SMALLEST_NORMAL)
    x = x / power
    length = x.square().sum(-1, keepdim=True).sqrt()
    return x / torch.where(length > 0, length, 1.0)
