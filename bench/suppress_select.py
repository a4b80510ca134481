"""Selection by rank with suppression, batched. Few tokens of "gaussian" data are suppressed, many of "smooth" data."""

from functools import partial

import torch

from . import baselines, inputs, verify
from .harness import Bench, Cost, Provider
from .repulsion_select import BF16, F32, MAIN, case_of, fits_gram

CASES = [
    *(case_of("main", 1, n, 1024, k, dtype) for dtype in (F32, BF16) for n, k in MAIN),
    *(case_of("smooth", 1, n, 1024, k, dtype, "smooth") for dtype in (F32, BF16) for n, k in MAIN),
    *(case_of("batch", 8, 576, 1024, 192, dtype) for dtype in (F32, BF16)),
    case_of("batch", 64, 576, 1024, 192, BF16, cuda_only=True),
]


def make_inputs(case, device):
    """AdaVTP's thresholds at average complexity: tau = min(0.01 rank, 0.25)."""
    x = inputs.features(case["B"], case["N"], case["C"], case.dtype, device, case.data)
    shape = case["B"], case["N"]
    generator = torch.Generator().manual_seed(1)
    rank = torch.rand(shape, generator=generator).argsort(1).to(device)
    tau = ((rank + 1) * 0.01).clamp(max=0.25)
    return {"features": x, "rank": rank, "tau": tau, "k": case["K"]}


def cost(case):
    """Features are read once. Every pick is compared with all earlier picks, or more: K^2 / 2 cosines."""
    items, tokens, channels, k = (case[name] for name in "BNCK")
    token = channels * case.dtype.itemsize + 8 + 4
    return Cost(bytes=items * (tokens * token + 8 * k), flops=items * k * k * channels)


def check(case, given, picks):
    assert picks.shape == (case["B"], case["K"])

    def error_of(item, features, picks):
        return verify.oracle.suppress_error(features, given["rank"][item], given["tau"][item], picks)

    verify.selections(zip(given["features"], picks, strict=True), error_of)


def _baseline(name, loop):
    return Provider(
        name=name,
        bind=lambda case, given: partial(loop, **given),
        fits=lambda case, device: loop is not baselines.suppress_gram_loop or fits_gram(case["B"], case["N"], device),
        syncs=loop is baselines.suppress_best_ranks,
    )


BENCH = Bench(
    op="suppress_select",
    cases=CASES,
    make_inputs=make_inputs,
    cost=cost,
    check=check,
    baselines=[_baseline(*loop) for loop in baselines.SUPPRESS_LOOPS.items()],
)
