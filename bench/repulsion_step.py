"""One step of Algorithm 1."""

import math
from functools import partial

import torch

from . import inputs
from .harness import Bench, Case, Cost, Provider

SHAPES = [(1, 576, 1024), (1, 2880, 1024), (1, 1225, 5120), (8, 576, 1024)]
CASES = [
    *(
        Case("main", dict(zip("BNC", shape, strict=True)), dtype)
        for dtype in (torch.float32, torch.bfloat16)
        for shape in SHAPES
    ),
    Case("video", {"B": 1, "N": 131072, "C": 1024}, torch.bfloat16, cuda_only=True),
]


def make_inputs(case, device):
    """Every call of the op adds the weights of token 7 to the same potentials, so all calls do the same work."""
    return {
        "potential": torch.zeros(case["B"], case["N"], device=device),
        "features": inputs.features(case["B"], case["N"], case["C"], case.dtype, device),
        "picked": torch.full((case["B"],), 7, device=device),
    }


def cost(case):
    batch, tokens, channels = case["B"], case["N"], case["C"]
    return Cost(
        bytes=batch * tokens * (channels * case.dtype.itemsize + 8),
        flops=batch * tokens * (3 * channels + 3),  # by differences; no precomputation
    )


def check(case, given, following):
    """Checks a step from zero potentials, then resets them to zero for the next provider."""
    x, potential = given["features"].double(), given["potential"].clone()
    given["potential"].zero_()
    weight = 1 / ((x - x[:, 7:8]).square().sum(-1) + 1e-6)
    weight[:, 7] = math.inf
    torch.testing.assert_close(potential.double(), weight, rtol=1e-4, atol=0)
    torch.testing.assert_close(weight.gather(1, following[:, None])[:, 0], weight.amin(1), rtol=1e-3, atol=0)


def _scratch(given):
    return torch.empty_like(given["features"], dtype=torch.float32)


def plain(potential, features, picked, eps=1e-6, scratch=None):
    row = picked[:, None]
    centre = features.gather(1, row[..., None].expand(-1, 1, features.shape[2])).float()
    difference = torch.sub(features, centre, out=scratch)  # float32, as the centre is
    sqdist = torch.linalg.vector_norm(difference, dim=-1).square_()
    potential.add_(sqdist.add_(eps).reciprocal_()).scatter_(1, row, math.inf)
    return potential.argmin(1)


BENCH = Bench(
    op="repulsion_step_",
    cases=CASES,
    make_inputs=make_inputs,
    cost=cost,
    check=check,
    baselines=[
        Provider("plain", lambda case, given: partial(plain, **given, scratch=_scratch(given))),
        Provider(
            "plain (compiled)",
            lambda case, given: partial(torch.compile(plain, fullgraph=True, dynamic=False), **given),
            compiles=True,
        ),
    ],
)
