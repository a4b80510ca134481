"""Every N/K-th token: the baseline of every table."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from .base import Method, Pool, Selection


@dataclass(frozen=True)
class Uniform(Method):
    """Tokens floor(i N / K), i = 0 .. K - 1: exactly K, distinct, evenly spread. No token's value is looked at.

    Even in the order of the features: Qwen2.5-VL has those of a picture attention window by attention window.
    """

    name: ClassVar[str] = "uniform"
    paper: ClassVar[str] = "baseline of VisPruner, Fig. 5, arXiv 2412.01818"
    nested: ClassVar[bool] = False

    def pick(self, pool: Pool) -> Selection:
        count = pool.count[:, None]
        kept = count.clamp(min=1, max=pool.k)
        return Selection(torch.arange(pool.k, device=pool.device) * count // kept)
