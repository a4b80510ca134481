"""Random tokens: a baseline."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from .. import _checks
from .base import Method, Pool, Selection, option

_MASK = 0xFFFFFFFF  # 32-bit arithmetic in int64: products wrap mod 2^64, so their low 32 bits are exact


def _scramble(value: Any) -> Any:
    """The finaliser of MurmurHash3, a bijection of 32-bit numbers. Takes an int or an int64 tensor."""
    value = ((value ^ (value >> 16)) * 0x85EBCA6B) & _MASK
    value = ((value ^ (value >> 13)) * 0xC2B2AE35) & _MASK
    return value ^ (value >> 16)


@dataclass(frozen=True)
class Random(Method):
    """Tokens in a pseudo-random order that depends on `seed` only: the same in any batch and on any device.

    Token values are not read.
    """

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
