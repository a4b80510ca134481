"""All pairwise squared distances."""

from functools import partial

import torch

from . import baselines, inputs
from .harness import Bench, Case, Cost, Provider


def _cases():
    for dtype in (torch.float32, torch.bfloat16):
        for tokens in (576, 2880, 8192):
            yield Case("main", {"B": 1, "N": tokens, "C": 1024}, dtype, cuda_only=tokens == 8192)
        yield Case("batch", {"B": 8, "N": 576, "C": 1024}, dtype)


def make_inputs(case, device):
    return {"features": inputs.features(case["B"], case["N"], case["C"], case.dtype, device, case.data)}


def cost(case):
    batch, tokens, channels = case["B"], case["N"], case["C"]
    return Cost(
        bytes=batch * (tokens * channels * case.dtype.itemsize + 4 * tokens**2),
        flops=batch * tokens**2 * channels,  # C multiply-adds a pair, half of the symmetric matrix
    )


def check(case, given, sqdist):
    """Compares a sample of rows with float64."""
    x = given["features"].double()
    row = torch.arange(0, case["N"], max(1, case["N"] // 16), device=x.device)
    for b in range(case["B"]):
        want = torch.cdist(x[b, row], x[b], compute_mode="donot_use_mm_for_euclid_dist").square()
        torch.testing.assert_close(sqdist[b, row].double(), want, rtol=1e-3, atol=1e-2)


def gram(features):
    return baselines.sqdist_from_gram(baselines.gram(features))


def cdist(features):
    return torch.cdist(features.float(), features.float()).square_()


BENCH = Bench(
    op="pairwise_sqdist",
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
