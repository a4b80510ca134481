"""Tiny random checkpoints of the served families, with tokenizer, processor and chat template: nothing is downloaded.

python -m python_tests.serving.checkpoints FOLDER [FAMILY ...]
"""

import json
import sys
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file

from sts_kernels.integrations.transformers import random_models

IMAGE, VIDEO, VISION_START, VISION_END, VOCABULARY = 1000, 1001, 1002, 1003, 1024
TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,  # two ranks of tensor parallelism
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [8, 12, 12]}


def _clip(patch: int) -> transformers.CLIPVisionConfig:
    return transformers.CLIPVisionConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=336,
        patch_size=patch,
        projection_dim=32,
    )


def _qwen(name: str, text: dict, vision: dict):
    vision = {"depth": 3, "hidden_size": 128, "num_heads": 2, "patch_size": 14, "spatial_merge_size": 2, **vision}
    return getattr(transformers, f"{name}Config")(
        vision_config={"intermediate_size": 128, "out_hidden_size": 128, "temporal_patch_size": 2, **vision},
        text_config={**TEXT, "rope_parameters": {**MROPE, **text}, "head_dim": 64},
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END,
        tie_word_embeddings=False,
    )


CONFIGS = {
    "llava": lambda: transformers.LlavaConfig(
        vision_config=_clip(28), text_config=transformers.LlamaConfig(**TEXT), image_token_index=IMAGE
    ),
    "llava_next": lambda: transformers.LlavaNextConfig(
        vision_config=_clip(56),
        text_config=transformers.LlamaConfig(**TEXT),
        image_token_index=IMAGE,
        image_grid_pinpoints=random_models.PINPOINTS,
    ),
    "qwen2_5_vl": lambda: _qwen("Qwen2_5_VL", {}, {"window_size": 112, "fullatt_block_indexes": [2]}),
    "qwen3_vl": lambda: _qwen(
        "Qwen3VL", {"mrope_interleaved": True}, {"num_position_embeddings": 256, "deepstack_visual_indexes": [0, 1]}
    ),
}


def write(family: str, folder: Path) -> Path:
    """Writes a checkpoint, unless it exists. Its weights are so large that the answer depends on the image."""
    path = folder / family
    if (path / "complete").exists():
        return path
    config = CONFIGS[family]()
    model = transformers.AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    for _, parameter in sorted(model.named_parameters()):
        if parameter.ndim > 1:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.15)
    model.config.architectures = [type(model).__name__]
    model.generation_config.eos_token_id = None
    model.save_pretrained(path)
    (_qwen_processor if family.startswith("qwen") else random_models._llava_processor)(config).save_pretrained(path)
    _publish(path / "model.safetensors")
    settings = path / "config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"architectures": [type(model).__name__]}))
    (path / "complete").touch()
    return path


def _publish(file: Path) -> None:
    """Gives the vision tower's weights the names they have in published checkpoints."""
    tensors = load_file(file)
    save_file({_published(name): tensor for name, tensor in tensors.items()}, file, metadata={"format": "pt"})


def _published(name: str) -> str:
    return name.replace("vision_tower.", "vision_tower.vision_model.") if "vision_model." not in name else name


def _qwen_processor(config):
    special = {
        "<|vision_start|>": VISION_START,
        "<|vision_end|>": VISION_END,
        "<|image_pad|>": IMAGE,
        "<|video_pad|>": VIDEO,
    }
    made = random_models._tokenizer(VOCABULARY, special)
    tokenizer = transformers.Qwen2Tokenizer(tokenizer_object=made._tokenizer, eos_token="</s>", pad_token="<pad>")
    tokenizer.add_special_tokens({"additional_special_tokens": list(special)})
    sizes = {"patch_size": 14, "merge_size": 2, "temporal_patch_size": 2}
    kind = "Qwen3VL" if config.model_type == "qwen3_vl" else "Qwen2VL"
    return getattr(transformers, f"{'Qwen3VL' if kind == 'Qwen3VL' else 'Qwen2_5_VL'}Processor")(
        image_processor=transformers.Qwen2VLImageProcessor(min_pixels=28 * 28, max_pixels=512 * 28 * 28, **sizes),
        tokenizer=tokenizer,
        video_processor=getattr(transformers, f"{kind}VideoProcessor")(**sizes),
        chat_template=random_models.CHAT.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>"),
    )


if __name__ == "__main__":
    for family in sys.argv[2:] or CONFIGS:
        print(write(family, Path(sys.argv[1])), flush=True)
