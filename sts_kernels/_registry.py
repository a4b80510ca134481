"""The one place that talks to torch.library: an op is a schema, a reference and a fake, registered together.

The reference is registered as CompositeExplicitAutograd and so serves every device; the compiled library and the Triton
launchers only override the CPU and CUDA keys. Adding an op never touches this file.
"""

import functools
import importlib.util
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch

from . import _native

NAMESPACE = "sts_kernels"
_library = torch.library.Library(NAMESPACE, "DEF")


@dataclass(frozen=True)
class Op:
    name: str
    schema: str
    reference: Callable
    triton: bool

    def backend(self, key: str) -> str:
        """Which code serves tensors of dispatch key `key` ("CPU" or "CUDA"): "native", "triton" or "reference"."""
        if not torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACE}::{self.name}", key):
            return "reference"
        return "triton" if self.triton and key == "CUDA" else "native"

    def why(self, key: str) -> str:
        """Why that backend was chosen, as a sentence for people."""
        backend = self.backend(key)
        if self.triton:
            if key == "CPU":
                return "a Triton op: the reference is its CPU path"
            return "triton is installed" if backend == "triton" else "triton is not installed"
        return _native.status().why(key)


OPS: dict[str, Op] = {}


def define_op(schema: str, *, fake: Callable, triton: Callable | None = None):
    """Decorates an op's reference: defines `schema` and registers reference, fake and, if given, Triton launcher."""
    name = schema[: schema.index("(")]

    def register(reference: Callable) -> Callable:
        has_triton = triton is not None
        op = Op(name, schema, reference, has_triton)

        @functools.wraps(reference)
        def fallback(*args, **kwargs):
            if any(isinstance(a, torch.Tensor) and a.is_cuda for a in args):
                _warn_fallback(op)
            with torch.no_grad():  # as the compiled kernels: no op has a gradient
                return reference(*args, **kwargs)

        _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        _library.impl(name, fallback, "CompositeExplicitAutograd")
        torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_library)
        if has_triton and importlib.util.find_spec("triton") is not None:
            _library.impl(name, triton, "CUDA")
        OPS[name] = op
        return reference

    return register


@functools.cache
def _warn_fallback(op: Op) -> None:
    warnings.warn(
        f"{NAMESPACE}::{op.name} runs on its slow PyTorch reference for CUDA tensors: {op.why('CUDA')}. "
        f"`python -m sts_kernels info` shows every op's backend.",
        stacklevel=3,
    )
