"""vLLM plugin: visual tokens are pruned before the LLM. docs/serving.md says how it is switched on.

vLLM calls `register` in each of its processes. An image's way through the other files:

    settings     what is asked for: method, number of tokens, positions; what vLLM cannot do is refused
    layouts      how many tokens an image has, and which of them are rows of its encoder's features
    processor    front end: the prompt gets as many placeholders as tokens will be kept
    models       worker: features are picked from, and the tokens kept stay at their positions

The package never imports this folder. `register` imports nothing but what vLLM has imported before it.
"""

import logging
import re

from . import settings

OLDEST, NEWEST = (0, 32), (0, 33)  # minor versions; tests run on the oldest
MODELS = {
    "LlavaForConditionalGeneration": "STSLlava",
    "LlavaNextForConditionalGeneration": "STSLlavaNext",
    "Qwen2_5_VLForConditionalGeneration": "STSQwen2_5_VL",
    "Qwen3VLForConditionalGeneration": "STSQwen3VL",
}
logger = logging.getLogger("vllm.plugins.sts_kernels")  # vLLM prints what is logged below its own name


def unsupported(version: str) -> str:
    """Why this version of vLLM is refused. Empty: it is not."""
    if OLDEST <= tuple(map(int, re.findall(r"\d+", version)[:2])) <= NEWEST:
        return ""
    oldest, newest = (".".join(map(str, bound)) for bound in (OLDEST, NEWEST))
    return f"sts_kernels: the vLLM plugin supports vLLM {oldest} to {newest}, and this is {version}"


def register() -> None:
    """Entry point `vllm.general_plugins`: adds the pruned models under names of their own, and with STS_KERNELS_KEEP
    also in place of vLLM's.

    Raises:
        Refused: STS_KERNELS_KEEP is set, and it is no number of tokens, or vLLM's version is not supported. The server
            does not start then; one that starts without the plugin would answer from all tokens.
    """
    import vllm

    wanted = settings.from_variable()
    if reason := unsupported(vllm.__version__):
        if wanted:
            raise settings.Refused(f"{reason}: unset {settings.VARIABLE} to serve without pruning")
        logger.warning("%s; no model is registered", reason)
        return
    for architecture, name in MODELS.items():
        for alias in (f"STS{architecture}", *([architecture] if wanted else [])):
            vllm.ModelRegistry.register_model(alias, f"{__name__}.models:{name}")
    if wanted:
        logger.info("sts_kernels: %s prunes %s; others run as they are", settings.VARIABLE, ", ".join(MODELS))
