"""LLaVA-NeXT: an image is a base crop and crops of its best resolution, with newlines between rows."""

import sys
from collections.abc import Sequence

import torch

from ..untyped import Model
from ..visual_item import VisualItem, square
from . import base


def crops_of(model: Model, size: torch.Tensor | Sequence[int]) -> int:
    """Number of crops of an image of this (height, width), the base crop included."""
    crops = sys.modules[type(model).__module__].image_size_to_num_patches
    side = model.config.vision_config.image_size
    return crops(image_size=size, grid_pinpoints=model.config.image_grid_pinpoints, patch_size=side)


def layout(model: Model, call: base.EncodeCall, shape: torch.Size) -> list[VisualItem]:
    """shape: (crops of all images, tokens, C). The number of crops follows from the image's size.

    The model's own packing, run on token numbers, tells which tokens survive unpadding and where newlines go.
    """
    config, tokens = model.config, shape[1]
    sizes = torch.as_tensor(call.arguments["image_sizes"], device="cpu")
    strategy = call.arguments.get("vision_feature_select_strategy") or config.vision_feature_select_strategy
    items = []
    for size in sizes:
        crops = crops_of(model, size)
        numbers = torch.arange(crops * tokens, dtype=torch.float64, device="cpu").view(crops, tokens, 1)
        newline = torch.tensor([-1.0], dtype=torch.float64, device="cpu")
        with torch.device("cpu"):  # independent of the default device
            packed, _ = model.pack_image_features(
                [numbers], size[None], vision_feature_select_strategy=strategy, image_newline=newline
            )
        items.append(VisualItem("image", [tokens] * crops, [square(tokens)] * crops, packed[0][:, 0].long()))
    return items


class FixedCropEncoder(base.FixedEncoder):
    """Pixel values (images, max crops of an image, 3, H, W), or (crops of all images, 3, H, W)."""

    def crops(self, model: Model, call: base.EncodeCall) -> list[int]:
        """Number of crops of each image."""
        return [crops_of(model, size) for size in torch.as_tensor(call.arguments["image_sizes"], device="cpu").tolist()]

    def shape(self, model: Model, call: base.EncodeCall) -> base.EncoderShape:
        sizes = torch.as_tensor(call.arguments["image_sizes"], device="cpu").tolist()
        crops, pixels = self.crops(model, call), call.arguments["pixel_values"].shape
        features = (sum(crops), base.tower_tokens(model, model.vision_tower))
        stride = pixels[1] if len(pixels) == 5 else None
        return base.EncoderShape(features, (tuple(map(tuple, sizes)), tuple(crops), stride))

    def tables(self, model: Model, shape: base.EncoderShape) -> dict[str, torch.Tensor]:
        _, crops, stride = shape.sizes
        if stride is None:
            return {}
        numbers = [image * stride + crop for image, count in enumerate(crops) for crop in range(count)]
        return {"crops": torch.tensor(numbers, device="cpu")}

    def run(self, model: Model, tables: dict[str, torch.Tensor], pixel_values: torch.Tensor) -> base.Features:
        crops = pixel_values.flatten(0, 1)[tables["crops"]] if "crops" in tables else pixel_values
        return base.Features(base.tower_features(model, model.vision_tower, crops))

    def separator(self, model: Model) -> torch.Tensor:
        return model.image_newline


ADAPTERS = [
    base.ModelAdapter(
        "LLaVA-NeXT",
        ("llava_next",),
        base.multi_modal_projector,
        layout,
        base.llava_attention,
        base.without_class_token,
        prune_layer=16,
        last_attention=base.llava_last_attention,
        fixed_encoder=FixedCropEncoder(),
    )
]
