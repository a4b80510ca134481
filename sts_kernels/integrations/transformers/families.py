"""What differs between model families: where the projector is, and how images lie in its input.

To support a family write one `Family`; docs/transformers.md shows how. Everything else is shared.
"""

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from . import saliency
from .images import VisualItem, square


@dataclass
class EncodeCall:
    """One call of get_image_features or get_video_features: what the layout of its features can be read from."""

    kind: str  # "image" or "video"
    arguments: dict  # by name
    placeholder_runs: Callable[[str], list[int]]  # lengths of the runs of placeholders of a kind in the prompt


@dataclass(frozen=True)
class Family:
    """
    model_types: `config.model_type` of the models it serves.
    projector: base model -> the module that turns features into LLM tokens, each from rows of its own.
    features: (the projector, its input) -> what stage 1 selects from, one row for each token; the rows of the input
        that make up a token follow one another.
    layout: (base model, call, shape of those features) -> the images in them, in order.
    vision_attention, saliency: for anchor="saliency": (base model, kind) -> the attention module that tells it;
        (base model, its (query, key, scale) calls, shape as above) -> (rows of that shape,) saliency.
    prune_layer: default of STSConfig.prune_layer; None: half the layers.
    """

    name: str
    model_types: Sequence[str]
    projector: Callable
    layout: Callable
    vision_attention: Callable
    saliency: Callable
    prune_layer: int | None = None
    features: Callable = lambda projector, x: x


# --- LLaVA ------------------------------------------------------------------------------------------------------------


def _multi_modal_projector(base):
    return base.multi_modal_projector


def _tower_attention(tower, layer: int):
    """Attention of the encoder layer whose output is hidden_states[layer]."""
    encoder = getattr(tower, "vision_model", tower).encoder
    layers = encoder.layers if hasattr(encoder, "layers") else encoder.layer
    block = layers[layer if layer < 0 else layer - 1]
    return block.self_attn if hasattr(block, "self_attn") else block.attention


def _feature_layer(base) -> int:
    layer = base.config.vision_feature_layer
    return layer if isinstance(layer, int) else layer[-1]


def _llava_attention(base, kind):
    return _tower_attention(base.vision_tower, _feature_layer(base))


def _clip_saliency(base, calls, shape):
    received = saliency.of_square_images(calls)
    return received[:, received.shape[1] - shape[1] :].flatten()  # [CLS] may not be a feature itself


def _one_item_a_row(base, call, shape):
    """(images, tokens, C): every row is an image."""
    if call.arguments.get("image_sizes") is not None:
        raise NotImplementedError(
            "apply_sts: LLaVA with a vision tower of variable resolution (Pixtral) is not supported"
        )
    return [VisualItem(call.kind, [shape[1]], [square(shape[1])]) for _ in range(shape[0])]


LLAVA = Family(
    "LLaVA-1.5", ("llava",), _multi_modal_projector, _one_item_a_row, _llava_attention, _clip_saliency, prune_layer=16
)


# --- LLaVA-NeXT -------------------------------------------------------------------------------------------------------


def _llava_next_layout(base, call, shape):
    """(crops of all images, tokens, C): the number of crops follows from the image's size, and which of their tokens
    survive unpadding, and where newlines go, from the model's own packing of their numbers."""
    config, tokens = base.config, shape[1]
    crops_of = sys.modules[type(base).__module__].image_size_to_num_patches
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
            packed, _ = base.pack_image_features(
                [numbers], size[None], vision_feature_select_strategy=strategy, image_newline=newline
            )
        items.append(VisualItem("image", [tokens] * crops, [square(tokens)] * crops, packed[0][:, 0].long()))
    return items


LLAVA_NEXT = Family(
    "LLaVA-NeXT",
    ("llava_next",),
    _multi_modal_projector,
    _llava_next_layout,
    _llava_attention,
    _clip_saliency,
    prune_layer=16,
)


# --- Video-LLaVA ------------------------------------------------------------------------------------------------------


