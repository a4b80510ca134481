"""Argument checks shared by the ops. Each error names the op, the argument, what was expected and what came."""

import functools
import math
import os
import warnings

import torch

FLOATING = (torch.float32, torch.float16, torch.bfloat16)
INTEGER = (torch.int64, torch.int32)
MIN_EPS = 1e-30  # 1/eps summed over 131072 duplicates stays finite in float32


def tensor(op: str, name: str, value, dtypes: tuple, shape: str, ndim: int) -> None:
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{op}: {name} must be a tensor of shape {shape}, got {type(value).__name__}")
    if value.dtype not in dtypes:
        names = ", ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise TypeError(f"{op}: {name} must be {names}, got {str(value.dtype).removeprefix('torch.')}")
    if value.ndim != ndim:
        raise ValueError(f"{op}: {name} must have shape {shape}, got {tuple(value.shape)}")


def features(op: str, value, shape: str = "(B, N, C)") -> None:
    tensor(op, "features", value, FLOATING, shape, shape.count(",") + 1)
    tokens, channels = value.shape[-2:]
    if tokens == 0 or channels == 0:
        raise ValueError(f"{op}: features must have at least one token and one channel, got shape {tuple(value.shape)}")


def index_vector(op: str, name: str, value, length: int, shape: str, like: torch.Tensor) -> None:
    """An integer vector of `length` on the device of the features; its values are `in_range`'s business."""
    tensor(op, name, value, INTEGER, shape, 1)
    if value.shape[0] != length:
        raise ValueError(f"{op}: {name} must have shape {shape} = ({length},), got {tuple(value.shape)}")
    same_device(op, name, value, like)


def same_device(op: str, name: str, value: torch.Tensor, like: torch.Tensor, other: str = "features") -> None:
    if value.device != like.device:
        raise ValueError(f"{op}: {name} must be on the device of {other}, {like.device}, got {value.device}")


def integer(op: str, name: str, value, low: int, high=None, why: str = "") -> None:
    if isinstance(value, bool) or not isinstance(value, int | torch.SymInt):
        raise TypeError(f"{op}: {name} must be an int, got {type(value).__name__}")
    if value < low or (high is not None and value > high):
        span = f"at least {low}" if high is None else f"between {low} and {high}{why}"
        raise ValueError(f"{op}: {name} must be {span}, got {value}")


def eps(op: str, value) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{op}: eps must be a float, got {type(value).__name__}")
    if not (MIN_EPS <= value < math.inf):
        raise ValueError(f"{op}: eps must be a finite number of at least {MIN_EPS}, got {value}")


def values_readable(value: torch.Tensor) -> bool:
    """Whether the numbers inside `value` may be looked at: free on the CPU, elsewhere a sync (STS_KERNELS_CHECK=1)."""
    if torch.compiler.is_compiling() or isinstance(value, torch._subclasses.FakeTensor) or value.is_meta:
        return False
    if value.device.type == "cpu":
        return True
    if os.environ.get("STS_KERNELS_CHECK") != "1":
        return False
    _warn_sync()
    return True


@functools.cache
def _warn_sync() -> None:
    warnings.warn(
        "STS_KERNELS_CHECK=1: sts_kernels reads anchors, token counts and offsets back from the device to check them, "
        "which synchronises at every call",
        stacklevel=4,
    )
