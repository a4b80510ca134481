"""The only user of torch.library: `define_op` takes an op's schema, reference, fake kernel and vmap rule in one call.

The reference is registered as CompositeExplicitAutograd, so it serves every device. The compiled library and the Triton
launchers override the CPU and CUDA keys. Adding an op does not change this file.
"""

import functools
import importlib.util
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from . import _native, _transforms

NAMESPACE = _native.build_info().get("namespace", "sts_kernels")
ops = getattr(torch.ops, NAMESPACE)  # how the package calls its own ops


@dataclass(frozen=True)
class Op:
    name: str
    schema: str
    reference: Callable[..., Any]
    triton: bool

    def backend(self, key: str) -> str:
        """Backend of dispatch key `key` ("CPU" or "CUDA"): "native", "triton" or "reference"."""
        if not torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACE}::{self.name}", key):
            return "reference"
        return "triton" if self.triton and key == "CUDA" else "native"

    def why(self, key: str) -> str:
        """Why `key` has this backend, for the user."""
        backend = self.backend(key)
        if self.triton:
            if key == "CPU":
                return "a Triton op: the reference is its CPU path"
            return _triton_how() if backend == "triton" else "triton is not installed"
        return _native.status().why(key, has_kernel=backend == "native")


def _triton_how() -> str:
    from .ops._triton_launch import how  # here, because the ops import this module

    return how()


OPS: dict[str, Op] = {}


class _Registrations:
    """Schemas and kernels of the ops, by name and dispatch key.

    A process can define a torch namespace only once, and compiled graphs keep its ops. So this object lives on
    torch.ops, each op is defined once, and each call looks its kernel up. Importing the package again replaces the
    kernels.
    """

    def __init__(self, library: torch.library.Library):
        self.library = library
        self.schemas: dict[str, str] = {}
        self.kernels: dict[str, dict[str, Callable[..., Any]]] = {}

    @staticmethod
    def of_this_process() -> "_Registrations":
        if "_registrations" not in vars(ops):
            ops._registrations = _Registrations(torch.library.Library(NAMESPACE, "DEF"))
        return ops._registrations

    def define(self, name: str, schema: str) -> bool:
        """Defines the op; False if it is already defined."""
        if name in self.schemas:
            if self.schemas[name] != schema:
                raise ImportError(f"{NAMESPACE}::{name} changed its schema since it was first imported; restart Python")
            return False
        self.library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        self.schemas[name] = schema
        return True

    def put(self, name: str, key: str, kernel: Callable[..., Any]) -> Callable[..., Any]:
        kernels = self.kernels.setdefault(name, {})
        kernels[key] = kernel
        return lambda *args, **kwargs: kernels[key](*args, **kwargs)


_registrations = _Registrations.of_this_process()
F = TypeVar("F", bound=Callable[..., Any])


def define_op(
    schema: str,
    *,
    fake: Callable[..., Any],
    vmap: Callable[..., Any],
    triton: Callable[..., Any] | None = None,
    discrete: bool = False,
    derivative: "_transforms.Derivative | None" = None,
) -> Callable[[F], F]:
    """Decorator of an op's reference: defines `schema` and registers its kernels and rules.

    Args:
        fake: the fake (meta) kernel: allocates the outputs, computes nothing.
        vmap: the vmap rule: takes arguments and returns outputs with the mapped axis first in every tensor.
            `_transforms.fold` makes it for an op whose tensors all begin with the batch axis.
        triton: launcher for CUDA tensors, with the signature of the reference.
        discrete: the op returns indices and writes to no argument, so no gradient can be lost.
        derivative: vjp and jvp. None: forward-mode AD and torch.func raise, unless discrete.
    """
    name = schema[: schema.index("(")]

    def register(reference: F) -> F:
        op = Op(name, schema, reference, triton is not None)

        @functools.wraps(reference)
        def fallback(*args: Any) -> Any:
            if any(isinstance(a, torch.Tensor) and a.is_cuda for a in args):
                _warn_fallback(op)
            with torch._C._AutoDispatchBelowAutograd(), torch._C._DisableAutocast():  # as in a compiled kernel
                return reference(*args)

        first = _registrations.define(name, schema)
        overload = getattr(ops, name).default
        kernels = {"CompositeExplicitAutograd": fallback, **_transforms.autograd(overload, discrete, derivative)}
        if triton is not None and importlib.util.find_spec("triton") is not None:
            kernels["CUDA"] = triton
        for key, kernel in kernels.items():
            kernel = kernel if kernel is torch.library.fallthrough_kernel else _registrations.put(name, key, kernel)
            if first:
                _registrations.library.impl(name, kernel, key, with_keyset=key in _transforms.KEYS)
        fake_kernel = _registrations.put(name, "fake", fake)
        vmap_kernel = _registrations.put(name, "vmap", _transforms.vmap(overload, vmap))
        if first:
            torch.library.register_fake(f"{NAMESPACE}::{name}", fake_kernel, lib=_registrations.library)
            torch.library.register_vmap(f"{NAMESPACE}::{name}", vmap_kernel, lib=_registrations.library)
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
