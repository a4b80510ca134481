"""Max-min selection of a batch: LLaVA and Qwen image shapes, under both metrics."""

from functools import partial

import torch

from . import baselines, inputs, verify
from .harness import Bench, Provider
from .repulsion_select import BF16, F32, MAIN, case_of, cost, fits_gram

CASES = [
    *(case_of("main", 1, n, 1024, k, dtype) for dtype in (F32, BF16) for n, k in MAIN),
    *(case_of("smooth", 1, n, 1024, k, dtype, "smooth") for dtype in (F32, BF16) for n, k in ((576, 192), (2880, 640))),
    *(case_of("cosine", 1, n, 1024, k, dtype) for dtype in (F32, BF16) for n, k in MAIN),
    *(case_of("batch", 8, 576, 1024, 192, dtype) for dtype in (F32, BF16)),
    case_of("batch", 64, 576, 1024, 192, BF16, cuda_only=True),
    case_of("video", 1, 16384, 1024, 1024, BF16),
]


def make_inputs(case, device):
    x = inputs.features(case["B"], case["N"], case["C"], case.dtype, device, case.data)
    anchor = torch.zeros(case["B"], dtype=torch.int64, device=device)
    metric = "cosine" if case.group == "cosine" else "euclidean"
    return {"features": x, "k": case["K"], "anchor": anchor, "metric": metric}


def check(case, given, picks):
    assert picks.shape == (case["B"], case["K"])

    def error_of(item, features, picks):
        return verify.oracle.farthest_error(features, picks, 0, metric=given["metric"])

    verify.selections(zip(given["features"], picks, strict=True), error_of)


def _baseline(name, loop, compiled):
    def bind(case, given):
        return partial(loop, given["features"], given["k"], given["metric"], compiled)

    return Provider(
        name=f"{name} (compiled)" if compiled else name,
        bind=bind,
        fits=lambda case, device: loop is not baselines.farthest_gram_loop or fits_gram(case["B"], case["N"], device),
        compiles=compiled,
    )


BENCH = Bench(
    op="farthest_select",
    cases=CASES,
    make_inputs=make_inputs,
    cost=cost,
    check=check,
    baselines=[_baseline(*loop, compiled) for compiled in (False, True) for loop in baselines.FARTHEST_LOOPS.items()],
)
