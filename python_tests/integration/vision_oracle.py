"""Attention that each feature receives in the vision encoder, and the features' keys, from scratch in float64.

Taken from the plain model: the input of one attention module, the module's projections, and the rotary tables.
"""

import copy
from typing import NamedTuple

import torch

from .models import batch
from .oracle import shrunk


class Signals(NamedTuple):
    attention: torch.Tensor  # (features,) paid by [CLS], or the mean over all tokens
    keys: torch.Tensor  # (features, D) mean over heads


def module_of(model, family: str, kind: str, last: bool = False):
    base = model.model
    if "llava" in family:
        name = f"{kind}_tower" if family == "video_llava" else "vision_tower"
        tower = getattr(base, name)
        layer = -1 if last or family == "llava_onevision" else -2
        return getattr(tower, "vision_model", tower).encoder.layers[layer].self_attn
    if family == "internvl":
        return base.vision_tower.encoder.layer[-1].attention
    return base.visual.blocks[-1].attn


@torch.no_grad()
def signals(model, family: str, prompt, last: bool = False) -> dict[str, Signals]:
    """Signals by kind, of the prompt's features in the projector's order. last: use the encoder's last layer, with all
    heads as one."""
    kinds = [kind for kind in ("image", "video") if prompt.parts[kind]]
    out = {}
    for kind in kinds:
        module, seen = module_of(model, family, kind, last), []
        hook = module.register_forward_pre_hook(
            lambda m, args, kw, seen=seen: seen.append((args, kw)), with_kwargs=True
        )
        model.generate(**batch(model, [prompt]), max_new_tokens=1, do_sample=False)
        hook.remove()
        args, kwargs = seen[kinds.index(kind) if len(seen) > 1 and "tower" not in family else 0]
        hidden = (args[0] if args else kwargs["hidden_states"]).cpu().double()
        module = copy.deepcopy(module).cpu().double()
        module.num_heads = 1 if last else module.num_heads
        find = of_groups if hasattr(module, "qkv") else of_squares
        out[kind] = find(model, family, prompt, kind, module, hidden, kwargs)
    return out


def of_squares(model, family, prompt, kind, module, hidden, kwargs) -> Signals:
    """Square images: each is a batch row, with [CLS] first."""
    heads = module.num_heads
    query, key = (p(hidden).unflatten(-1, (heads, -1)).transpose(1, 2) for p in (module.q_proj, module.k_proj))
    if family == "internvl":
        query, key = module.q_norm(query.transpose(1, 2).flatten(2)), module.k_norm(key.transpose(1, 2).flatten(2))
        query, key = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (query, key))
    if family == "llava_onevision":  # no [CLS]
        weights = (query @ key.mT / query.shape[-1] ** 0.5).softmax(-1).mean((1, 2))
        rows = [x.flatten(0, 1) for x in (weights[..., None], key.mean(1))]
        attention, keys = (shrunk(model.model, prompt, kind, x) for x in rows)
        return Signals(attention[:, 0], keys)
    weights = (query[:, :, :1] @ key.mT / query.shape[-1] ** 0.5).softmax(-1).mean(1)[:, 0]
    keys = key.mean(1)
    if family != "video_llava" or (kind == "image" and sum(prompt.parts[kind][0]) % 36 == 0):
        weights, keys = weights[:, 1:], keys[:, 1:]  # [CLS] is no feature
    if family == "internvl":  # a feature is 2 x 2 patches, grouped by the model's pixel_shuffle
        count = weights.shape[1]
        side = int(count**0.5)
        index = torch.arange(count, dtype=torch.float32).view(1, side, side, 1)
        groups = model.model.pixel_shuffle(index, scale_factor=0.5).flatten(0, 2).long()
        return Signals(weights[:, groups].mean(-1).flatten(), keys[:, groups].mean(-2).flatten(0, 1))
    if family == "llava_next_video" and kind == "video":  # a feature is 2 x 2 patches
        pools = [slice(2 * i, 2 * i + 2) for i in range(3)]
        weights, keys = weights.unflatten(1, (6, 6)), keys.unflatten(1, (6, 6))
        weights = torch.stack([weights[:, y, x].mean((1, 2)) for y in pools for x in pools], 1)
        keys = torch.stack([keys[:, y, x].mean((1, 2)) for y in pools for x in pools], 1)
    return Signals(weights.flatten(), keys.flatten(0, 1))


def of_groups(model, family, prompt, kind, module, hidden, kwargs) -> Signals:
    """Qwen-VL: patches of all images in one row, frame after frame; 4 consecutive patches make a feature. No [CLS]."""
    query, key, _ = module.qkv(hidden).unflatten(-1, (3, module.num_heads, -1)).unbind(1)
    cos, sin = (table.cpu().double()[:, None] for table in kwargs["position_embeddings"])
    query, key = (x * cos + rotated(x) * sin for x in (query, key))
    received, start = [], 0
    for frames, height, width in prompt.grids[kind]:
        for _ in range(frames):
            part = slice(start, start + height * width)
            q, k = query[part].transpose(0, 1), key[part].transpose(0, 1)
            received.append((q @ k.mT / q.shape[-1] ** 0.5).softmax(-1).mean((0, 1)))
            start += height * width
    assert start == len(hidden)
    return Signals(torch.cat(received).view(-1, 4).mean(1), key.mean(1).unflatten(0, (-1, 4)).mean(1))


def rotated(x: torch.Tensor) -> torch.Tensor:
    half = x.shape[-1] // 2
    return torch.cat([-x[..., half:], x[..., :half]], -1)
