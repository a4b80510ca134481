"""Weighted mean of the tokens assigned to each slot."""

from functools import partial

import torch

from . import inputs
from .harness import Bench, Case, Cost, Provider


def _cases():
    for dtype in (torch.float32, torch.bfloat16):
        for tokens in (576, 2880):
            for count in (20, 192):
                yield Case("main", {"B": 1, "N": tokens, "C": 1024, "K": count}, dtype)
        yield Case("batch", {"B": 8, "N": 576, "C": 1024, "K": 64}, dtype)


def make_inputs(case, device):
    batch, tokens, count = case["B"], case["N"], case["K"]
    generator = torch.Generator().manual_seed(1)
    return {
        "features": inputs.features(batch, tokens, case["C"], case.dtype, device, case.data),
        "assignment": torch.randint(-1, count, (batch, tokens), generator=generator).to(device),
        "count": count,
        "weight": torch.rand(batch, tokens, generator=generator).to(device),
    }


def cost(case):
    batch, tokens, channels, count = case["B"], case["N"], case["C"], case["K"]
    moved = (tokens + count) * channels * case.dtype.itemsize + 12 * tokens + 4 * count
    return Cost(bytes=batch * moved, flops=2 * batch * tokens * channels)


def check(case, given, result):
    mean, mass = result
    share = one_hot(given["assignment"], given["count"], given["weight"]).double()
    want_mass = share.sum(-1)
    want = share @ given["features"].double() / want_mass.clamp(min=1e-300)[..., None]
    torch.testing.assert_close(mass.double(), want_mass, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(mean.double(), want, rtol=1e-2, atol=1e-2)


def one_hot(assignment, count, weight):
    slot = torch.arange(count, device=assignment.device)[:, None]
    return torch.where(assignment[:, None] == slot, weight[:, None], 0.0)


def index_add(features, assignment, count, weight):
    """index_add in float32; on a GPU, in nondeterministic order."""
    batch, _, channels = features.shape
    first = torch.arange(batch, device=features.device)[:, None] * (count + 1)
    slot = (first + torch.where(assignment >= 0, assignment, count)).flatten()
    weighted = (features.float() * weight[..., None]).view(-1, channels)
    total = weighted.new_zeros(batch * (count + 1), channels).index_add_(0, slot, weighted)
    mass = weighted.new_zeros(batch * (count + 1)).index_add_(0, slot, weight.flatten())
    total, mass = total.view(batch, count + 1, channels)[:, :count], mass.view(batch, count + 1)[:, :count]
    return (total / mass.clamp(min=1e-30)[..., None]).to(features.dtype), mass


def matmul(features, assignment, count, weight):
    """A product with the one-hot matrix, in float32."""
    share = one_hot(assignment, count, weight)
    mass = share.sum(-1)
    return (share @ features.float() / mass.clamp(min=1e-30)[..., None]).to(features.dtype), mass


BENCH = Bench(
    op="scatter_mean",
    cases=list(_cases()),
    make_inputs=make_inputs,
    cost=cost,
    check=check,
    baselines=[
        Provider("index_add", lambda case, given: partial(index_add, **given)),
        Provider("matmul", lambda case, given: partial(matmul, **given)),
        Provider(
            "index_add (compiled)",
            lambda case, given: partial(torch.compile(index_add, fullgraph=True, dynamic=False), **given),
            compiles=True,
        ),
    ],
)