def _video_llava_layout(base, call, shape):
    """(images or frames of all clips, tokens, C); frames keep their [CLS] token."""
    if call.kind == "image":
        return _one_item_a_row(base, call, shape)
    frames = call.arguments["pixel_values_videos"].shape[1]
    rows, tokens = shape[0], shape[1]
    return [VisualItem("video", [tokens] * frames, [square(tokens)] * frames) for _ in range(rows // frames)]


def _video_llava_attention(base, kind):
    return _tower_attention(base.image_tower if kind == "image" else base.video_tower, _feature_layer(base))


VIDEO_LLAVA = Family(
    "Video-LLaVA",
    ("video_llava",),
    _multi_modal_projector,
    _video_llava_layout,
    _video_llava_attention,
    _clip_saliency,
    prune_layer=16,
)


# --- InternVL ---------------------------------------------------------------------------------------------------------


def _internvl_layout(base, call, shape):
    """(tiles of all images, tokens, C). The model is not told which tiles are one image, but the prompt shows it: an
    image is one run of placeholders. Features encoded without a prompt count each tile as an image."""
    tiles, tokens = shape[0], shape[1]
    runs = call.placeholder_runs("image")
    if sum(runs) != tiles * tokens or any(run % tokens for run in runs):
        runs = [tokens] * tiles
    return [VisualItem("image", [tokens] * (run // tokens), [square(tokens)] * (run // tokens)) for run in runs]


def _internvl_saliency(base, calls, shape):
    received = saliency.of_square_images(calls)
    side = math.isqrt(received.shape[1])
    patches = received[:, received.shape[1] - side * side :].view(-1, side, side, 1)
    return base.pixel_shuffle(patches, scale_factor=base.config.downsample_ratio).mean(-1).flatten()


INTERNVL = Family(
    "InternVL", ("internvl",), _multi_modal_projector, _internvl_layout, _llava_attention, _internvl_saliency
)


# --- Qwen-VL ----------------------------------------------------------------------------------------------------------


def _merger_mlp(base):
    """Behind the merger's norm: its input is the normalised patches of a 2x2 group side by side."""
    return base.visual.merger.mlp


def _merger(base):
    """The whole of it: an adapter wraps the linear layers inside, and would not see which rows a hook on them drops."""
    return base.visual.merger


def _merged_patches(merger, x):
    """What its linear layers get: as the input of Qwen2.5-VL's MLP."""
    return merger.norm(x).view(-1, merger.hidden_size)


def _qwen_layout(base, call, shape):
    """(groups of all images, C), frame after frame. Qwen2.5-VL orders the groups of a frame by attention windows, and
    puts them in raster order after the merger."""
    grids = call.arguments["image_grid_thw" if "image_grid_thw" in call.arguments else "video_grid_thw"]
    merge = base.visual.spatial_merge_size
    items = []
    for frames, height, width in grids.tolist():
        grid = (height // merge, width // merge)
        items.append(VisualItem(call.kind, [grid[0] * grid[1]] * frames, [grid] * frames))
    return items


def _qwen_attention(base, kind):
    return base.visual.blocks[-1].attn  # attends to the whole image in all of them; inner blocks may be windowed


def _qwen_saliency(base, calls, shape):
    patches = torch.cat([saliency.of_all_tokens(*call)[0] for call in calls])
    return patches.view(shape[0], -1).mean(1)


QWEN2_VL = Family("Qwen2-VL", ("qwen2_vl",), _merger_mlp, _qwen_layout, _qwen_attention, _qwen_saliency)
QWEN2_5_VL = Family("Qwen2.5-VL", ("qwen2_5_vl",), _merger_mlp, _qwen_layout, _qwen_attention, _qwen_saliency, 14)
QWEN3_VL = Family(
    "Qwen3-VL", ("qwen3_vl",), _merger, _qwen_layout, _qwen_attention, _qwen_saliency, features=_merged_patches
)


FAMILIES = (LLAVA, LLAVA_NEXT, VIDEO_LLAVA, QWEN2_VL, QWEN2_5_VL, QWEN3_VL, INTERNVL)


def family_of(model_type: str) -> Family | None:
    return next((family for family in FAMILIES if model_type in family.model_types), None)
