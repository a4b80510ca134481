"""Visual-token pruning for stock Hugging Face models: `prune`, and `apply_sts`. Needs transformers 4.57 or newer."""

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
