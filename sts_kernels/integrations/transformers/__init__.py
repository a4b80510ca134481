"""STS for stock Hugging Face vision-language models: see `apply_sts`. Needs transformers 4.57 or newer."""

try:
    import transformers
except ImportError as error:
    raise ImportError(
        "sts_kernels.integrations.transformers needs the transformers package: pip install 'transformers>=4.57'"
    ) from error

if tuple(map(int, transformers.__version__.split(".")[:2])) < (4, 57):
    raise ImportError(
        "sts_kernels.integrations.transformers needs transformers 4.57 or newer, found " + transformers.__version__
    )

from .families import FAMILIES, Family
from .handle import STSHandle, apply_sts, remove_sts
from .images import VisualItem
from .report import Report

__all__ = ["FAMILIES", "Family", "Report", "STSHandle", "VisualItem", "apply_sts", "remove_sts"]
