"""LLaVA-NeXT-Video: images as in LLaVA-NeXT; the patches of a frame are pooled before the projector."""

import math

import torch

from ..untyped import Model
from ..visual_item import VisualItem
from . import base, llava_next


def layout(model: Model, call: base.EncodeCall, shape: torch.Size) -> list[VisualItem]:
    """shape: (crops of all images, or frames of all clips, tokens, C)."""
    if call.kind == "image":
        return llava_next.layout(model, call, shape)
    return base.clips_of_frames(call, shape)


def of_pools(model: Model, values: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """The mean over the patches of a pool, whatever the mode of the pooling. A patch of an image is a pool of its
    own."""
    side, small = (math.isqrt(tokens) for tokens in (values.shape[1], shape[1]))
    if side == small:
        return base.without_class_token(model, values, shape)
    patches = values[:, values.shape[1] - side * side :].mT.unflatten(2, (side, side))  # without [CLS]
    return torch.nn.functional.avg_pool2d(patches, side // small).flatten(2).mT.flatten(0, 1)


ADAPTERS = [
    base.ModelAdapter(
        "LLaVA-NeXT-Video",
        ("llava_next_video",),
        base.multi_modal_projector,
        layout,
        base.llava_attention,
        of_pools,
        prune_layer=16,
        fixed_encoder=llava_next.FixedCropEncoder(),
    )
]
