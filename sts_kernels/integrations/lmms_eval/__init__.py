"""Pruned lmms-eval models: `--model sts_llava_hf --model_args pretrained=...,method=divprune,budget=64`.

lmms-eval finds them through the entry point `lmms_eval.models`. Heavy imports wait until a model is requested: a plugin
that raises on import disables all other plugins.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lmms_eval.models.registry_v2 import ModelManifest

FAMILIES = {  # lmms-eval model id -> its class
    "llava_hf": "LlavaHf",
    "qwen2_5_vl": "Qwen2_5_VL",
    "qwen3_vl": "Qwen3_VL",
    "internvl_hf": "InternVLHf",
}


def manifests() -> list["ModelManifest"]:
    """The entry point's manifests: model sts_<id> for each entry of FAMILIES."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return [
        ModelManifest(model_id=f"sts_{family}", chat_class_path=f"{__name__}.models.STS{name}")
        for family, name in FAMILIES.items()
    ]
