"""Tiny random models of every family, built from their configurations, and prompts for them."""

import functools
import inspect
from dataclasses import dataclass, field

import pytest
import torch

transformers = pytest.importorskip("transformers")

PAD, BOS, EOS, IMAGE, VIDEO, VISION_START, VISION_END, VOCAB = 0, 1, 2, 90, 91, 92, 93, 100
LAYERS = 6
# 5.x reads rope_parameters, 4.x rope_scaling; each ignores the other.
MROPE = {"rope_type": "default", "mrope_section": [8, 12, 12]}
ROPE = {
    "rope_theta": 10000.0,
    "rope_scaling": {"type": "mrope", **MROPE},
    "rope_parameters": {"rope_theta": 10000.0, **MROPE},
}


def _text(**extra) -> dict:
    return {
        "vocab_size": VOCAB,
        "hidden_size": 256,
        "intermediate_size": 128,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "pad_token_id": PAD,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        **extra,
    }


def _clip() -> dict:
    return {
        "hidden_size": 128,
        "intermediate_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "image_size": 24,
        "patch_size": 4,
        "projection_dim": 32,
    }


def _qwen_vision(**extra) -> dict:
    return {
        "depth": 2,
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_heads": 2,
        "patch_size": 4,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        **extra,
    }


def _llava_config(name: str, **extra):
    return getattr(transformers, f"{name}Config")(
        vision_config=transformers.CLIPVisionConfig(**_clip()),
        text_config=transformers.LlamaConfig(**_text()),
        image_token_index=IMAGE,
        **extra,
    )


def _qwen_config(name: str, vision: dict, text: dict):
    return getattr(transformers, f"{name}Config")(
        vision_config=vision,
        text_config=_text(**text),
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END,
    )


def _internvl_config():
    return transformers.InternVLConfig(
        vision_config={
            "hidden_size": 128,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": [32, 32],
            "patch_size": [4, 4],
        },
        text_config={"model_type": "qwen2", **_text()},
        image_token_id=IMAGE,
        downsample_ratio=0.5,
    )


def _onevision_config():
    vision = {name: value for name, value in _clip().items() if name != "projection_dim"}
    return transformers.LlavaOnevisionConfig(
        vision_config=transformers.SiglipVisionConfig(**vision, vision_use_head=False),
        text_config=transformers.Qwen2Config(**_text()),
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        image_grid_pinpoints=[[24, 48], [48, 24], [48, 48]],
        vision_aspect_ratio="anyres_max_1",
    )


MROPE3 = {
    "rope_theta": 10000.0,
    "rope_scaling": {**MROPE, "mrope_interleaved": True},
    "rope_parameters": {"rope_theta": 10000.0, **MROPE, "mrope_interleaved": True},
}
CONFIGS = {
    "llava": lambda: _llava_config("Llava"),
    "llava_next": lambda: _llava_config("LlavaNext", image_grid_pinpoints=[[24, 48], [48, 24], [48, 48]]),
    "video_llava": lambda: _llava_config(
        "VideoLlava", video_token_index=VIDEO, image_seq_length=36, video_seq_length=74
    ),
    "qwen2_vl": lambda: _qwen_config("Qwen2VL", _qwen_vision(embed_dim=64, hidden_size=256, mlp_ratio=2), ROPE),
    "qwen2_5_vl": lambda: _qwen_config(
        "Qwen2_5_VL", _qwen_vision(out_hidden_size=256, window_size=16, fullatt_block_indexes=[1]), ROPE
    ),
    "qwen3_vl": lambda: _qwen_config(
        "Qwen3VL",
        _qwen_vision(out_hidden_size=256, num_position_embeddings=64, deepstack_visual_indexes=[0, 1]),
        {"head_dim": 64, **MROPE3},
    ),
    "qwen3_vl_moe": lambda: _qwen_config(
        "Qwen3VLMoe",
        _qwen_vision(out_hidden_size=256, num_position_embeddings=64, deepstack_visual_indexes=[0, 1]),
        {
            "head_dim": 64,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 64,
            "mlp_only_layers": [2],
            **MROPE3,
        },
    ),
    "internvl": _internvl_config,
    "llava_onevision": _onevision_config,
    "llava_next_video": lambda: _llava_config(
        "LlavaNextVideo", video_token_index=VIDEO, image_grid_pinpoints=[[24, 48], [48, 24], [48, 48]]
    ),
}
CLASSES = {
    "llava": "Llava",
    "llava_next": "LlavaNext",
    "video_llava": "VideoLlava",
    "qwen2_vl": "Qwen2VL",
    "qwen2_5_vl": "Qwen2_5_VL",
    "qwen3_vl": "Qwen3VL",
    "qwen3_vl_moe": "Qwen3VLMoe",
    "internvl": "InternVL",
    "llava_onevision": "LlavaOnevision",
    "llava_next_video": "LlavaNextVideo",
}
# As another family but for the LLM's MLP, or for clips; tested where that can matter.
VARIANTS = ("qwen3_vl_moe", "llava_next_video")
FAMILIES = tuple(family for family in CONFIGS if family not in VARIANTS)


