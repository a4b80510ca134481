"""Argument checks shared by the ops. Each error names the op, the argument, the expected and the given value."""

import functools
import math
import numbers
import os
import warnings
from typing import Any

import torch
from torch._C import _functorch
from torch._subclasses import FakeTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

FLOATING = (torch.float32, torch.float16, torch.bfloat16)
SCORES = (*FLOATING, torch.float64)
INTEGER = (torch.int64, torch.int32)
# Bounds of eps, also in torch_glue.h: a sum of 1 / eps over 131072 duplicates, and distance + eps, must fit float32.
MIN_EPS, MAX_EPS = 1e-30, 1e30
_EPS_SPAN = f"between {MIN_EPS} and {MAX_EPS}"  # made here, because Dynamo may take the bounds as dynamic floats
MAX_FLOAT32 = torch.finfo(torch.float32).max
MAX_INT = 2**63 - 1
# Types of ints and floats. Abstract ones, which NumPy's are registered with, come last: they are slow.
_INTEGERS: tuple[Any, ...] = (int, torch.SymInt, numbers.Integral)
_REALS: tuple[Any, ...] = (float, int, torch.SymFloat, numbers.Real)


def tensor(op: str, name: str, value: Any, dtypes: tuple[Any, ...], shape: str) -> None:
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{op}: {name} must be a tensor of shape {shape}, got {type(value).__name__}")
    _dense(op, name, value)
    if value.dtype not in dtypes:
        names = ", ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise TypeError(f"{op}: {name} must be {names}, got {str(value.dtype).removeprefix('torch.')}")
    if value.ndim != len(shape.strip("(,)").split(",")):
        raise ValueError(f"{op}: {name} must have shape {shape}, got {tuple(value.shape)}")


def _dense(op: str, name: str, value: torch.Tensor) -> None:
    if value.is_nested:
        raise TypeError(
            f"{op}: {name} must be a dense tensor, got a nested one; pad it with torch.nested.to_padded_tensor, or "
            f"pack its values and call a varlen op"
        )
    if value.layout is not torch.strided:
        layout = str(value.layout).removeprefix("torch.").removeprefix("_")
        raise TypeError(f"{op}: {name} must be a dense tensor, got layout {layout}; give {name}.to_dense()")
    if value.is_quantized:
        raise TypeError(f"{op}: {name} must be a dense tensor, got a quantized one; give {name}.dequantize()")


def features(op: str, value: Any, shape: str = "(B, N, C)", name: str = "features", least_tokens: int = 1) -> None:
    tensor(op, name, value, FLOATING, shape)
    tokens, channels = value.shape[-2:]
    if tokens < least_tokens or channels == 0:
        needed = "one token and one channel" if least_tokens else "one channel"
        raise ValueError(f"{op}: {name} must have at least {needed}, got shape {tuple(value.shape)}")


def per_token(
    op: str,
    name: str,
    value: Any,
    dtypes: tuple[Any, ...],
    like: torch.Tensor,
    shape: str = "(B, N)",
    other: str = "features",
) -> None:
    """Checks one number per row of `like`, on the device of `like`. Messages call that tensor `other`."""
    tensor(op, name, value, dtypes, shape)
    expected = tuple(like.shape[: value.ndim])
    if value.shape != expected:
        raise ValueError(f"{op}: {name} must have shape {shape} = {expected}, got {tuple(value.shape)}")
    same_device(op, name, value, like, other)


def index_vector(op: str, name: str, value: Any, length: int, shape: str, like: torch.Tensor) -> None:
    """Checks dtype, shape (length,) and device of an integer vector, not its values."""
    tensor(op, name, value, INTEGER, shape)
    if value.shape[0] != length:
        raise ValueError(f"{op}: {name} must have shape {shape} = ({length},), got {tuple(value.shape)}")
    same_device(op, name, value, like)


def same_device(op: str, name: str, value: torch.Tensor, like: torch.Tensor, other: str = "features") -> None:
    if value.device != like.device:
        raise ValueError(f"{op}: {name} must be on the device of {other}, {like.device}, got {value.device}")


_AS_IS = "{}"  # Dynamo traces str.format of a dynamic number, but neither str() nor an f-string


def _shown(value: Any) -> str:
    """`str(value)`; Python raises on very long ints."""
    if isinstance(value, int) and abs(value) >= 10**400:
        return "an int of more than 400 digits"
    return _AS_IS.format(value)


def integer(op: str, name: str, value: Any, low: int, high: Any = None, why: str = "") -> None:
    if isinstance(value, bool) or not isinstance(value, _INTEGERS):
        raise TypeError(f"{op}: {name} must be an int, got {type(value).__name__}")
    highest = MAX_INT if high is None else high
    if not low <= value <= highest:
        span = f"at least {low}" if high is None and value < low else f"between {low} and {_shown(highest)}{why}"
        raise ValueError(f"{op}: {name} must be {span}, got {_shown(value)}")


def one_of(op: str, name: str, value: Any, allowed: tuple[Any, ...]) -> None:
    if not isinstance(value, str):
        raise TypeError(f"{op}: {name} must be a str, got {type(value).__name__}")
    if value not in allowed:
        raise ValueError(f"{op}: {name} must be {' or '.join(map(repr, allowed))}, got {value!r}")


def number(op: str, name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, _REALS):
        raise TypeError(f"{op}: {name} must be a float, got {type(value).__name__}")


