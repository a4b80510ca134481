"""vLLM plugin: prunes visual tokens before the LLM. docs/serving.md describes how to enable it.

vLLM calls `register` in each of its processes. The other files:

    settings     reads the options (method, number of tokens, positions); refuses those that vLLM cannot serve
    layouts      maps an image size to its token count and to the encoder features of its tokens
    processor    front end: sizes the prompt, one placeholder for each kept token
    models       workers: select features; kept tokens keep their positions

The package never imports this folder. `register` imports nothing that vLLM has not imported already.
"""

import logging
import re

from . import settings

OLDEST, NEWEST = (0, 32), (0, 33)  # supported vLLM versions; tests run on OLDEST
MODELS = {
    "LlavaForConditionalGeneration": "STSLlava",
    "LlavaNextForConditionalGeneration": "STSLlavaNext",
    "Qwen2_5_VLForConditionalGeneration": "STSQwen2_5_VL",
    "Qwen3VLForConditionalGeneration": "STSQwen3VL",
}
logger = logging.getLogger("vllm.plugins.sts_kernels")  # vLLM prints only loggers below "vllm"


def unsupported(version: str) -> str:
    """Why this version of vLLM is refused; "" if it is supported."""
    if OLDEST <= tuple(map(int, re.findall(r"\d+", version)[:2])) <= NEWEST:
        return ""
    oldest, newest = (".".join(map(str, bound)) for bound in (OLDEST, NEWEST))
    return f"sts_kernels: the vLLM plugin supports vLLM {oldest} to {newest}, and this is {version}"


def register() -> None:
    """Entry point `vllm.general_plugins`: registers the pruned models under the names STS<architecture>.

    If STS_KERNELS_KEEP is set, the pruned models also replace vLLM's models.

    Raises:
        Refused: STS_KERNELS_KEEP is set, and its value is invalid or the version of vLLM is not supported. The server
            then does not start; without the plugin it would serve unpruned.
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