def class_of(family: str):
    return getattr(transformers, f"{CLASSES[family]}ForConditionalGeneration")


def build(family: str, attention: str = "sdpa", device="cpu", dtype=torch.float32):
    """Weights are large enough that attention is far from uniform, and the same in every version of transformers."""
    model = class_of(family)._from_config(CONFIGS[family](), attn_implementation=attention)
    generator = torch.Generator().manual_seed(0)
    parameters = {name.replace("vision_model.", ""): p for name, p in model.named_parameters()}  # 5.x has no such level
    for name, parameter in sorted(parameters.items()):
        if parameter.ndim > 1:
            scale = 1.0 if "embed_tokens" in name else 0.9 * parameter[0].numel() ** -0.5
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * scale)
        elif not (parameter.data == 1).all():  # all but the scales of norms
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    settings = model.generation_config
    settings.pad_token_id, settings.bos_token_id, settings.eos_token_id = PAD, BOS, None  # never stops early
    return model.eval().to(device, dtype)


@dataclass
class Prompt:
    """One row: its ids, and for each picture and clip the tensors of the model's inputs."""

    ids: list[int]
    images: list[torch.Tensor] = field(default_factory=list)
    image_sizes: list[tuple[int, int]] = field(default_factory=list)
    clips: list[torch.Tensor] = field(default_factory=list)
    grids: dict[str, list[tuple[int, int, int]]] = field(default_factory=dict)
    parts: dict[str, list[list[int]]] = field(
        default_factory=lambda: {"image": [], "video": []}
    )  # feature rows of each part