def between(op: str, name: str, value: Any, low: float, high: float) -> None:
    number(op, name, value)
    if not low <= value <= high:
        raise ValueError(f"{op}: {name} must be between {low} and {high}, got {_shown(value)}")


def share(op: str, name: str, value: Any) -> None:
    """Checks that `value` is a number in (0, 1]."""
    number(op, name, value)
    if not 0 < value <= 1:
        raise ValueError(f"{op}: {name} must be above 0 and at most 1, got {value}")


def flag(op: str, name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{op}: {name} must be True or False, got {type(value).__name__}")


def eps(op: str, value: Any) -> None:
    number(op, "eps", value)
    if not MIN_EPS <= value <= MAX_EPS:
        raise ValueError(f"{op}: eps must be {_EPS_SPAN}, got {_shown(value)}")


def in_float32(op: str, name: str, value: Any) -> None:
    if not -MAX_FLOAT32 <= value <= MAX_FLOAT32:
        raise ValueError(f"{op}: {name} must be finite in float32, got {_shown(value)}")


def _concrete(value: torch.Tensor) -> bool:
    """Whether `value` is a plain tensor: not traced, fake, a wrapper subclass, or wrapped by torch.func or vmap."""
    if torch.compiler.is_compiling():
        return False
    if type(value) is not torch.Tensor and (isinstance(value, FakeTensor) or is_traceable_wrapper_subclass(value)):
        return False
    return not (torch._C._are_functorch_transforms_active() and _functorch.is_functorch_wrapped_tensor(value))


def counts(op: str, name: str, value: torch.Tensor | None, most: int, what: str) -> None:
    """Checks 0 <= value[b] <= most for each item, if the values are readable."""
    if value is None or not values_readable(value):
        return
    for item, count in enumerate(value.tolist()):
        if not 0 <= count <= most:
            raise ValueError(f"{op}: {name}[{item}] must be between 0 and {most}, its {what}, got {count}")


def picks(op: str, name: str, value: torch.Tensor, tokens: int) -> None:
    """Checks -1 <= value < tokens, if the values are readable."""
    if not value.numel() or not values_readable(value):
        return
    low, high = (extreme.item() for extreme in value.aminmax())
    if not -1 <= low <= high < tokens:
        raise ValueError(f"{op}: {name} must be between -1 and {tokens - 1}, got {low if low < -1 else high}")


def values_readable(value: torch.Tensor) -> bool:
    """Whether to read the elements of `value`: free on the CPU; elsewhere a sync, only under STS_KERNELS_CHECK=1."""
    if not _concrete(value) or value.is_meta:
        return False
    if value.device.type == "cpu":
        return True
    if os.environ.get("STS_KERNELS_CHECK") != "1":
        return False
    _warn_sync()
    return True


def writable(op: str, name: str, value: torch.Tensor, **read: torch.Tensor) -> None:
    """Checks that the elements of `value` overlap neither each other nor the tensors in `read`."""
    if not _concrete(value) or value.is_meta:
        return
    if not value.is_contiguous() and _overlaps_itself(value):
        raise ValueError(
            f"{op}: {name} must have memory of its own for every element, for it is written to, got strides "
            f"{value.stride()} for shape {tuple(value.shape)}; give {name}.clone()"
        )
    storage = value.untyped_storage()._cdata
    for other, tensor in read.items():
        if _concrete(tensor) and tensor.untyped_storage()._cdata == storage and _share_memory(value, tensor):
            raise ValueError(f"{op}: {name} must not share memory with {other}, for it is written to; clone one")


def _overlaps_itself(value: torch.Tensor) -> bool:
    reach = 0
    for stride, size in sorted(zip(value.stride(), value.shape, strict=True)):
        if size > 1 and stride <= reach:  # necessary for an overlap; the offsets decide
            offsets = _offsets(value)
            return bool(offsets.unique().numel() < offsets.numel())
        reach += stride * (size - 1)
    return False


def _share_memory(a: torch.Tensor, b: torch.Tensor) -> bool:
    start_a, start_b = a.data_ptr(), b.data_ptr()
    if not (start_a < start_b + _extent(b) and start_b < start_a + _extent(a)):
        return False
    # The ranges intersect, but the views may interleave: compare addresses of pieces, which divide both element sizes.
    piece = math.gcd(a.element_size(), b.element_size())
    pieces = [
        (t.data_ptr() + _offsets(t) * t.element_size())[:, None]
        + torch.arange(0, t.element_size(), piece, device="cpu")
        for t in (a, b)
    ]
    return bool(torch.isin(*pieces).any())


def _extent(value: torch.Tensor) -> int:
    """Bytes from the first element to the end of the last."""
    if value.numel() == 0:
        return 0
    last = sum(stride * (size - 1) for stride, size in zip(value.stride(), value.shape, strict=True))
    return (last + 1) * value.element_size()


def _offsets(value: torch.Tensor) -> torch.Tensor:
    """Offset of each element from the first, in elements."""
    offsets = torch.zeros(1, dtype=torch.int64, device="cpu")
    for stride, size in zip(value.stride(), value.shape, strict=True):
        offsets = (offsets[:, None] + stride * torch.arange(size, device="cpu")).flatten()
    return offsets


@functools.cache
def _warn_sync() -> None:
    warnings.warn(
        "STS_KERNELS_CHECK=1: sts_kernels reads anchors, token counts and offsets back from the device to check them, "
        "which synchronises at every call",
        stacklevel=4,
    )
