"""Video-LLaVA: images, and clips whose frames keep their [CLS] token."""

from ..visual_item import VisualItem, square
from . import base


def layout(model, call, shape):
    """(images or frames of all clips, tokens, C)."""
    if call.kind == "image":
        return base.one_item_a_row(model, call, shape)
    frames = call.arguments["pixel_values_videos"].shape[1]
    rows, tokens = shape[0], shape[1]
    return [VisualItem("video", [tokens] * frames, [square(tokens)] * frames) for _ in range(rows // frames)]


def tower(model, kind):
    return model.image_tower if kind == "image" else model.video_tower


def attention(model, kind):
    return base.tower_attention(tower(model, kind), base.feature_layer(model))


def last_attention(model, kind):
    return base.tower_attention(tower(model, kind), -1)


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
    )
]
