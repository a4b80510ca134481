"""Every op with every argument given, at sizes that change from step to step: for what all ops owe to torch."""

import importlib

import torch

from sts_kernels import _registry

OPS = sorted(_registry.OPS)


def sized(op: str, step: int, device="cpu") -> dict:
    """Arguments of `op` by name. All sizes grow with `step`; optional tensors are given too."""
    batch, tokens, channels, k = 2 + step, 11 + 6 * step, 5 + 2 * step, 3 + step
    rng = torch.Generator().manual_seed(step)

    def normal(*shape):
        return torch.randn(*shape, generator=rng).to(device)

    def index(high, *shape, low=0):
        return torch.randint(low, high, shape, generator=rng).to(device)

    def offsets(*lengths):
        return torch.tensor([0, *lengths], dtype=torch.int32, device=device).cumsum(0, dtype=torch.int32)

    lengths, budgets = [tokens + b for b in range(batch)], [k + b for b in range(batch)]
    heads = 2 + step
    query = normal(batch, heads * (3 + step), 7 + step)
    if op == "pairwise_sqdist":
        return {"features": normal(batch, tokens, channels)}
    if op == "repulsion_step_":
        potential = normal(batch, tokens).square()
        return {
            "potential": potential,
            "features": normal(batch, tokens, channels),
            "picked": index(tokens, batch),
            "eps": 1e-3,
        }
    if op == "repulsion_select":
        return {
            "features": normal(batch, tokens, channels),
            "k": k,
            "eps": 1e-3,
            "anchor": index(3, batch),
            "num_tokens": index(tokens + 1, batch, low=3),
        }
    if op == "repulsion_select_varlen":
        return {
            "features": normal(sum(lengths), channels),
            "cu_seqlens": offsets(*lengths),
            "cu_budgets": offsets(*budgets),
            "total_k": sum(budgets),
            "eps": 1e-3,
            "anchor": index(tokens, batch),
            "max_seqlen": max(lengths),
        }
    if op == "last_query_scores":
        return {
            "query": query,
            "key": normal(batch, tokens, heads, 7 + step),
            "scale": 0.3,
            "key_mask": index(4, batch, tokens) > 0,
        }
    if op == "last_query_scores_varlen":
        return {
            "query": query,
            "key": normal(sum(lengths), heads, 7 + step),
            "cu_seqlens": offsets(*lengths),
            "max_seqlen": max(lengths),
            "scale": 0.3,
        }
    own = importlib.import_module(f"test_{op.rstrip('_')}")  # an op added later brings its sizes with its tests
    assert hasattr(own, "sized"), f"{op} is registered, and {own.__name__}.py has no sized(step, device)"
    return own.sized(step, device)


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
