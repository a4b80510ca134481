"""Visual-token pruning for stock Hugging Face models: `prune`, and `apply_sts`. Needs transformers 4.57 or newer.

A token's way through it, one visit a phase:

    prune, handle              installation: method, plan, hooks (hooks), removal; checks (unsupported, compat)
    session                    the typed phases of one prompt, a session a thread
    encoder_hooks              encoded: around the vision encoder and the projector
      adapters, visual_item      where each signal is, and which features are one image
      attention_capture          query and key of an attention; vision_attention scores by them
      vision_pruning             which features become tokens; dropped marks the others
    prompt                     placed: which columns are images, and of which row
    llm_hooks                  prefilled, decoded: around the LLM and its layers
      layer_pruning              entry, cuts and exit of a forward
      segments, cache, masks     what each run of layers holds
      static_cache               the same in slots, for decode steps that are compiled
    report, visualize, timer   what was kept, and how long it took
    captured                   the same way as functions of fixed shapes, for CUDA graphs: `PruningHandle.compile`

Aside: stack (whose generate() runs), cudnn (off while a pruned prompt is inside), untyped (names for types of models),
random_models (for the command line).
"""

from ..._errors import REQUIREMENTS, install, needs

try:
    import transformers
except ImportError as error:
    raise ImportError(f"sts_kernels.integrations.transformers needs {needs('transformers')}") from error

if tuple(map(int, transformers.__version__.split(".")[:2])) < (4, 57):
    raise ImportError(
        f"sts_kernels.integrations.transformers needs transformers 4.57 or newer, found {transformers.__version__}: "
        f"{install('--upgrade', REQUIREMENTS['transformers'])}"
    )

from .adapters import ADAPTERS, ModelAdapter
from .handle import PruningHandle
from .prune import apply_sts, prune, remove_pruning
from .report import Report
from .visual_item import VisualItem

__all__ = ["ADAPTERS", "ModelAdapter", "PruningHandle", "Report", "VisualItem", "apply_sts", "prune", "remove_pruning"]
