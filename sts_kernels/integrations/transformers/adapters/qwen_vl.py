"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL: a feature is a 2x2 group of patches; images have any size."""

import torch

from ..visual_item import VisualItem
from . import base


def merger_mlp(model):
    """Behind the merger's norm: its input is the normalised patches of a 2x2 group side by side."""
    return model.visual.merger.mlp


def merger(model):
    """The whole of it: an adapter wraps the linear layers inside, and would not see which rows a hook on them drops."""
    return model.visual.merger


def merged_patches(module, x):
    """What its linear layers get: as the input of Qwen2.5-VL's MLP."""
    return module.norm(x).view(-1, module.hidden_size)


def grids_of(call) -> list[list[int]]:
    return call.arguments["image_grid_thw" if "image_grid_thw" in call.arguments else "video_grid_thw"].tolist()


def layout(model, call, shape):
    """(groups of all images, C), frame after frame. Qwen2.5-VL orders the groups of a frame by attention windows, and
    puts them in raster order after the merger."""
    merge = model.visual.spatial_merge_size
    items = []
    for frames, height, width in grids_of(call):
        grid = (height // merge, width // merge)
        items.append(VisualItem(call.kind, [grid[0] * grid[1]] * frames, [grid] * frames))
    return items


def window_order(visual, grids: list[list[int]]) -> torch.Tensor:
    """Qwen2.5-VL: the groups of a frame window by window, each in raster order. visual: the encoder or its
    configuration."""
    order, start, merge = [], 0, visual.spatial_merge_size
    side = visual.window_size // merge // visual.patch_size
    for frames, height, width in grids:
        for _ in range(frames):
            frame = torch.arange(start, start + height * width // merge**2, device="cpu").view(height // merge, -1)
            order += [part.flatten() for rows in frame.split(side) for part in rows.split(side, 1)]
            start += frame.numel()
    return torch.cat(order)


def windows(model, call):
    return window_order(model.visual, grids_of(call))


def attention(model, kind):
    return model.visual.blocks[-1].attn  # attends to the whole image in all of them; inner blocks may be windowed


def of_groups(model, values, shape):
    """The mean over the patches of a group."""
    return values.reshape(shape[0], -1, values.shape[-1]).mean(1)


SHARED = {"layout": layout, "vision_attention": attention, "per_feature": of_groups}
ADAPTERS = [
    base.ModelAdapter("Qwen2-VL", ("qwen2_vl",), merger_mlp, **SHARED),
    base.ModelAdapter("Qwen2.5-VL", ("qwen2_5_vl",), merger_mlp, **SHARED, prune_layer=14, order=windows),
    base.ModelAdapter("Qwen3-VL", ("qwen3_vl",), merger, **SHARED, features=merged_patches),
]
