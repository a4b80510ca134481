"""VisPruner's deduplication rounds at LLaVA image shapes. Attention has picked half of the budget before."""

from functools import partial

import torch

from . import inputs
from .harness import Bench, Case, Cost, Provider

F32, BF16 = torch.float32, torch.bfloat16
MAIN = [(576, 64), (576, 192), (2880, 64), (2880, 192), (2880, 640)]


def _case(group, batch, tokens, k, dtype=F32, data="gaussian", cuda_only=False):
    """k: the whole budget. Attention picks k // 2 tokens before the rounds."""
    return Case(group, {"B": batch, "N": tokens, "C": 1024, "K": k}, dtype, data, cuda_only)


CASES = [
    *(_case("main", 1, n, k, dtype) for dtype in (F32, BF16) for n, k in MAIN),
    *(_case("smooth", 1, n, k, BF16, "smooth") for n, k in ((576, 192), (2880, 640))),
    *(_case("batch", 8, 576, 64, dtype) for dtype in (F32, BF16)),
    _case("batch", 64, 576, 64, BF16, cuda_only=True),
]


def make_inputs(case, device):
    batch, tokens, k = (case[name] for name in "BNK")
    x = inputs.features(batch, tokens, case["C"], case.dtype, device, case.data)
    generator = torch.Generator(device=device).manual_seed(1)
    order = torch.rand(batch, tokens, generator=generator, device=device).argsort(1)[:, k // 2 :].contiguous()
    return {"features": x, "order": order, "keep": k - k // 2}


def cost(case):
    """Features read once; C multiply-adds for each pair of listed tokens (half of the matrix)."""
    batch, tokens, channels, k = (case[name] for name in "BNCK")
    listed = tokens - k // 2
    return Cost(
        bytes=batch * (listed * (channels * case.dtype.itemsize + 8) + 8 * (k - k // 2)),
        flops=batch * listed**2 * channels,
    )


def _rounds(cosine, rest, keep, step=8):
    """(tokens kept of `rest`, clear). clear: in every round, all maxima of the cosines are more than 1e-6 apart."""
    clear = True
    while len(rest) > keep:
        even, odd = rest[::2], rest[1::2]
        closest, order = cosine[even][:, odd].amax(1).sort(descending=True, stable=True)
        clear &= bool((closest[:-1] - closest[1:] > 1e-6).all())
        rest = torch.cat([even[order[min(step, len(rest) - keep, len(even)) :]], odd])
    return rest, clear


def check(case, given, kept):
    """Picks are distinct and listed. Lists of max 100 tokens must match float64, unless maxima are close (_rounds)."""
    for x, listed, row in zip(given["features"], given["order"], kept, strict=True):
        assert row.unique().numel() == given["keep"] == row.numel()
        assert torch.isin(row, listed).all()
        if len(listed) > 100:
            continue
        unit = torch.nn.functional.normalize(x.double(), dim=1)
        want, clear = _rounds(unit @ unit.T, listed, given["keep"])
        assert not clear or torch.equal(row, want)


def _per_item(closest_of):
    def loop(features, order, keep, step=8):
        kept = []
        for x, listed in zip(features, order, strict=True):
            unit = torch.nn.functional.normalize(x.index_select(0, listed).float(), dim=-1)
            closest, rest = closest_of(unit), torch.arange(len(listed), device=x.device)
            while len(rest) > keep:
                even, odd = rest[::2], rest[1::2]
                remove = min(step, len(rest) - keep, len(even))
                ranked = closest(even, odd).argsort(descending=True, stable=True)
                rest = torch.cat([even[ranked[remove:]], odd])
            kept.append(listed[rest])
        return torch.stack(kept)

    return loop


def _gathered(unit):
    """All cosines once; each round gathers the compared ones."""
    cosine = unit @ unit.mT
    return lambda even, odd: cosine.index_select(0, even).index_select(1, odd).amax(1)


def _masked(unit):
    """All cosines once; each round reads whole rows, with the columns of even tokens masked."""
    cosine, mask = unit @ unit.mT, unit.new_empty(len(unit))
    return lambda even, odd: cosine.index_select(0, even).add_(mask.fill_(-3).index_fill_(0, odd, 0)).amax(1)


def _products(unit):
    """One matrix product per round, as in VisPruner's code."""
    return lambda even, odd: (unit[even] @ unit[odd].mT).amax(1)


LOOPS = {"gathered loop": _per_item(_gathered), "masked loop": _per_item(_masked), "product loop": _per_item(_products)}

BENCH = Bench(
    op="dedup_select",
    cases=CASES,
    make_inputs=make_inputs,
    cost=cost,
    check=check,
    baselines=[
        Provider(
            name,
            lambda case, given, loop=loop: partial(loop, **given),
            fits=lambda case, device, name=name: name != "product loop" or case["N"] <= 576,
        )
        for name, loop in LOOPS.items()
    ],
)
