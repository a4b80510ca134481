"""PyramidDrop: vectors of the official code, its schedule, and the ratio solved for a budget."""

import pytest
import torch

from sts_kernels import keep_top, last_query_scores, methods
from sts_kernels.methods import Budget
from sts_kernels.methods._budget import common_ratio
from sts_kernels.methods.pyramiddrop import quarters

from . import recipe


def rotated(x, heads):
    """x (L, heads * D) -> (1, L, heads, D): rotary embedding by halves at positions 0 .. L - 1, base 10000."""
    x = x.double().unflatten(1, (heads, -1))
    length, _, dim = x.shape
    angle = torch.outer(torch.arange(length), 1e4 ** (-torch.arange(0, dim, 2) / dim)).repeat(1, 2)[:, None]
    turned = torch.cat([-x[..., dim // 2 :], x[..., : dim // 2]], -1)
    return (x * angle.cos() + turned * angle.sin())[None].float()


@pytest.mark.parametrize("case", recipe.cases("pyramiddrop"), ids=recipe.label)
def test_the_official_code(case):
    heads, stage, (start, tokens), ratios = (case[name] for name in ("heads", "stage", "image", "ratios"))
    channels, visual = heads * case["head_dim"], int(tokens * ratios[stage])
    length, rs = start + visual + case["text"], recipe.start(case)
    arrays = recipe.normal(rs, 1, length, channels), *(recipe.normal(rs, channels, channels) / 8 for _ in range(2))
    hidden, wq, wk = recipe.tensors(case, *arrays)
    query, key = (rotated(hidden[0].double() @ w.double().T, heads) for w in (wq, wk))
    candidates = torch.zeros(1, length, dtype=torch.bool)
    candidates[:, start : start + visual] = True
    query, key = (torch.nn.functional.pad(x, (0, 64 - case["head_dim"])) for x in (query, key))  # zeros add nothing
    scores = last_query_scores(query[:, -1], key, case["head_dim"] ** -0.5)
    for budget in (Budget(), Budget(layers=[8, 16, 24], ratios=ratios[1:])):
        cut = methods.create("pyramiddrop").plan(budget, 32).cuts[stage]
        kept, _ = keep_top(scores, candidates, cut.keep([tokens]))
        assert (kept[0] - start).tolist() == case["kept"]


def test_its_own_schedule():
    method = methods.create("pyramiddrop")
    plan = method.plan(Budget(), 32)
    assert [(c.layer, c.keep([576]), c.queries, c.score_from) for c in plan.cuts] == [
        (8, 288, "last", "next"),
        (16, 144, "last", "next"),
        (24, 72, "last", "next"),
    ]
    assert (plan.keep(576), plan.average([576]), method.positions, method.site) == (576, 270, "contiguous", None)
    assert [c.keep([576, 10]) for c in plan.cuts] == [293, 146, 73]  # int(N ratio) of each image
    assert [c.keep([7]) for c in plan.cuts] == [3, 1, 1]
    assert [quarters(n) for n in (2, 3, 4, 28, 40)] == [(1,), (1, 2), (1, 2, 3), (7, 14, 21), (10, 20, 30)]


@pytest.mark.parametrize(
    ("places", "budget"),
    [((8, 16, 24), 192), ((8, 16, 24), 145), ((2, 8, 16), 64), ((1,), 100), ((4, 31), 0.2), ((2, 8, 16), 1.0)],
)
def test_one_common_ratio_meets_the_budget(places, budget):
    plan = methods.create("pyramiddrop").plan(Budget(budget=budget, layers=places), 32)
    wanted = budget * 576 if isinstance(budget, float) else budget
    kept = [576, *(cut.keep([576]) for cut in plan.cuts)]
    assert abs(plan.average([576]) - wanted) <= 0.5
    assert kept == sorted(kept, reverse=True)
    ratio = common_ratio("pyramiddrop", wanted / 576, places, 32)
    assert all(abs(k - ratio**i * 576) <= 1 for i, k in enumerate(kept))
    assert plan.cuts[0].keep([576, 576]) == 2 * kept[1]


@pytest.mark.parametrize("none", [0, 0.0])
def test_a_ratio_of_zero_drops_all(none):
    plan = methods.create("pyramiddrop").plan(Budget(layers=[8, 16], ratios=[0.001, none]), 32)
    assert [cut.keep([576, 12]) for cut in plan.cuts] == [2, 0]  # else at least one token of an image


@pytest.mark.parametrize(
    ("budget", "match"),
    [
        (Budget(budget=0.25), "pyramiddrop: budget must be above 0.25 of the tokens, 8 of 32 layers"),
        (Budget(keep=64), "pyramiddrop: keep is not an option"),
        (Budget(layers=[8, 16], ratios=[0.5]), "pyramiddrop: ratios must have one number for each of the 2 layers"),
        (Budget(ratios=[0.5]), r"pyramiddrop: ratios must have one number for each of the layers \[8, 16, 24\], got 1"),
        (Budget(layers=[16, 8]), r"pyramiddrop: layers must name at least one layer and ascend, got \[16, 8\]"),
        (Budget(budget=200, ratios=[0.5]), "pyramiddrop: give either budget or ratios"),
    ],
)
def test_refusals(budget, match):
    with pytest.raises(ValueError, match=match):
        methods.create("pyramiddrop").plan(budget, 32)


def test_the_least_budget():
    """With layer 8 first, the budget is above 144: 8 of 32 layers on 576 tokens alone average 144."""
    with pytest.raises(ValueError, match="pyramiddrop: budget must be at least 145 of an image's 576 tokens"):
        methods.create("pyramiddrop").plan(Budget(budget=128), 32).cuts[0].keep([576])
    with pytest.raises(ValueError, match="at least 145"):
        methods.create("pyramiddrop").plan(Budget(budget=144), 32).cuts[0].keep([576])
    assert methods.create("pyramiddrop").plan(Budget(budget=145), 32).cuts[0].keep([576]) >= 1
