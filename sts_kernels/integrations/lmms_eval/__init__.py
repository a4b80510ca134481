"""lmms-eval's models, pruned: `--model sts_llava_hf --model_args pretrained=...,method=divprune,budget=64`.

lmms-eval finds them through the entry point `lmms_eval.models`. Nothing heavy is imported before a model is asked for:
one plugin that raises takes all others with it.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lmms_eval.models.registry_v2 import ModelManifest

FAMILIES = {  # model of lmms-eval that is pruned, by its id -> its class
    "llava_hf": "LlavaHf",
    "qwen2_5_vl": "Qwen2_5_VL",
    "qwen3_vl": "Qwen3_VL",
    "internvl_hf": "InternVLHf",
}


def manifests() -> list["ModelManifest"]:
    """What lmms-eval registers: sts_<id> for each family."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return [
        ModelManifest(model_id=f"sts_{family}", chat_class_path=f"{__name__}.models.STS{name}")
        for family, name in FAMILIES.items()
    ]
