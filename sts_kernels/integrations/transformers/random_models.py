"""True-size (and one tiny) models with random weights, and processors with an in-memory tokenizer: no download.

Their answers mean nothing. Shapes, memory and time are those of the real models.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

CHAT = (  # one user turn: images where they are, then the answer begins
    "{% for message in messages %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}IMAGE{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endfor %} ASSISTANT:"
)
QWEN2_7B = {
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "max_position_embeddings": 32768,
}
PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]


@dataclass(frozen=True)
class RandomModel:
    """Configuration and processor of one model, and the picture that it is used with."""

    config: Callable[[], transformers.PretrainedConfig]
    processor: Callable[[transformers.PretrainedConfig], transformers.ProcessorMixin]
    image_size: tuple[int, int]  # width and height of a picture that gives the family's full number of tokens
    visual_tokens: int  # of that picture


def build(
    name: str, device: torch.device | str, dtype: torch.dtype, attention: str = "sdpa"
) -> tuple[transformers.PreTrainedModel, transformers.ProcessorMixin]:
    """-> model in eval mode, processor."""
    config = RANDOM[name].config()
    with torch.device(device):
        model = transformers.AutoModelForImageTextToText.from_config(config, dtype=dtype, attn_implementation=attention)
    model.generation_config.pad_token_id = 0
    model.generation_config.eos_token_id = None
    return model.eval(), RANDOM[name].processor(config)


# --- configurations ---


def _llava_vision() -> transformers.CLIPVisionConfig:
    return transformers.CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
        projection_dim=768,
    )


def _vicuna_7b() -> transformers.LlamaConfig:
    return transformers.LlamaConfig(vocab_size=32064, max_position_embeddings=4096, pad_token_id=0)


def _tiny() -> transformers.LlavaConfig:
    return transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=3,
            num_attention_heads=1,
            image_size=336,
            patch_size=28,
            projection_dim=32,
        ),
        text_config=transformers.LlamaConfig(
            vocab_size=1024,
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=4,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=4096,
            pad_token_id=0,
        ),
        image_token_index=1000,
    )


def _llava() -> transformers.LlavaConfig:
    return transformers.LlavaConfig(vision_config=_llava_vision(), text_config=_vicuna_7b(), image_token_index=32000)


def _llava_next() -> transformers.LlavaNextConfig:
    return transformers.LlavaNextConfig(
        vision_config=_llava_vision(),
        text_config=_vicuna_7b(),
        image_token_index=32000,
        image_grid_pinpoints=PINPOINTS,
    )


def _llava_onevision() -> transformers.LlavaOnevisionConfig:
    text = transformers.Qwen2Config(vocab_size=152128, pad_token_id=0, **QWEN2_7B)
    return transformers.LlavaOnevisionConfig(text_config=text, image_token_index=151646, video_token_index=151647)


def _qwen2_5_vl() -> transformers.Qwen2_5_VLConfig:
    mrope = {"rope_type": "default", "mrope_section": [16, 24, 24]}
    text = {
        "vocab_size": 152064,
        **QWEN2_7B,
        "use_sliding_window": False,
        # transformers 5 reads rope_parameters, 4.x the other two
        "rope_parameters": {"rope_theta": 1e6, **mrope},
        "rope_scaling": {"type": "mrope", **mrope},
        "rope_theta": 1e6,
    }
    return transformers.Qwen2_5_VLConfig(
        text_config=text,
        vision_config={
            "depth": 32,
            "hidden_size": 1280,
            "intermediate_size": 3420,
            "num_heads": 16,
            "out_hidden_size": 3584,
        },
        image_token_id=151655,
        video_token_id=151656,
        vision_start_token_id=151652,
        vision_end_token_id=151653,
    )


# --- processors ---


def _tokenizer(vocabulary: int, special: dict[str, int]) -> PreTrainedTokenizerFast:
    """Byte-level tokenizer with special tokens at the configuration's ids. Every other id, which only a random answer
    can hold, decodes to its number."""
    pinned = {"<pad>": 0, "<s>": 1, "</s>": 2, **special}
    free = iter(i for i in range(vocabulary) if i not in set(pinned.values()))
    vocab = pinned | {symbol: next(free) for symbol in sorted(pre_tokenizers.ByteLevel.alphabet())}
    vocab |= {f"<{i}>": i for i in free}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        additional_special_tokens=list(special),
        padding_side="left",
        model_input_names=["input_ids", "attention_mask"],
    )


def _llava_processor(config: transformers.PretrainedConfig) -> transformers.ProcessorMixin:
    side, patch = config.vision_config.image_size, config.vision_config.patch_size
    images = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
    shared = {
        "tokenizer": _tokenizer(config.text_config.vocab_size, {"<image>": config.image_token_index}),
        "patch_size": patch,
        "vision_feature_select_strategy": "default",
        "num_additional_image_tokens": 1,
        "image_token": "<image>",
        "chat_template": CHAT.replace("IMAGE", "<image>"),
    }
    if isinstance(config, transformers.LlavaNextConfig):
        image_processor = transformers.LlavaNextImageProcessor(
            **images, image_grid_pinpoints=config.image_grid_pinpoints
        )
        return transformers.LlavaNextProcessor(image_processor=image_processor, **shared)
    # transformers 5 warns about a missing torchvision under the plain name.
    name = "CLIPImageProcessorPil" if hasattr(transformers, "CLIPImageProcessorPil") else "CLIPImageProcessor"
    return transformers.LlavaProcessor(image_processor=getattr(transformers, name)(**images), **shared)


class _Lenient:
    """Makes a real processor accept any tokenizer class and no video processor, which needs torchvision."""

    def check_argument_for_proper_class(self, *args: Any) -> None:
        pass


class _OnevisionProcessor(_Lenient, transformers.LlavaOnevisionProcessor):
    pass


class _QwenProcessor(_Lenient, transformers.Qwen2_5_VLProcessor):
    pass


def _onevision_processor(config: transformers.PretrainedConfig) -> transformers.ProcessorMixin:
    vision, special = config.vision_config, {"<image>": config.image_token_index, "<video>": config.video_token_index}
    name = next(
        n for n in ("LlavaOnevisionImageProcessorPil", "LlavaOnevisionImageProcessor") if hasattr(transformers, n)
    )
    side = {"height": vision.image_size, "width": vision.image_size}
    return _OnevisionProcessor(
        image_processor=getattr(transformers, name)(size=side, image_grid_pinpoints=config.image_grid_pinpoints),
        tokenizer=_tokenizer(config.text_config.vocab_size, special),
        video_processor=None,
        num_image_tokens=(vision.image_size // vision.patch_size) ** 2,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        vision_aspect_ratio=config.vision_aspect_ratio,
        chat_template=CHAT.replace("IMAGE", "<image>"),
    )


def _qwen_processor(config: transformers.PretrainedConfig) -> transformers.ProcessorMixin:
    special = {
        "<|vision_start|>": config.vision_start_token_id,
        "<|vision_end|>": config.vision_end_token_id,
        "<|image_pad|>": config.image_token_id,
        "<|video_pad|>": config.video_token_id,
    }
    tokenizer = _tokenizer(config.text_config.vocab_size, special)
    tokenizer.image_token, tokenizer.video_token = "<|image_pad|>", "<|video_pad|>"
    tokenizer.vision_bos_token, tokenizer.vision_eos_token = "<|vision_start|>", "<|vision_end|>"
    return _QwenProcessor(
        image_processor=transformers.Qwen2VLImageProcessor(
            patch_size=14, merge_size=2, temporal_patch_size=2, min_pixels=4 * 28 * 28, max_pixels=16384 * 28 * 28
        ),
        tokenizer=tokenizer,
        video_processor=None,
        chat_template=CHAT.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>"),
    )


RANDOM = {
    "tiny": RandomModel(_tiny, _llava_processor, (336, 336), 144),
    "llava-1.5-7b": RandomModel(_llava, _llava_processor, (336, 336), 576),
    "llava-next-7b": RandomModel(_llava_next, _llava_processor, (672, 672), 2880),
    "llava-onevision-7b": RandomModel(_llava_onevision, _onevision_processor, (1152, 1152), 7290),
    "qwen2.5-vl-7b": RandomModel(_qwen2_5_vl, _qwen_processor, (1008, 1008), 1296),
}
