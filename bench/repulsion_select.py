"""Stage 1 selection of a batch: LLaVA and Qwen image shapes, batches, padded batches of mixed lengths, video."""

from functools import partial

import torch

from . import baselines, inputs, verify
from .harness import Bench, Case, Cost, Provider

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
MAIN = [(576, 64), (576, 192), (2880, 64), (2880, 192), (2880, 640)]
TILES = (5, 3, 4, 5, 3, 4, 5, 3)  # of 576 tokens, in the images of a LLaVA-NeXT batch


def case_of(group, batch, tokens, channels, k, dtype=F32, data="gaussian", cuda_only=False):
    return Case(group, {"B": batch, "N": tokens, "C": channels, "K": k}, dtype, data, cuda_only)


def ragged_case(group, lengths, channels, k, dtype=F32, **options):
    """Items of mixed lengths, padded or packed. k: the value of column K."""
    shape = {"B": len(lengths), "N": max(lengths), "C": channels, "K": k, "T": sum(lengths)}
    return Case(group, shape, dtype, lengths=tuple(lengths), **options)


def lengths_of(case):
    return case.lengths or (case["N"],) * case["B"]


CASES = [
    *(case_of("main", 1, n, 1024, k, dtype) for dtype in (F32, BF16) for n, k in MAIN),
    case_of("main", 1, 2880, 1024, 480, BF16),
    case_of("main", 1, 576, 1024, 192, F16),
    *(case_of("smooth", 1, n, 1024, k, BF16, "smooth") for n, k in ((576, 192), (2880, 480))),
    case_of("batch", 8, 576, 1024, 192),
    case_of("batch", 8, 576, 1024, 192, BF16),
    case_of("batch", 64, 576, 1024, 192, cuda_only=True),
    case_of("batch", 64, 576, 1024, 192, BF16, cuda_only=True),
    *(ragged_case("ragged", [n * 576 for n in TILES], 1024, 480, dtype) for dtype in (F32, BF16)),
    *(case_of("qwen", 1, 1225, c, 245, dtype) for c in (3584, 5120) for dtype in (F32, BF16)),
    *(case_of("rank", 1, 576, 1024, 576, dtype) for dtype in (F32, BF16)),  # K = N: every token is ranked
    case_of("video", 1, 16384, 1024, 1024, BF16),
    case_of("video", 1, 131072, 1024, 4096, BF16, cuda_only=True),
    # One dimension at a time, for bench.plot.
    *(case_of("sweep-K", 1, 2880, 1024, k) for k in (16, 32, 64, 128, 256, 512, 1024)),
    *(case_of("sweep-N", 1, n, 1024, 192) for n in (256, 576, 1024, 1600, 2304, 2880, 4096, 8192)),
    *(case_of("sweep-N", 1, n, 1024, 192, cuda_only=True) for n in (16384, 32768, 65536, 131072)),
    *(case_of("sweep-B", b, 576, 1024, 192) for b in (1, 2, 4, 8)),
    *(case_of("sweep-B", b, 576, 1024, 192, cuda_only=True) for b in (16, 32, 64, 128, 256)),
]


def make_inputs(case, device):
    x = inputs.features(case["B"], case["N"], case["C"], case.dtype, device, case.data)
    if not case.lengths:
        return {"features": x, "k": case["K"]}
    return {"features": x, "k": case["K"], "num_tokens": torch.tensor(case.lengths, device=device)}


def selection_cost(items, channels, itemsize):
    """items: (tokens, picks) pairs. Features are read once.

    A distance costs C multiply-adds, a weight three flops. Distances: min(K * N, N^2 / 2), as the matrix is symmetric.
    Weights: K * N.
    """
    rows = [(n, min(k, n / 2)) for n, k in items]
    return Cost(
        bytes=sum(n * channels * itemsize + 8 * k for n, k in items),
        flops=int(sum(2 * n * k * channels for n, k in rows) + sum(3 * n * k for n, k in items)),
    )


def cost(case):
    return selection_cost([(n, case["K"]) for n in lengths_of(case)], case["C"], case.dtype.itemsize)


def check(case, given, picks):
    assert picks.shape == (case["B"], case["K"])
    items = [x[:n] for x, n in zip(given["features"], lengths_of(case), strict=True)]
    verify.selections(zip(items, picks, strict=True))


def fits_gram(items, tokens, device):
    """Whether 2 * `items` float32 matrices (tokens, tokens) fit in memory."""
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 4 << 30
    return 2 * 4 * items * tokens**2 <= free


def _baseline(name, loop, compiled):
    return Provider(
        name=f"{name} (compiled)" if compiled else name,
        bind=lambda case, given: partial(loop, **given, compiled=compiled),
        fits=lambda case, device: loop is not baselines.gram_loop or fits_gram(case["B"], case["N"], device),
        compiles=compiled,
    )


BENCH = Bench(
    op="repulsion_select",
    cases=CASES,
    make_inputs=make_inputs,
    cost=cost,
    check=check,
    baselines=[_baseline(*loop, compiled) for compiled in (False, True) for loop in baselines.LOOPS.items()],
)
