"""Every (N/k)-th token: a baseline."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from .base import Method, Pool, Selection


@dataclass(frozen=True)
class Uniform(Method):
    """Tokens floor(i N / k), i = 0 .. k - 1: exactly k, distinct, evenly spread. Token values are not read.

    Spacing is even in feature order. Qwen2.5-VL orders the features of an image by attention window.
    """

    name: ClassVar[str] = "uniform"
    paper: ClassVar[str] = "baseline of VisPruner, Fig. 5, arXiv 2412.01818"
    nested: ClassVar[bool] = False

    def pick(self, pool: Pool) -> Selection:
        count = pool.count[:, None]
        kept = count.clamp(min=1, max=pool.k)
        return Selection(torch.arange(pool.k, device=pool.device) * count // kept)
