"""Inputs of the tests that hold for every method. A new method is found by its name."""

import torch

from sts_kernels import methods
from sts_kernels.methods import Method, Selection

NAMES = methods.names()
SELECTING = [name for name in NAMES if methods.create(name).site]
ARGUMENTS = {"features": "features", "attention": "scores", "relevance": "scores", "keys": "keys", "text": "text"}
COUNTS = (40, 17, 1, 0, 40, 17)
ITEM = 40  # tokens of the longest item


def signals(method: Method, device="cpu") -> dict[str, torch.Tensor]:
    """Random arguments of `select` that the method needs, with one item for each of COUNTS. Features alone for a method
    that needs none."""
    batch, tokens, rng = len(COUNTS), ITEM, torch.Generator().manual_seed(0)
    made = {
        "features": torch.randn(batch, tokens, 24, generator=rng),
        "scores": torch.rand(batch, tokens, generator=rng),
        "keys": torch.randn(batch, tokens, 16, generator=rng),
        "text": torch.randn(batch, 5, 24, generator=rng),
    }
    needed = {ARGUMENTS[signal] for signal in method.signals} or {"features"}
    return {name: value.to(device) for name, value in made.items() if name in needed}


def parts(value: torch.Tensor, lengths) -> torch.Tensor:
    """Packs padded rows (B, N, ...) into (sum of lengths, ...)."""
    return torch.cat([value[item, :length] for item, length in enumerate(lengths)])


def packed(given: dict, lengths) -> dict:
    return {name: value if name == "text" else parts(value, lengths) for name, value in given.items()}


def alone(method: Method, given: dict, item: int, length: int, k: int) -> Selection:
    """The selection of one item by itself, without padding."""
    own = {name: v[item : item + 1] if name == "text" else v[item : item + 1, :length] for name, v in given.items()}
    return method.select(k=k, **own)
