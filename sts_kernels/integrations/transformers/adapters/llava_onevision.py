"""LLaVA-OneVision: an image is a base crop and a mosaic of crops; the model shrinks large mosaics, and frames of clips.

Where a prompt has several images, each is its base crop alone. A newline follows each row of a mosaic, each base crop
without a mosaic, and each clip.
"""

import math

import torch

from ..untyped import Model
from ..visual_item import Blend, VisualItem, square
from . import base, llava_next

UNLIMITED = f"anyres_max_{10**9}"  # crops that a mosaic may have before the model shrinks it


def crops_of(model: Model, call: base.EncodeCall) -> list[int]:
    """Number of crops of each image, the base crop included."""
    sizes = torch.as_tensor(call.arguments["image_sizes"], device="cpu").tolist()
    counts = call.arguments.get("batch_num_images")  # of images in each prompt; None: one
    counts = [1] * len(sizes) if counts is None else torch.as_tensor(counts, device="cpu").tolist()
    alone = [count == 1 for count in counts for _ in range(count)]
    return [llava_next.crops_of(model, size) if only else 1 for size, only in zip(sizes, alone, strict=True)]


def layout(model: Model, call: base.EncodeCall, shape: torch.Size) -> list[VisualItem]:
    """shape: (crops of all images, or frames of all clips, tokens, C)."""
    rows, tokens = shape[0], shape[1]
    with torch.device("cpu"):  # independent of the default device
        if call.kind == "image":
            sizes = torch.as_tensor(call.arguments["image_sizes"], device="cpu")
            ratio = call.arguments.get("vision_aspect_ratio") or model.config.vision_aspect_ratio
            crops = crops_of(model, call)
            return [image(model, size, n, tokens, ratio) for size, n in zip(sizes, crops, strict=True)]
        frames = base.frames_of(call)
        return [clip(model, frames, tokens)] * (rows // frames)


def image(model: Model, size: torch.Tensor, crops: int, tokens: int, ratio: str) -> VisualItem:
    """The model's own packing, run on row numbers, tells what unpadding leaves; run again, how far it shrinks."""
    if crops == 1:
        return VisualItem("image", [tokens], [square(tokens)], then_newline(tokens))
    rows = crops * tokens
    numbers, newline = torch.arange(rows, dtype=torch.float64).view(crops, tokens, 1), torch.tensor([-1.0]).double()

    def packed(limit: str) -> torch.Tensor:
        pack = model.pack_image_features
        return pack([numbers], size[None], image_newline=newline, vision_aspect_ratio=limit)[0][0][tokens:, 0]

    whole, mosaic = packed(UNLIMITED), packed(ratio) >= 0  # False: a newline
    height = int((~mosaic).sum())
    grids = [square(tokens), (height, len(mosaic) // height - 1)]
    whole = whole.view(int((whole < 0).sum()), -1)[:, :-1].long()
    blend = [Blend.same(torch.arange(tokens), rows), Blend.bilinear(whole, grids[1], rows)]
    is_feature = torch.cat([torch.ones(tokens, dtype=torch.bool), mosaic])
    features = torch.where(is_feature, is_feature.cumsum(0) - 1, -1)
    return VisualItem("image", [*map(math.prod, grids)], grids, features, Blend.joined(blend, shared=True))


def clip(model: Model, frames: int, tokens: int) -> VisualItem:
    grid = square(model.apply_pooling(torch.zeros(1, tokens, 1)).shape[1])
    numbers = torch.arange(frames * tokens).view(frames, *square(tokens))
    blend = Blend.joined([Blend.bilinear(frame, grid, frames * tokens) for frame in numbers], shared=True)
    crops = [math.prod(grid)] * frames
    return VisualItem("video", crops, [grid] * frames, then_newline(sum(crops)), blend)


def then_newline(features: int) -> torch.Tensor:
    return torch.cat([torch.arange(features), torch.tensor([-1])])


class FixedMosaicEncoder(llava_next.FixedCropEncoder):
    def crops(self, model: Model, call: base.EncodeCall) -> list[int]:
        return crops_of(model, call)


ADAPTERS = [
    base.ModelAdapter(
        "LLaVA-OneVision",
        ("llava_onevision",),
        base.multi_modal_projector,
        layout,
        base.llava_attention,
        base.without_class_token,
        fixed_encoder=FixedMosaicEncoder(),
        blends=True,
    )
]
