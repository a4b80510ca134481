"""Visual-token pruning kernels for vision-language models. `python -m sts_kernels info` shows what serves each op."""

from . import _native, ops
from .ops import *  # noqa: F403

__version__ = "0.1.0"
__all__ = ["__version__", *ops.__all__]

_native.status()  # loads the compiled library, now that the schemas exist
