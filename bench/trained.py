"""Photographs shipped in Python packages, for analyses on a trained encoder's features.

For bench.features only. Install `REQUIREMENTS` and the encoder's requirements (sts_kernels/_dinov2.py) by hand.
"""

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from sts_kernels import _dinov2
from sts_kernels._cli import load_picture
from sts_kernels._dinov2 import PATCH, SIDE, SIZE, WEIGHTS, Activations, Encoder, pixels
from sts_kernels._errors import UserError, install
from sts_kernels._vision import centre_crop

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["PATCH", "SIDE", "SIZE", "WEIGHTS", "Activations", "Encoder", "crops", "photographs", "pixels", "square"]

REQUIREMENTS = ("pillow", "matplotlib", "scikit-image", "scikit-learn")
PHOTOGRAPHS = {
    "skimage": (
        *("astronaut.png", "brick.png", "camera.png", "chelsea.png", "coffee.png", "coins.png"),
        *("grass.png", "hubble_deep_field.jpg", "motorcycle_left.png", "rocket.jpg"),
    ),
    "sklearn": ("china.jpg", "flower.jpg"),
}
FOLDERS = {"skimage": "data", "sklearn": "datasets/images"}


def folder(module: str) -> Path:
    """Picture folder of an installed package. Does not import the package."""
    spec = importlib.util.find_spec(module)
    if spec is None:
        raise UserError(f"the photographs need {module}: {_dinov2.commands()} && {install(*REQUIREMENTS)}")
    return Path(next(iter(spec.submodule_search_locations))) / FOLDERS[module]


def photographs() -> dict[str, "Image"]:
    """RGB photographs by name."""
    return {
        Path(name).stem: load_picture(folder(module) / name) for module, names in PHOTOGRAPHS.items() for name in names
    }


def square(picture: "Image", side: int = SIDE) -> "Image":
    """Center crop of a picture, scaled to `side` patches per side."""
    return centre_crop(picture, side * PATCH, side)


def crops(picture: "Image", grid: int) -> torch.Tensor:
    """(1 + grid * grid, 3, SIZE, SIZE): the center crop, then its grid x grid tiles, as in LLaVA-NeXT."""
    whole = pixels(square(picture))[None]
    if not grid:
        return whole
    parts = pixels(square(picture, grid * SIDE)).unfold(1, SIZE, SIZE).unfold(2, SIZE, SIZE)
    return torch.cat([whole, parts.flatten(1, 2).transpose(0, 1)])
