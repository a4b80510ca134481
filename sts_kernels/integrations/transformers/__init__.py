"""STS for stock Hugging Face vision-language models: see `apply_sts`. Needs transformers 4.57 or newer."""

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

from .families import FAMILIES, Family
from .handle import STSHandle, apply_sts, remove_sts
from .images import VisualItem
from .report import Report

__all__ = ["FAMILIES", "Family", "Report", "STSHandle", "VisualItem", "apply_sts", "remove_sts"]
