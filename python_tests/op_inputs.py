"""Arguments of every op, for the tests of what all ops owe to torch. Each op's own are beside its tests."""

import importlib

import torch

from sts_kernels import _registry

OPS = sorted(_registry.OPS)


def _test_module(op: str, function: str):
    """The module with the tests of `op`, which has to offer `function`."""
    module = importlib.import_module(f"test_{op.rstrip('_')}")
    assert hasattr(module, function), f"{op} is registered, and {module.__name__}.py has no {function}"
    return module


def samples(op: str, device="cpu") -> list[tuple]:
    """Argument tuples of every kind `op` takes: optional ones given and not, both index types, strided views."""
    return _test_module(op, "samples").samples(device)


def sized(op: str, step: int, device="cpu") -> dict:
    """Arguments of `op` by name. All sizes grow with `step`; optional tensors are given too."""
    return _test_module(op, "sized").sized(step, device)


def offsets(sizes, device) -> torch.Tensor:
    """(len(sizes) + 1,) int32: where each of several packed items begins, and where the last one ends."""
    return torch.tensor([0, *sizes], dtype=torch.int32, device=device).cumsum(0, dtype=torch.int32)


def tensors(arguments: dict) -> dict:
    return {name: value for name, value in arguments.items() if isinstance(value, torch.Tensor)}


def cloned(arguments: dict) -> dict:
    return {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in arguments.items()}


def written(op: str) -> str | None:
    """The argument that `op` writes to."""
    schema = getattr(torch.ops.sts_kernels, op).default._schema
    return next((a.name for a in schema.arguments if a.alias_info and a.alias_info.is_write), None)


def outputs(out) -> list:
    """What an op returned, one or several, as a list."""
    return list(out) if isinstance(out, tuple) else [out]


def results(op: str, call, arguments: dict) -> list:
    """What `call` returns and what it leaves in the argument that it writes to; the given tensors stay."""
    arguments = cloned(arguments)
    out = outputs(call(**arguments))
    return [*out, arguments[written(op)]] if written(op) else out


def assert_equal(got, want) -> None:
    assert len(got) == len(want)
    for a, b in zip(got, want, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)
