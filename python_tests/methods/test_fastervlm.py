"""FasterVLM: vectors of the official code, sorting by hand, ties, non-finite values."""

import math

import pytest
import torch

from sts_kernels import methods

from . import judge, recipe


@pytest.mark.parametrize("case", recipe.cases("fastervlm"), ids=recipe.label)
def test_the_official_code(case):
    rs = recipe.start(case)
    x, heads = recipe.normal(rs, 2, case["N"], case["C"]), recipe.positive(rs, 2, case["heads"], case["N"])
    _, attention = recipe.tensors(case, x, heads)
    order = methods.create("fastervlm").select(k=case["keep"], scores=attention.mean(1)).order[case["item"]]
    assert sorted(order.tolist()) == case["kept"]


def test_best_first(device):
    rng = torch.Generator().manual_seed(0)
    scores = torch.randint(9, (3, 40), generator=rng).float()
    order = methods.create("fastervlm").select(k=17, scores=scores.to(device)).order
    assert order.tolist() == [judge.best_first(row, 17) for row in scores.tolist()]


def test_a_score_that_is_no_number_is_the_worst(device):
    scores = torch.tensor([[math.nan, 1.0, math.inf, -3e38, -math.inf, 2.0]], device=device)
    assert methods.create("fastervlm").select(k=6, scores=scores).order.tolist() == [[5, 1, 3, 0, 2, 4]]


def test_it_keeps_a_share_of_each_crop():
    method = methods.create("fastervlm")
    assert (method.scope, method.site, method.signals) == ("crop", "encoder", {"attention"})
    plan = method.plan(methods.Budget(keep=0.25), 32)
    assert (plan.keep(576), plan.cuts, plan.average([576, 100])) == (144, (), 169)
