"""LLaVA-NeXT: an image is a base crop and crops of its best resolution, with newlines between rows."""

import sys

import torch

from ..visual_item import VisualItem, square
from . import base


def layout(model, call, shape):
    """(crops of all images, tokens, C): the number of crops follows from the image's size, and which of their tokens
    survive unpadding, and where newlines go, from the model's own packing of their numbers."""
    config, tokens = model.config, shape[1]
    crops_of = sys.modules[type(model).__module__].image_size_to_num_patches
    sizes = torch.as_tensor(call.arguments["image_sizes"], device="cpu")
    strategy = call.arguments.get("vision_feature_select_strategy") or config.vision_feature_select_strategy
    items = []
    for size in sizes:
        crops = crops_of(
            image_size=size, grid_pinpoints=config.image_grid_pinpoints, patch_size=config.vision_config.image_size
        )
        numbers = torch.arange(crops * tokens, dtype=torch.float64, device="cpu").view(crops, tokens, 1)
        newline = torch.tensor([-1.0], dtype=torch.float64, device="cpu")
        with torch.device("cpu"):  # whatever the default device
            packed, _ = model.pack_image_features(
                [numbers], size[None], vision_feature_select_strategy=strategy, image_newline=newline
            )
        items.append(VisualItem("image", [tokens] * crops, [square(tokens)] * crops, packed[0][:, 0].long()))
    return items


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
    )
]
