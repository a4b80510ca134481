"""FastV: vectors of the official code, its budget, and the budgets it cannot meet."""

import pytest
import torch

from sts_kernels import keep_top, methods
from sts_kernels.methods import Budget

from . import recipe


@pytest.mark.parametrize("case", recipe.cases("fastv"), ids=recipe.label)
def test_the_official_code(case):
    (attention,) = recipe.tensors(case, recipe.attention(recipe.start(case), case["heads"], case["length"]))
    start, stop = case["visual"]
    scores = attention.double().mean(0)[None, -1]
    visual = torch.zeros_like(scores, dtype=torch.bool)
    visual[:, start:stop] = True
    for ratio in (case["keep"], case["keep"] / (stop - start)):
        (cut,) = methods.create("fastv").plan(Budget(layers=[2], ratios=[ratio]), 32).cuts
        kept, _ = keep_top(scores, visual, cut.keep([stop - start]))
        assert (kept[0] - start).tolist() == case["kept"]
    assert (cut.layer, cut.queries, cut.score_from) == (2, "last", "layer")


@pytest.mark.parametrize(("tokens", "budget"), [(576, 192), (576, 128), (576, 64), (2880, 320)])
def test_the_budget_is_the_average_over_the_layers(tokens, budget):
    """Two layers of 32 run on all tokens: (2 N + 30 K') / 32."""
    plan = methods.create("fastv").plan(Budget(budget=budget), 32)
    after = plan.cuts[0].keep([tokens])
    assert abs((2 * tokens + 30 * after) / 32 - budget) <= 0.5
    assert plan.average([tokens]) == (2 * tokens + 30 * after) / 32
    assert plan.keep(tokens) == tokens
    assert plan.cuts[0].keep([tokens, tokens, 10]) == 2 * after + 10  # a small image keeps all it has


def test_half_without_a_budget():
    plan = methods.create("fastv").plan(Budget(), 32)
    assert (plan.cuts[0].layer, plan.cuts[0].keep([576])) == (2, 288)
    plan = methods.create("fastv", prune_layer=3, ratio=0.25).plan(Budget(), 32)
    assert (plan.cuts[0].layer, plan.cuts[0].keep([576])) == (3, 144)
    plan = methods.create("fastv").plan(Budget(layers=[15], ratios=[0]), 32)  # VTW drops all of them
    assert (plan.cuts[0].keep([576]), plan.average([576])) == (0, 270)


def test_the_least_budget():
    """Layers 0 and 1 alone average 36 tokens: the error names the smallest budget that works."""
    plan = methods.create("fastv").plan(Budget(budget=36), 32)
    with pytest.raises(ValueError, match="fastv: budget must be at least 37 of an image's 576 tokens, 2 of 32 layers"):
        plan.cuts[0].keep([576])
    assert methods.create("fastv").plan(Budget(budget=37), 32).cuts[0].keep([576]) == 1


@pytest.mark.parametrize(
    ("options", "budget", "match"),
    [
        ({}, Budget(budget=0.0625), r"fastv: budget must be above 0.0625 of the tokens, 2 of 32 layers"),
        ({}, Budget(keep=64), "fastv: keep is not an option of this method, give budget or layers or ratios"),
        ({}, Budget(layers=[2, 5]), r"fastv: layers must name one layer, got \[2, 5\]"),
        ({}, Budget(layers=[32]), "fastv: layers must be at most 31, the LLM has 32 layers, got 32"),
        ({"prune_layer": 32}, Budget(), "fastv: prune_layer must be at most 31, the LLM has 32 layers, got 32"),
    ],
)
def test_refusals(options, budget, match):
    with pytest.raises(ValueError, match=match):
        methods.create("fastv", **options).plan(budget, 32)
    with pytest.raises(ValueError, match="prunes inside the LLM only"):
        methods.create("fastv").select(k=1, features=torch.zeros(1, 2, 3))
    with pytest.raises(ValueError, match="prunes inside the LLM only"):
        methods.create("fastv").select_packed([2], [1], features=torch.zeros(2, 3))
