"""Arguments of every op, for tests that run over all ops. They are defined in each op's test module."""

import importlib

import torch

from sts_kernels import _registry

OPS = sorted(_registry.OPS)


def _test_module(op: str, function: str):
    """The test module of `op`, which must define `function`."""
    module = importlib.import_module(f"test_{op.rstrip('_')}")
    assert hasattr(module, function), f"{op} is registered, and {module.__name__}.py has no {function}"
    return module


def samples(op: str, device="cpu") -> list[tuple]:
    """Argument tuples that cover `op`: optional arguments given and omitted, both index dtypes, strided views."""
    return _test_module(op, "samples").samples(device)


def sized(op: str, step: int, device="cpu") -> dict:
    """Arguments of `op` by name, optional tensors included. All sizes grow with `step`."""
    return _test_module(op, "sized").sized(step, device)


def offsets(sizes, device) -> torch.Tensor:
    """(len(sizes) + 1,) int32: `cu_seqlens` of packed items of these sizes."""
    return torch.tensor([0, *sizes], dtype=torch.int32, device=device).cumsum(0, dtype=torch.int32)


def sized_packed(step: int, device) -> tuple[torch.Generator, list[int], dict]:
    """The common part of `sized` for packed selections: generator, item lengths, shared arguments."""
    batch, tokens, channels, k = 2 + step, 11 + 6 * step, 5 + 2 * step, 3 + step
    rng = torch.Generator().manual_seed(step)
    lengths, budgets = [tokens + b for b in range(batch)], [k + b for b in range(batch)]
    arguments = {
        "features": torch.randn(sum(lengths), channels, generator=rng).to(device),
        "cu_seqlens": offsets(lengths, device),
        "cu_budgets": offsets(budgets, device),
        "total_k": sum(budgets),
        "max_seqlen": max(lengths),
    }
    return rng, lengths, arguments


def tensors(arguments: dict) -> dict:
    return {name: value for name, value in arguments.items() if isinstance(value, torch.Tensor)}


def cloned(arguments: dict) -> dict:
    return {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in arguments.items()}


def written(op: str) -> str | None:
    """Name of the argument that `op` mutates; None if there is none."""
    schema = getattr(torch.ops.sts_kernels, op).default._schema
    return next((a.name for a in schema.arguments if a.alias_info and a.alias_info.is_write), None)


def outputs(out) -> list:
    """The outputs of an op as a list."""
    return list(out) if isinstance(out, tuple) else [out]


def results(op: str, call, arguments: dict) -> list:
    """Outputs of `call`, then its mutated argument, if any. `arguments` are not changed."""
    arguments = cloned(arguments)
    out = outputs(call(**arguments))
    return [*out, arguments[written(op)]] if written(op) else out


def assert_equal(got, want) -> None:
    assert len(got) == len(want)
    for a, b in zip(got, want, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)
