"""Density of each token from its k nearest neighbours."""

from functools import partial

import torch

from . import baselines, inputs
from .harness import Bench, Case, Cost, Provider


def _cases():
    for dtype in (torch.float32, torch.bfloat16):
        for tokens in (576, 2880):
            for neighbours in (5, 64):
                yield Case("main", {"B": 1, "N": tokens, "C": 1024, "K": neighbours}, dtype)
        yield Case("batch", {"B": 8, "N": 576, "C": 1024, "K": 20}, dtype, cuda_only=True)


def make_inputs(case, device):
    return {"features": inputs.features(case["B"], case["N"], case["C"], case.dtype, device, case.data), "k": case["K"]}


def cost(case):
    batch, tokens, channels = case["B"], case["N"], case["C"]
    return Cost(
        bytes=batch * tokens * (channels * case.dtype.itemsize + 4),
        flops=batch * tokens**2 * channels,  # C multiply-adds a pair, half of the symmetric matrix
    )


def check(case, given, density):
    """Compares a sample of rows with float64."""
    x = given["features"].double()
    row = torch.arange(0, case["N"], max(1, case["N"] // 16), device=x.device)
    distance = torch.cdist(x[:, row], x, compute_mode="donot_use_mm_for_euclid_dist").square()
    want = (-distance.topk(case["K"], largest=False).values.mean(-1) / case["C"]).exp()
    torch.testing.assert_close(density[:, row].double(), want, rtol=1e-2, atol=0)


def _density(sqdist, k, channels):
    return (-sqdist.topk(k, largest=False).values.mean(-1) / channels).exp()


def gram(features, k):
    """All distances as |a|^2 + |b|^2 - 2ab, then the k smallest per row. Inaccurate where the difference cancels."""
    return _density(baselines.sqdist_from_gram(baselines.gram(features)), k, features.shape[2])


def cdist(features, k):
    return _density(torch.cdist(features.float(), features.float()).square_(), k, features.shape[2])


BENCH = Bench(
    op="knn_density",
    cases=list(_cases()),
    make_inputs=make_inputs,
    cost=cost,
    check=check,
    baselines=[
        Provider("gram", lambda case, given: partial(gram, **given)),
        Provider("cdist", lambda case, given: partial(cdist, **given)),
        Provider(
            "gram (compiled)",
            lambda case, given: partial(torch.compile(gram, fullgraph=True, dynamic=False), **given),
            compiles=True,
        ),
    ],
)
