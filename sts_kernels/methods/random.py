"""Random tokens: the baseline of every table."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from .. import _checks
from .base import Method, Pool, Selection, option

_MASK = 0xFFFFFFFF  # 32-bit arithmetic in int64: products wrap at 2^64, their low 32 bits are right


def _scramble(value: Any) -> Any:
    """The finaliser of MurmurHash3: a bijection of 32-bit numbers. A tensor or an int, the same on every device."""
    value = ((value ^ (value >> 16)) * 0x85EBCA6B) & _MASK
    value = ((value ^ (value >> 13)) * 0xC2B2AE35) & _MASK
    return value ^ (value >> 16)


@dataclass(frozen=True)
class Random(Method):
    """Tokens in a random order that depends on `seed` alone, and so is the same for an item in any batch and on any
    device. No token's value is looked at."""

    name: ClassVar[str] = "random"
    paper: ClassVar[str] = "baseline of VisPruner, Fig. 3c, arXiv 2412.01818"

    seed: int = option(0, "other seeds give other orders; 0 to 2^63 - 1")

    def __post_init__(self) -> None:
        _checks.integer(self.name, "seed", self.seed, 0, 2**63 - 1)

    def pick(self, pool: Pool) -> Selection:
        low, high = _scramble(self.seed & _MASK), _scramble((self.seed >> 32) + 1)
        position = torch.arange(pool.tokens, device=pool.device)
        drawn = _scramble(_scramble(position ^ low) ^ high).expand_as(pool.present)
        return Selection(drawn.masked_fill(~pool.present, -1).sort(dim=1, descending=True).indices[:, : pool.k])
