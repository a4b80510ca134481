"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL: a feature is a 2x2 group of patches; images have any size."""

import functools
import itertools
import math
import sys
from collections.abc import Sequence

import torch

from .. import attention_capture
from ..untyped import Config, Model
from ..vision_attention import AttentionCall
from ..visual_item import VisualItem
from . import base


def merger_mlp(model: Model) -> torch.nn.Module:
    """The MLP after the merger's norm. Input: one row per 2x2 group, its normalised patches concatenated."""
    return model.visual.merger.mlp


def merger(model: Model) -> torch.nn.Module:
    """The whole merger. PEFT wraps the linear layers inside it: the wrapper would not see rows that a hook on them
    drops."""
    return model.visual.merger


def merged_patches(module: Model, x: torch.Tensor) -> torch.Tensor:
    """Patches -> the input of the merger's linear layers: one row per group, as for Qwen2.5-VL's MLP."""
    return module.norm(x).view(-1, module.hidden_size)


def grids_of(call: base.EncodeCall) -> list[list[int]]:
    return call.arguments[f"{call.kind}_grid_thw"].tolist()


def layout(model: Model, call: base.EncodeCall, shape: torch.Size) -> list[VisualItem]:
    """shape: (groups of all images, C), frame after frame. Qwen2.5-VL orders the groups of a frame by attention
    windows, and restores raster order after the merger."""
    merge = model.visual.spatial_merge_size
    items = []
    for frames, height, width in grids_of(call):
        grid = (height // merge, width // merge)
        items.append(VisualItem(call.kind, [grid[0] * grid[1]] * frames, [grid] * frames))
    return items


def frames_of(visual: Model | Config, grids: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    """For each frame, (rows, columns) group numbers in raster order. visual: the encoder or its configuration."""
    merge = visual.spatial_merge_size
    sizes = [(height // merge, width // merge) for count, height, width in grids for _ in range(count)]
    groups = torch.arange(sum(map(math.prod, sizes)), device="cpu").split([*map(math.prod, sizes)])
    return [frame.view(size) for frame, size in zip(groups, sizes, strict=True)]


def windows_of(visual: Model | Config, frames: list[torch.Tensor]) -> list[torch.Tensor]:
    """Sets of groups that attend to each other in most blocks: attention windows, or frames if there is no
    `window_size`."""
    if not hasattr(visual, "window_size"):
        return [frame.flatten() for frame in frames]
    side = visual.window_size // visual.spatial_merge_size // visual.patch_size
    return [part.flatten() for frame in frames for rows in frame.split(side) for part in rows.split(side, 1)]


def window_order(visual: Model | Config, grids: Sequence[Sequence[int]]) -> torch.Tensor:
    """Qwen2.5-VL: group numbers window by window, in raster order within a window."""
    return torch.cat(windows_of(visual, frames_of(visual, grids)))


def windows(model: Model, call: base.EncodeCall) -> torch.Tensor:
    return window_order(model.visual, grids_of(call))


def attention(model: Model, kind: str) -> torch.nn.Module:
    return model.visual.blocks[-1].attn  # full attention in all three families; inner blocks may be windowed


def of_groups(model: Model, values: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """The mean over the patches of a group."""
    return values.reshape(shape[0], -1, values.shape[-1]).mean(1)


class FixedQwenEncoder(base.FixedEncoder):
    """Batches attention by window length.

    The model makes one attention call per window or frame, and reads the bounds back. Here, windows (or frames) of
    equal length are adjacent and form one batch. A block makes one call per distinct length.
    """

    def shape(self, model: Model, call: base.EncodeCall) -> base.EncoderShape:
        grids = tuple(map(tuple, grids_of(call)))
        return base.EncoderShape((sum(map(math.prod, grids)) // model.visual.spatial_merge_size**2,), grids)

    def tables(self, model: Model, shape: base.EncoderShape) -> dict[str, torch.Tensor]:
        """Block order: all `windows_i`, concatenated. Blocks run on patches in this order.

        windows_i (n, L): patches of the n windows of length L, numbered as in the pixel values.
        frames_i (n, L): patches of the n frames of one length, by their place in block order.
        unframed: inverse permutation of all frames_i, concatenated.
        features: places in block order of the patches in the order of the model's own encoder.
        positions (patches, 2): row and column of each patch, in block order.
        corners, weights: learned positions of each patch, in block order; see `interpolation`.
        """
        visual = model.visual
        unit = visual.spatial_merge_size**2
        frames = frames_of(model.visual, shape.sizes)
        windows = windows_of(model.visual, frames)
        features = torch.cat(windows)
        tables = by_length("windows", windows, unit)
        order = joined(tables, "windows")
        place = order.argsort()
        if hasattr(visual, "window_size"):
            parts = by_length("frames", features.split([frame.numel() for frame in frames]), unit)
            tables |= {name: place[patches] for name, patches in parts.items()}
            tables["unframed"] = joined(tables, "frames").argsort()
        tables["features"] = place[patches_of(features, unit)]
        spots, sizes = spots_of(shape.sizes, visual.spatial_merge_size)
        tables["positions"] = spots[order]
        if hasattr(visual, "pos_embed"):
            learned = interpolation(spots, sizes, visual.num_grid_per_side)
            tables |= {name: table[order] for name, table in learned.items()}
        return tables

    def run(self, model: Model, tables: dict[str, torch.Tensor], pixel_values: torch.Tensor) -> base.Features:
        visual, deepstack = model.visual, []
        windows, frames = (runs(tables, name) for name in ("windows", "frames"))
        hidden = visual.patch_embed(pixel_values.type(visual.dtype))[joined(tables, "windows")]
        if "corners" in tables:
            learned = (visual.pos_embed(tables["corners"]) * tables["weights"][..., None]).sum(1)
            hidden = hidden + learned.to(hidden.dtype)
        angles = (tables["positions"][..., None] * visual.rotary_pos_emb.inv_freq.float()).flatten(1).repeat(1, 2)
        rotary = torch.stack([angles.cos(), angles.sin()])
        framed = joined(tables, "frames") if frames else None
        for index, block in enumerate(visual.blocks):
            x = block.norm1(hidden)
            if frames and index in visual.fullatt_block_indexes:
                x = attend(block.attn, x[framed], rotary[:, framed], frames)[tables["unframed"]]
            else:
                x = attend(block.attn, x, rotary, windows)
            hidden = hidden + x
            hidden = hidden + block.mlp(block.norm2(hidden))
            if index in getattr(visual, "deepstack_visual_indexes", ()):
                which = visual.deepstack_visual_indexes.index(index)
                deepstack.append((visual.deepstack_merger_list[which], hidden[tables["features"]]))
        rows, merger = hidden[tables["features"]], visual.merger
        if hasattr(merger, "ln_q"):
            rows = merger.ln_q(rows).view(-1, merger.hidden_size)
        return base.Features(rows, deepstack)

    def calls(self, model: Model, shape: base.EncoderShape, calls: list[AttentionCall]) -> list[AttentionCall]:
        """Batches of frames of one length -> one call per frame, in the order of the frames. A single batch stays as it
        is."""
        if len(calls) == 1:
            return calls
        lengths = [height * width for count, height, width in shape.sizes for _ in range(count)]
        order = sorted(range(len(lengths)), key=lengths.__getitem__)
        each = [(q[None], k[None], scale) for query, key, scale in calls for q, k in zip(query, key, strict=True)]
        return [call for _, call in sorted(zip(order, each, strict=True), key=lambda pair: pair[0])]


def patches_of(groups: torch.Tensor, unit: int) -> torch.Tensor:
    """(..., n) groups -> (..., n * unit) patches."""
    return (groups[..., None] * unit + torch.arange(unit, device="cpu")).flatten(-2)


def by_length(name: str, parts: Sequence[torch.Tensor], unit: int) -> dict[str, torch.Tensor]:
    """Sets of groups -> for each set length, shortest first, one table (n, L) of patches."""
    equal = itertools.groupby(sorted(parts, key=len), len)
    return {f"{name}_{i}": patches_of(torch.stack(list(same)), unit) for i, (_, same) in enumerate(equal)}


def runs(tables: dict[str, torch.Tensor], name: str) -> list[torch.Size]:
    """(n, L) of each table: number and length of its windows or frames."""
    return [table.shape for key, table in tables.items() if key.startswith(f"{name}_")]


def joined(tables: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    return torch.cat([table.flatten() for key, table in tables.items() if key.startswith(f"{name}_")])


def spots_of(grids: Sequence[Sequence[int]], merge: int) -> tuple[torch.Tensor, torch.Tensor]:
    """For each patch, group after group: (patches, 2) row and column, (patches, 2) height and width of its frame."""
    spots, sizes = [], []
    for count, height, width in grids:
        spot = torch.cartesian_prod(torch.arange(height, device="cpu"), torch.arange(width, device="cpu"))
        spot = spot.view(height // merge, merge, width // merge, merge, 2).transpose(1, 2).reshape(-1, 2)
        spots.append(spot.repeat(count, 1))
        sizes.append(torch.tensor([height, width], device="cpu").expand_as(spots[-1]))
    return torch.cat(spots), torch.cat(sizes)


def interpolation(spots: torch.Tensor, sizes: torch.Tensor, side: int) -> dict[str, torch.Tensor]:
    """Bilinear interpolation of learned positions on a `side` x `side` grid, corners aligned. corners, weights:
    (patches, 4)."""
    place = spots.double() * (side - 1) / (sizes - 1).clamp(min=1)
    low = place.long()
    corners = torch.cartesian_prod(*[torch.arange(2, device="cpu")] * 2)
    row, column = (low[:, None] + corners).clamp(max=side - 1).unbind(-1)
    weights = (1 - corners - (place - low)[:, None]).abs().prod(-1)
    return {"corners": row * side + column, "weights": weights.float()}


def attend(attention: Model, x: torch.Tensor, rotary: torch.Tensor, runs: list[torch.Size]) -> torch.Tensor:
    """(patches, C) -> (patches, C): attention, one call per batch of equally long windows or frames. runs: (n, L) of
    each."""
    parts = attention.qkv(x).unflatten(-1, (3, attention.num_heads, -1)).unbind(1)
    rotate = sys.modules[type(attention).__module__].apply_rotary_pos_emb_vision
    parts = *rotate(*parts[:2], *rotary), parts[2]
    parts = zip(*(part.split([n * length for n, length in runs]) for part in parts), strict=True)
    function, out = attention_capture.function_of(attention.config._attn_implementation or "eager", attention), []
    for run, part in zip(runs, parts, strict=True):
        query, key, value = (x.unflatten(0, run).transpose(1, 2) for x in part)
        scale = {"dropout": 0.0, "scaling": attention.scaling, "is_causal": False}
        out.append(function(attention, query, key, value, None, **scale)[0].flatten(0, 1))
    return attention.proj(torch.cat(out).flatten(1))


adapter = functools.partial(
    base.ModelAdapter,
    layout=layout,
    vision_attention=attention,
    per_feature=of_groups,
    fixed_encoder=FixedQwenEncoder(),
)
ADAPTERS = [
    adapter("Qwen2-VL", ("qwen2_vl",), merger_mlp),
    adapter("Qwen2.5-VL", ("qwen2_5_vl",), merger_mlp, prune_layer=14, order=windows),
    adapter("Qwen3-VL", ("qwen3_vl", "qwen3_vl_moe"), merger, features=merged_patches),
]
