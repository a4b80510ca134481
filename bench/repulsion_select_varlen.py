"""Stage 1 selection of packed items: mixed image sizes, as in serving."""

from functools import partial

import torch

from . import baselines, inputs, verify
from .harness import Bench, Provider
from .repulsion_select import fits_gram, ragged_case, selection_cost


def _case(group, lengths, keep, channels=1024, dtype=torch.float32, cuda_only=False):
    """keep: share of the tokens that every item keeps."""
    budgets = tuple(max(1, round(n * keep)) for n in lengths)
    return ragged_case(group, lengths, channels, sum(budgets), dtype, cuda_only=cuda_only, budgets=budgets)


EVEN = (576,) * 4
MIX = (576, 1225, 144, 729, 324, 1024)  # thumbnails beside photographs
TILED = (*MIX, 2880, 576)  # and a page of five tiles
CASES = [
    *(_case("varlen", items, 1 / 3, dtype=dtype) for dtype in (torch.float32, torch.bfloat16) for items in (EVEN, MIX)),
    _case("varlen", (1225, 784, 2040, 391), 1 / 5, 3584, torch.bfloat16),
    _case("varlen", TILED * 8, 1 / 3, dtype=torch.bfloat16, cuda_only=True),
]


def _offsets(sizes, device):
    return torch.tensor((0, *sizes)).cumsum(0).to(device, torch.int32)


def make_inputs(case, device):
    return {
        "features": inputs.features(1, case["T"], case["C"], case.dtype, device)[0],
        "cu_seqlens": _offsets(case.lengths, device),
        "cu_budgets": _offsets(case.budgets, device),
        "total_k": case["K"],
        "max_seqlen": case["N"],
    }


def cost(case):
    return selection_cost(list(zip(case.lengths, case.budgets, strict=True)), case["C"], case.dtype.itemsize)


def check(case, given, picks):
    assert picks.shape == (case["K"],)
    verify.selections(zip(given["features"].split(case.lengths), picks.split(case.budgets), strict=True))


def _fits(loop, case, device):
    return loop is not baselines.gram_loop or fits_gram(case["B"], case["N"], device)


def _per_item(name, loop):
    def bind(case, given):
        return partial(baselines.per_item, loop, given["features"], case.lengths, case.budgets)

    return Provider(f"{name} per item", bind, partial(_fits, loop))


def _padded(name, loop, compiled):
    def bind(case, given):
        lengths = given["cu_seqlens"].diff().long()
        return partial(
            baselines.padded, loop, given["features"], case.lengths, case.budgets, lengths, compiled=compiled
        )

    def fits(case, device):
        # Padding saves kernel launches, so it is timed on the GPU only.
        return device.type == "cuda" and _fits(loop, case, device)

    name = f"{name} padded (compiled)" if compiled else f"{name} padded"
    return Provider(name, bind, fits, compiles=compiled)


BENCH = Bench(
    op="repulsion_select_varlen",
    cases=CASES,
    make_inputs=make_inputs,
    cost=cost,
    check=check,
    baselines=[
        *(_per_item(*loop) for loop in baselines.LOOPS.items()),
        # Only the padded loop is compiled: it has one shape. Unpadded items would compile once per length.
        *(_padded(*loop, compiled) for compiled in (False, True) for loop in baselines.LOOPS.items()),
    ],
    reference_syncs=True,
)
