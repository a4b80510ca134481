"""Loads the compiled library and remembers what came of it."""

import functools
import json
import os
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import torch

LIBRARY = Path(__file__).with_name("libsts_kernels.so")
BUILD_INFO = Path(__file__).with_name("build_info.json")


@dataclass(frozen=True)
class Status:
    loaded: bool
    reason: str  # why it is not loaded; "" when it is
    build: dict = field(default_factory=dict)  # what the build recorded: torch headers, CUDA, architectures, compiler

    def why(self, key: str) -> str:
        """Why tensors of dispatch key `key` are, or are not, served by the compiled library."""
        if not self.loaded:
            return self.reason
        if key == "CUDA" and not self.build.get("cuda"):
            return f"the compiled library was built without CUDA ({self.build.get('reason') or 'reason not recorded'})"
        return "the compiled library is loaded"


@functools.cache
def status() -> Status:
    """Loads the library on the first call. Schemas must be defined by then."""
    try:
        build = json.loads(BUILD_INFO.read_text())
    except (OSError, ValueError):
        build = {}
    if os.environ.get("STS_KERNELS_DISABLE") == "1":
        return Status(False, "STS_KERNELS_DISABLE=1 is set", build)
    if not LIBRARY.exists():
        why = f" ({build['reason']})" if build.get("reason") else ""
        remedy = "with torch and a C++ compiler there, install this package again"
        return _missing(f"the compiled library was not built{why}; {remedy}", build)
    try:
        torch.ops.load_library(str(LIBRARY))
    except OSError as error:
        return _missing(f"the compiled library does not load: {str(error).splitlines()[0]}", build)
    return Status(True, "", build)


def _missing(reason: str, build: dict) -> Status:
    """Said once, at import: pip shows nothing of a build that ended without the library."""
    warnings.warn(f"sts_kernels runs on its slow PyTorch reference: {reason}", RuntimeWarning, stacklevel=5)
    return Status(False, reason, build)
