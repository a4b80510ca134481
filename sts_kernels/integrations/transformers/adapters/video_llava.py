"""Video-LLaVA: images, and clips whose frames keep their [CLS] token."""

import torch

from ..untyped import Model
from ..visual_item import VisualItem
from . import base


def layout(model: Model, call: base.EncodeCall, shape: torch.Size) -> list[VisualItem]:
    """(images or frames of all clips, tokens, C)."""
    if call.kind == "image":
        return base.one_item_a_row(model, call, shape)
    return base.clips_of_frames(call, shape)


def tower(model: Model, kind: str) -> Model:
    return model.image_tower if kind == "image" else model.video_tower


def attention(model: Model, kind: str) -> torch.nn.Module:
    return base.tower_attention(tower(model, kind), base.feature_layer(model))


def last_attention(model: Model, kind: str) -> torch.nn.Module:
    return base.tower_attention(tower(model, kind), -1)


class FixedClipEncoder(base.FixedEncoder):
    """Pixel values (images, 3, H, W), or (clips, frames, 3, H, W)."""

    def shape(self, model: Model, call: base.EncodeCall) -> base.EncoderShape:
        names = ("pixel_values", "pixel_values_images") if call.kind == "image" else ("pixel_values_videos",)
        pixels = next(call.arguments[name] for name in names if call.arguments.get(name) is not None)
        tokens = base.tower_tokens(model, tower(model, call.kind))
        if call.kind == "video":
            tokens += base.class_token_dropped(model)  # frames keep [CLS]
        return base.EncoderShape((pixels.shape[:-3].numel(), tokens), call.kind)

    def run(self, model: Model, tables: dict[str, torch.Tensor], pixel_values: torch.Tensor) -> base.Features:
        kind = "image" if pixel_values.ndim == 4 else "video"
        pixel_values = pixel_values.flatten(0, -4)
        return base.Features(base.tower_features(model, tower(model, kind), pixel_values, whole=kind == "video"))


ADAPTERS = [
    base.ModelAdapter(
        "Video-LLaVA",
        ("video_llava",),
        base.multi_modal_projector,
        layout,
        attention,
        base.without_class_token,
        prune_layer=16,
        last_attention=last_attention,
        fixed_encoder=FixedClipEncoder(),
    )
]
