"""Seeded input data. The distribution matters: the number of picks per pass of the selection kernels depends on it."""

import math

import torch


def features(batch: int, tokens: int, channels: int, dtype: torch.dtype, device: torch.device, data: str = "gaussian"):
    """(B, N, C) tokens.

    data="gaussian": independent normal values; all tokens are about equally far apart. data="smooth": tokens on a
    square grid; neighbours are similar and channels have different scales, like features of a picture.
    """
    generator = torch.Generator(device=device).manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, device=device)

    if data == "gaussian":
        return normal(batch, tokens, channels).to(dtype)
    if data != "smooth":
        raise ValueError(f'data must be "gaussian" or "smooth", got {data!r}')
    side = math.isqrt(tokens - 1) + 1
    coarse = normal(batch, channels, 6, 6)
    field = torch.nn.functional.interpolate(coarse, size=(side, side), mode="bilinear", align_corners=True)
    scale = torch.arange(1, channels + 1, device=device).pow(-0.5)
    x = (field.flatten(2).mT[:, :tokens] + 0.3 * normal(batch, tokens, channels)) * scale
    return x.to(dtype).contiguous()
