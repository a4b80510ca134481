"""InternVL: an image is one or more tiles. A pixel shuffle merges the patches of a tile, 2x2 by default, into one
feature."""

import math

import torch

from ..untyped import Model
from ..visual_item import VisualItem, square
from . import base


def layout(model: Model, call: base.EncodeCall, shape: torch.Size) -> list[VisualItem]:
    """shape: (tiles of all images, tokens, C). An image is one run of placeholders, which gives its tiles.

    The model itself is not told which tiles form an image. Without a prompt, or where its runs do not fit, each tile
    counts as an image.
    """
    tiles, tokens = shape[0], shape[1]
    runs = call.placeholder_runs("image")
    if sum(runs) != tiles * tokens or any(run % tokens for run in runs):
        runs = [tokens] * tiles
    return [VisualItem("image", [tokens] * (run // tokens), [square(tokens)] * (run // tokens)) for run in runs]


def shuffled(model: Model, values: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """(tiles, tokens, D) -> (features, D): mean over the patches of each feature."""
    count, depth = values.shape[1:]
    side = math.isqrt(count)
    patches = values[:, count - side * side :].reshape(-1, side, side, depth)
    joined = model.pixel_shuffle(patches, scale_factor=model.config.downsample_ratio)
    return joined.flatten(0, 2).unflatten(-1, (-1, depth)).mean(1)


class FixedTileEncoder(base.FixedEncoder):
    """Pixel values (tiles of all images, 3, H, W)."""

    def shape(self, model: Model, call: base.EncodeCall) -> base.EncoderShape:
        tiles, _, *size = call.arguments["pixel_values"].shape
        patches = math.prod(n // patch for n, patch in zip(size, model.vision_tower.embeddings.patch_size, strict=True))
        tokens = round(patches * model.config.downsample_ratio**2)
        return base.EncoderShape((tiles, tokens), tuple(call.placeholder_runs("image")))

    def run(self, model: Model, tables: dict[str, torch.Tensor], pixel_values: torch.Tensor) -> base.Features:
        layer = model.config.vision_feature_layer
        states = {} if layer == -1 else {"output_hidden_states": True}
        out = model.vision_tower(pixel_values=pixel_values.to(model.dtype), return_dict=True, **states)
        hidden = out.last_hidden_state if layer == -1 else out.hidden_states[layer]
        hidden = hidden[:, int(base.class_token_dropped(model)) :]
        side = math.isqrt(hidden.shape[1])
        squares = hidden.unflatten(1, (side, side))
        return base.Features(model.pixel_shuffle(squares, scale_factor=model.config.downsample_ratio).flatten(1, 2))


ADAPTERS = [
    base.ModelAdapter(
        "InternVL",
        ("internvl",),
        base.multi_modal_projector,
        layout,
        base.llava_attention,
        shuffled,
        fixed_encoder=FixedTileEncoder(),
    )
]
