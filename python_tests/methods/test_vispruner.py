"""VisPruner: vectors of the official code, rounds by hand, lists that the official code cannot run, mixing by erank."""

import itertools
import math

import numpy as np
import pytest
import torch

from sts_kernels import analysis, methods

from . import judge, recipe

CASES = recipe.cases("vispruner")
TWINS = 1e-9  # closer float64 cosines may swap in float32: rounds then differ


def rounds(x, rest, wanted, step=8):
    """Tokens of the list `rest` that stay, in order; whether all cosines that decide differ by more than TWINS.

    x: (N, C) float64.
    """
    unit = x / x.norm(dim=1, keepdim=True).clamp(min=1e-300)
    clear = True
    while wanted and len(rest) > wanted:
        even, odd = rest[::2], rest[1::2]
        closest = [(float((unit[i] @ unit[odd].T).max()), i) for i in even]
        ranked = sorted(closest, key=lambda pair: -pair[0])
        clear &= all(a[0] - b[0] > TWINS for a, b in itertools.pairwise(ranked))
        rest = [i for _, i in ranked[min(step, len(rest) - wanted, len(even)) :]] + odd
    return (rest if wanted else []), clear


def expected(x, scores, k, important):
    ranked = judge.best_first(scores.tolist(), len(scores))
    if len(ranked) <= k:
        return ranked[:k], True
    rest, clear = rounds(x.double(), ranked[important:], k - important)
    return ranked[:important] + rest, clear


@pytest.mark.parametrize("case", CASES, ids=recipe.label)
def test_the_official_code(case):
    rs = recipe.start(case)
    x = recipe.normal(rs, 1, case["N"], case["C"]) if case["recipe"] == "normal" else None
    x = recipe.clustered(rs, 1, case["N"], case["C"]) if x is None else x
    x, heads = recipe.tensors(case, x, recipe.positive(rs, 1, case["heads"], case["N"]))
    method = methods.create("vispruner", important_ratio=case["important_ratio"])
    order = method.select(k=case["keep"], features=x, scores=heads.mean(1)).order[0].tolist()
    important = int(case["keep"] * case["important_ratio"])
    assert sorted(order[:important]) == sorted(case.get("important", order[:important]))
    assert len(set(order)) == case["keep"]
    # Not compared where the official code itself keeps other tokens in float32 than in float64: rounding decides there.
    if case.get("float32_overlap", case["keep"] if case["N"] < 576 else 0) == case["keep"]:
        assert sorted(order) == case["kept" if "kept" in case else "reference"]


@pytest.mark.parametrize("mixing", ["fixed", "adaptive"])
def test_rounds_in_float64(device, mixing):
    """Any number of tokens, ratio and budget: odd and short lists, nothing important, nothing diverse."""
    rng, judged = torch.Generator().manual_seed(0), 0
    for _ in range(60):
        n = int(torch.randint(2, 70, (1,), generator=rng))
        k, ratio = int(torch.randint(1, n + 1, (1,), generator=rng)), float(torch.rand(1, generator=rng))
        x, scores = torch.randn(1, n, 24, generator=rng), torch.rand(1, n, generator=rng)
        share = ratio
        if mixing == "adaptive":
            complexity = float(analysis.erank(x)[0].double())
            share = min(max(ratio + 0.5 * (12.0 - complexity) / 10.0, 0.1), 0.9)
        method = methods.create("vispruner", important_ratio=ratio, mixing=mixing, erank_avg=12.0, erank_iqr=10.0)
        want, clear = expected(x[0], scores[0], k, int(k * share))
        order = method.select(k=k, features=x.to(device), scores=scores.to(device)).order[0].tolist()
        if clear:
            judged += 1
            assert order == want, (n, k, ratio)
    assert judged > 50


