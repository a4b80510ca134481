"""Nearest key of every token: all other tokens are keys (density peaks), or few targets are (merging)."""

from functools import partial

import torch

from . import inputs
from .harness import Bench, Case, Cost, Provider


def _cases():
    for metric in ("cosine", "euclidean"):
        for dtype in (torch.float32, torch.bfloat16):
            for tokens in (576, 2880):
                yield Case(metric, {"B": 1, "N": tokens, "C": 1024}, dtype)
            yield Case(metric, {"B": 1, "N": 2880, "C": 1024, "K": 64}, dtype)
            yield Case(metric, {"B": 8, "N": 576, "C": 1024}, dtype, cuda_only=True)


def metric_of(case):
    return "euclidean" if case.group == "euclidean" else "cosine"


def make_inputs(case, device):
    """The first K tokens are the keys; exclude_self removes each query's own key."""
    x = inputs.features(case["B"], case["N"], case["C"], case.dtype, device, case.data)
    return {"query": x, "key": x[:, : case.shape.get("K")], "metric": metric_of(case), "exclude_self": True}


def cost(case):
    batch, tokens, channels, keys = case["B"], case["N"], case["C"], case.shape.get("K", case["N"])
    return Cost(
        bytes=batch * tokens * (channels * case.dtype.itemsize + 12), flops=2 * batch * tokens * keys * channels
    )


def check(case, given, result):
    """Compares a sample of rows with float64."""
    index, value = result
    row = torch.arange(0, case["N"], max(1, case["N"] // 16), device=index.device)
    assert ((index >= 0) & (index < given["key"].shape[1])).all()
    query, key = given["query"][:, row].double(), given["key"].double()
    if metric_of(case) == "cosine":
        query, key = (torch.nn.functional.normalize(x, dim=-1) for x in (query, key))
        distance = -(query @ key.mT)
    else:
        distance = torch.cdist(query, key, compute_mode="donot_use_mm_for_euclid_dist").square()
    distance.masked_fill_(row[:, None] == torch.arange(key.shape[1], device=row.device), torch.inf)
    chosen = distance.gather(2, index[:, row, None])[..., 0]
    torch.testing.assert_close(chosen, distance.amin(-1), rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(value[:, row].double().abs(), chosen.abs(), rtol=1e-2, atol=1e-2)


def _products(query, key):
    """query @ key^T in float32. On a GPU, 16-bit rows use the tensor cores."""
    if query.is_cuda and query.dtype != torch.float32:
        return torch.bmm(query, key.mT, out_dtype=torch.float32)
    return torch.bmm(query.float(), key.float().mT)


def matmul(query, key, metric, exclude_self):
    """All products, then the minimum of each row of the (M, K) distances. Inaccurate where distances cancel."""
    distance = _products(query, key)
    if metric == "cosine":
        per_query, per_key = (1 / torch.linalg.vector_norm(x, dim=-1, dtype=torch.float32) for x in (query, key))
        distance = distance.mul_(per_query[..., None]).mul_(per_key[:, None]).neg_()
    else:
        per_query, per_key = (torch.linalg.vector_norm(x, dim=-1, dtype=torch.float32) ** 2 for x in (query, key))
        distance = distance.mul_(-2).add_(per_query[..., None]).add_(per_key[:, None]).clamp_(min=0)
    if exclude_self:
        distance.diagonal(dim1=1, dim2=2).fill_(torch.inf)
    value, index = distance.min(-1)
    return index, -value if metric == "cosine" else value


BENCH = Bench(
    op="nearest",
    cases=list(_cases()),
    make_inputs=make_inputs,
    cost=cost,
    check=check,
    baselines=[
        Provider("matmul", lambda case, given: partial(matmul, **given)),
        Provider(
            "matmul (compiled)",
            lambda case, given: partial(torch.compile(matmul, fullgraph=True, dynamic=False), **given),
            compiles=True,
        ),
    ],
)
