"""Visual-token pruning for stock Hugging Face models: `prune` and `apply_sts`. Needs transformers 4.57 or newer.

Modules, in the order in which a prompt meets them:

    prune, handle, hooks       installation: method, plan, hooks, removal; checks (unsupported, compat)
    session                    state of one prompt, phase by phase; one session per thread
    encoder_hooks              hooks around the vision encoder and the projector
      adapters, visual_item      per family: where each signal is, and which features are one image
      attention_capture          query and key of an attention module; vision_attention computes scores from them
      vision_pruning             selects the features that become tokens; dropped marks the others
    prompt                     which columns are visual tokens, and of which image and row
    llm_hooks                  hooks around the LLM and its layers: prefill and decode steps
      layer_pruning              entry, cuts and exit of one forward
      cut_selection              tokens that each prompt keeps at a cut
      segments, cache, masks     columns that each segment (run of layers) holds
      static_cache               static caches: slots per segment, for compiled decode steps
    report, visualize, timer   kept tokens, pictures of them, times
    captured                   the same steps as functions of fixed shapes, for CUDA graphs: `PruningHandle.compile`

Beside these: stack (finds the calling generate()), cudnn (turns cuDNN's attention off during a pruned prompt), untyped
(aliases for untyped models), random_models (models for the command line).
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
