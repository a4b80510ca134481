"""Visual-token pruning kernels for vision-language models. `python -m sts_kernels info` shows what serves each op."""

import sys

__version__ = "0.1.0"
__all__ = ["__version__"]

try:
    import torch  # noqa: F401
except Exception as error:
    # `python -m sts_kernels info` goes on and reports it. While Python looks for what -m names, argv[0] is "-m".
    if sys.argv[:1] != ["-m"] or "sts_kernels" not in sys.orig_argv:
        raise ImportError(f"sts_kernels needs PyTorch 2.10 or newer, and `import torch` failed: {error}") from error
else:
    from . import _native, ops, pruning
    from .ops import *  # noqa: F403
    from .pruning import *  # noqa: F403

    __all__ += [*ops.__all__, *pruning.__all__]
    _native.status()  # loads the compiled library, now that the schemas exist