def test_mixing_gives_simple_images_more_attention(device):
    """The attention share falls from 0.9 to 0.1 as the erank grows (inverse: rises). A padded item is as alone."""
    rng = torch.Generator().manual_seed(1)
    scale = torch.logspace(0, -4, 32)
    x = torch.stack([torch.randn(40, 32, generator=rng), torch.randn(40, 32, generator=rng) * scale]).to(device)
    scores, k = torch.rand(2, 40, generator=rng).to(device), 20
    best = [judge.best_first(row, 40) for row in scores.tolist()]

    def shared(order, row):  # length of the prefix in attention order
        return next((i for i, (a, b) in enumerate(zip(order, best[row], strict=False)) if a != b), k)

    for mixing, more, less in (("adaptive", 1, 0), ("inverse", 0, 1)):
        method = methods.create("vispruner", mixing=mixing, erank_avg=15.0, erank_iqr=20.0)
        orders = method.select(k=k, features=x, scores=scores).order.tolist()
        assert shared(orders[more], more) >= 10 > shared(orders[less], less) >= 2
        extreme = methods.create("vispruner", mixing=mixing, erank_avg=15.0, erank_iqr=1e-6)
        orders = extreme.select(k=k, features=x, scores=scores).order.tolist()
        assert shared(orders[more], more) >= 18
        assert shared(orders[less], less) in (2, 3)
    counts = torch.tensor([40, 33], device=device)
    padded = method.select(k=k, features=x, scores=scores, num_tokens=counts).order[1]
    alone = method.select(k=k, features=x[1:, :33], scores=scores[1:, :33]).order[0]
    assert torch.equal(padded, alone)
    flat = method.select_packed(
        [40, 33], [k, 7], features=torch.cat([x[0], x[1, :33]]), scores=torch.cat([scores[0], scores[1, :33]])
    )
    assert torch.equal(flat.order[k:], method.select(k=7, features=x[1:, :33], scores=scores[1:, :33]).order[0])


def test_mixing_reads_nothing_back():
    x, scores = torch.empty(2, 30, 8, device="meta"), torch.empty(2, 30, device="meta")
    method = methods.create("vispruner", mixing="adaptive", complexity="entropy", erank_avg=4.8, erank_iqr=0.3)
    assert method.select(k=9, features=x, scores=scores).order.shape == (2, 9)


def test_fewer_finite_tokens_than_are_asked_for(device):
    """Finite tokens by attention, then the others by index."""
    rng = torch.Generator().manual_seed(2)
    x, scores = torch.randn(1, 12, 8, generator=rng), torch.rand(1, 12, generator=rng)
    x[0, [2, 9]], scores[0, 4] = math.nan, math.inf
    order = methods.create("vispruner").select(k=11, features=x.to(device), scores=scores.to(device)).order[0].tolist()
    finite = [i for i in judge.best_first(scores[0].tolist(), 12) if i not in (2, 4, 9)]
    assert order == [*finite, 2, 4]


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"important_ratio": 1.5}, ValueError, "vispruner: important_ratio must be between 0 and 1, got 1.5"),
        ({"important_ratio": "0.5"}, TypeError, "vispruner: important_ratio must be a float, got str"),
        (
            {"mixing": "linear"},
            ValueError,
            "vispruner: mixing must be 'fixed' or 'adaptive' or 'inverse', got 'linear'",
        ),
        ({"complexity": "rank"}, ValueError, "vispruner: complexity must be 'erank' or .*, got 'rank'"),
        ({"erank_avg": 0}, ValueError, "vispruner: erank_avg must be above 0 and finite, got 0"),
        ({"erank_avg": None}, TypeError, "vispruner: erank_avg must be a float, got NoneType"),
        ({"erank_iqr": math.inf}, ValueError, "vispruner: erank_iqr must be above 0 and finite, got inf"),
    ],
)
def test_bad_options(options, error, match):
    with pytest.raises(error, match=match):
        methods.create("vispruner", **options)


def test_calibration_measures_the_average_and_the_quartiles():
    rng = torch.Generator().manual_seed(3)
    images = [torch.randn(2, 20, 16, generator=rng), torch.randn(3, 30, 16, generator=rng)]
    own = methods.create("vispruner").calibrate(images)
    values = [float(np.exp(-(q * np.log(q)).sum())) for x in images for q in (spectrum(row) for row in x)]
    assert own.erank_avg == pytest.approx(np.mean(values), rel=1e-5)
    assert own.erank_iqr == pytest.approx(np.subtract(*np.quantile(values, [0.75, 0.25])), rel=1e-4)
    attention = torch.tensor([[1.0, 1, 1, 1, 0, 0, 0, 0], [1] * 8])
    entropy = methods.create("vispruner", complexity="entropy").calibrate(scores=[attention])
    assert entropy.erank_avg == pytest.approx((math.log(4) + math.log(8)) / 2)
    for given, match in (
        ([], "needs features of at least one image"),
        ([images[0] * math.nan], "needs features of finite values only"),
        ([images[0][:1]], "needs features of images that differ, for erank_iqr"),
    ):
        with pytest.raises(ValueError, match=f"vispruner: calibrate {match}"):
            methods.create("vispruner").calibrate(given)


def spectrum(x):
    values = np.linalg.svd(x.double().numpy(), compute_uv=False)
    return values / values.sum()
