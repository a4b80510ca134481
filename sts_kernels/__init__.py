"""Visual-token pruning kernels for vision-language models. `python -m sts_kernels info` shows each op's backend."""

import warnings

from . import _process

__version__ = "0.1.0"
__all__ = ["__version__"]

_torch_error = ""  # why `import torch` failed; set only under `python -m sts_kernels`, other imports raise
if _process.starts_here():
    _process.end_on_interrupt()  # importing torch takes seconds

# torch warns where NumPy is not installed. Nothing here needs it.
warnings.filterwarnings("ignore", "Failed to initialize NumPy: No module named 'numpy'", UserWarning)
_filter = warnings.filters[0]
try:
    import torch  # noqa: F401
except Exception as error:
    _torch_error = f"sts_kernels needs PyTorch 2.10 or newer, and `import torch` failed: {error}"
    if isinstance(error, ModuleNotFoundError) and error.name == "torch":
        from ._errors import needs

        _torch_error = f"sts_kernels needs {needs('torch')}"
    if not _process.starts_here():
        raise ImportError(_torch_error) from error
else:
    from . import _native, analysis, methods, ops
    from .methods._keep_top import keep_top
    from .methods.sts import STSConfig, STSPlan
    from .ops import *  # noqa: F403

    __all__ += ops.__all__
    __all__ += ["STSConfig", "STSPlan", "analysis", "keep_top", "methods"]
    _native.status()  # loads the compiled library, now that the schemas exist
finally:
    if _filter in warnings.filters:
        warnings.filters.remove(_filter)  # type: ignore[attr-defined]  # typeshed declares a Sequence