def words(count: int, seed: int) -> list[int]:
    return torch.randint(3, 80, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def noise(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# Image size (height, width): number of 24 x 24 crops, then rows and columns of the feature grid after unpadding.
NEXT_SIZES = {(40, 24): (3, 10, 6), (20, 44): (3, 6, 12), (40, 40): (5, 12, 12)}
# The same for LLaVA-OneVision, which shrinks mosaics of more than 36 features: all but the second.
MOSAICS = {(40, 24): (3, 7, 4), (8, 44): (3, 2, 12), (40, 40): (5, 6, 6)}
QWEN_GRIDS = [(1, 6, 8), (1, 4, 12), (1, 8, 8), (1, 4, 4)]


def picture(family: str, prompt: Prompt, index: int, seed: int, only: bool = True) -> None:
    """Appends a picture to a prompt. `index` chooses its shape, where the family has several. only: the prompt gets no
    other picture."""
    if family in ("llava", "video_llava"):
        prompt.images.append(noise(1, 3, 24, 24, seed=seed))
        prompt.ids += [IMAGE] * 36
        prompt.parts["image"].append([36])
    elif family in ("llava_next", "llava_next_video"):
        size = list(NEXT_SIZES)[index % 3]
        crops, rows, columns = NEXT_SIZES[size]
        prompt.images.append(noise(crops, 3, 24, 24, seed=seed))
        prompt.image_sizes.append(size)
        prompt.ids += [IMAGE] * (36 + rows * (columns + 1))
        prompt.parts["image"].append([36] * crops)
    elif family == "llava_onevision":
        size = list(MOSAICS)[index % 3]
        crops, rows, columns = MOSAICS[size] if only else (1, 0, 0)
        prompt.images.append(noise(crops, 3, 24, 24, seed=seed))
        prompt.image_sizes.append(size)
        prompt.ids += [IMAGE] * (36 + (rows * (columns + 1) or 1))  # newlines included
        prompt.parts["image"].append([36, rows * columns] if only else [36])
    elif family == "internvl":
        tiles = 1 + index % 2
        prompt.images.append(noise(tiles, 3, 32, 32, seed=seed))
        prompt.ids += [VISION_START] + [IMAGE] * (16 * tiles) + [VISION_END]
        prompt.parts["image"].append([16] * tiles)
    else:
        qwen_picture(prompt, "image", QWEN_GRIDS[index % 4], seed)


def qwen_picture(prompt: Prompt, kind: str, grid: tuple[int, int, int], seed: int) -> None:
    frames, height, width = grid
    patches = noise(frames * height * width, 3 * 2 * 4 * 4, seed=seed)
    (prompt.images if kind == "image" else prompt.clips).append(patches)
    prompt.grids.setdefault(kind, []).append(grid)
    prompt.parts[kind].append([height * width // 4] * frames)
    prompt.ids += [VISION_START] + [IMAGE if kind == "image" else VIDEO] * (frames * height * width // 4) + [VISION_END]


def clip(family: str, prompt: Prompt, seed: int) -> None:
    """Appends a clip of a video."""
    if family == "video_llava":
        prompt.clips.append(noise(1, 2, 3, 24, 24, seed=seed))
        prompt.ids += [VIDEO] * 74
        prompt.parts["video"].append([37, 37])
    elif family in ("llava_onevision", "llava_next_video"):  # 3 x 3 tokens a frame; OneVision adds a newline
        prompt.clips.append(noise(1, 2, 3, 24, 24, seed=seed))
        prompt.ids += [VIDEO] * (18 + (family == "llava_onevision"))
        prompt.parts["video"].append([9, 9])
    elif family.startswith("qwen3_vl"):  # every frame has a time stamp and a run of placeholders of its own
        frames, height, width = 2, 4, 6
        prompt.clips.append(noise(frames * height * width, 96, seed=seed))
        prompt.grids.setdefault("video", []).append((frames, height, width))
        prompt.parts["video"].append([height * width // 4] * frames)
        for frame in range(frames):
            prompt.ids += [*words(2, seed + frame), VISION_START, *[VIDEO] * (height * width // 4), VISION_END]
    else:
        qwen_picture(prompt, "video", (2, 4, 6), seed)


def prompt_of(family: str, pictures: int = 1, clips: int = 0, seed: int = 0, before: int = 4, after: int = 9) -> Prompt:
    prompt = Prompt([BOS, *words(before, seed)])
    for index in range(pictures):
        picture(family, prompt, seed + index, 100 * seed + index, pictures == 1)
        prompt.ids += words(3, seed + 50 + index)
    for index in range(clips):
        clip(family, prompt, 100 * seed + 50 + index)
        prompt.ids += words(2, seed + 70 + index)
    prompt.ids += words(after, seed + 90)
    return prompt


def batch(model, prompts: list[Prompt], side: str = "left") -> dict:
    """Model inputs for these prompts."""
    device, dtype = model.device, model.dtype
    length = max(len(p.ids) for p in prompts)
    pads = [[PAD] * (length - len(p.ids)) for p in prompts]
    ones = [[1] * len(p.ids) for p in prompts]
    join = (lambda pad, row: pad + row) if side == "left" else (lambda pad, row: row + pad)
    ids = torch.tensor([join(pad, p.ids) for pad, p in zip(pads, prompts, strict=True)])
    mask = torch.tensor([join(pad, row) for pad, row in zip(pads, ones, strict=True)])
    inputs = {"input_ids": ids, "attention_mask": mask}
    arguments = model_arguments(model)
    if "mm_token_type_ids" in arguments:
        inputs["mm_token_type_ids"] = (ids == IMAGE).int() + 2 * (ids == VIDEO).int()
    images, clips = ([x for p in prompts for x in getattr(p, name)] for name in ("images", "clips"))
    if images:
        sizes = [size for p in prompts for size in p.image_sizes]
        if sizes:
            most = max(len(x) for x in images)
            images = [torch.cat([x, torch.zeros(most - len(x), *x.shape[1:])])[None] for x in images]
            inputs["image_sizes"] = torch.tensor(sizes)
            if "batch_num_images" in arguments:
                inputs["batch_num_images"] = torch.tensor([len(p.images) for p in prompts])
        name = "pixel_values" if "pixel_values" in arguments else "pixel_values_images"
        inputs[name] = torch.cat(images).to(dtype)
    if clips:
        inputs["pixel_values_videos"] = torch.cat(clips).to(dtype)
    for kind in ("image", "video"):
        grids = [grid for p in prompts for grid in p.grids.get(kind, [])]
        if grids:
            inputs[f"{kind}_grid_thw"] = torch.tensor(grids)
    return {name: value.to(device) for name, value in inputs.items()}


# transformers 5.24 renamed the cache, in arguments and outputs.
CACHE = next(
    name
    for name in ("cache", "past_key_values")
    if name in inspect.signature(transformers.LlavaForConditionalGeneration.forward).parameters
)


def output_cache(output):
    return output[CACHE]


def model_arguments(model) -> set[str]:
    model = model.get_base_model() if hasattr(model, "get_base_model") else model  # an adapter's wrapper
    return set(inspect.signature(model.forward).parameters)


def generate(model, prompts: list[Prompt], tokens: int = 4, **options):
    """Greedy, unless the options say otherwise."""
    options = {
        "max_new_tokens": tokens,
        "do_sample": False,
        "output_logits": True,
        "return_dict_in_generate": True,
        **options,
    }
    return model.generate(**batch(model, prompts), **options)


def skip_unless_layers_are_chosen(family: str) -> None:
    """InternVL of transformers 4 always takes the last layer of its encoder."""
    if family == "internvl" and int(transformers.__version__.split(".")[0]) < 5:
        pytest.skip(f"InternVL of transformers {transformers.__version__} takes no other vision_feature_layer")


def logits_of(output) -> torch.Tensor:
    """(B, steps, V)"""
    return torch.stack(output.logits, dim=1)


@functools.cache
def shared(family: str, attention: str = "sdpa", device="cpu"):
    """A model that tests share; handles leave no trace on it."""
    return build(family, attention, device)


class Wrapper(torch.nn.Module):
    """Wraps a model as adapter libraries do."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, **inputs):
        return self.inner(**inputs)
