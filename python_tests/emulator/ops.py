"""The .cu files on the CPU: torch.ops.sts_kernels_emulated.*, the CUDA ops with their glue."""

import functools

import torch

from sts_kernels import _registry

from . import build

NAMESPACE = "sts_kernels_emulated"
CUDA = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)


@functools.cache
def load() -> torch.library.Library:
    """Builds and loads the library; defines the ops of the package again, in their own namespace."""
    library = torch.library.Library(NAMESPACE, "DEF")
    for op in _registry.OPS.values():
        if not op.triton:
            library.define(op.schema)
    torch.ops.load_library(str(build.ops()))
    return library


def has_kernel(op: str) -> bool:
    """Whether a .cu file registers `op`."""
    load()
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACE}::{op}", "CUDA")


def call(op: str, *args, **kwargs):
    """The CUDA kernel of `op`, on CPU tensors."""
    load()
    return getattr(getattr(torch.ops, NAMESPACE), op).default.redispatch(CUDA, *args, **kwargs)
