"""STSConfig: invalid arguments, and the budget rule against the numbers of the paper and a search by hand."""

import itertools

import numpy as np
import pytest

from sts_kernels import STSConfig
from sts_kernels.methods import Budget, split_evenly
from sts_kernels.methods.sts import STS


@pytest.mark.parametrize(
    ("budget", "layers", "prune_layer", "tokens", "keep", "after"),
    [
        (128, 32, 16, 576, 192, 64),  # LLaVA-1.5-7B, section 5.1
        (64, 32, 16, 576, 96, 32),
        (32, 32, 16, 576, 48, 16),
        (640, 32, 16, 2880, 960, 320),  # LLaVA-NeXT-7B
        (320, 32, 16, 2880, 480, 160),
        (160, 32, 16, 2880, 240, 80),
        (0.2, 28, 14, 1000, 300, 100),  # Qwen2.5-VL-7B
        (0.1, 28, 14, 1000, 150, 50),
        (128, 40, 16, 576, 213, 71),  # LLaVA-1.5-13B: 213.3 and 71.1
    ],
)
def test_the_papers_budgets(budget, layers, prune_layer, tokens, keep, after):
    plan = STSConfig(budget=budget).plan(layers, prune_layer)
    assert (plan.keep(tokens), plan.keep_after([tokens])) == (keep, after)
    wanted = budget if isinstance(budget, int) else budget * tokens
    assert abs(plan.average(keep, after) - wanted) <= 0.5


@pytest.mark.parametrize("rho", [1 / 3, 0.5, 1.0, 0.05])
@pytest.mark.parametrize(("layers", "prune_layer"), [(32, 16), (28, 14), (40, 16), (6, 1), (7, 6)])
def test_the_average_is_the_budget(layers, prune_layer, rho):
    """The average per layer is within half a token of the budget; stage 2 keeps at most as many as stage 1."""
    for tokens, budget in itertools.product((1, 5, 36, 576), (1, 2, 7, 35, 128, 500, 575, 576, 10**6)):
        plan = STSConfig(budget=budget, rho=rho).plan(layers, prune_layer)
        keep, after = plan.keep(tokens), plan.keep_after([tokens])
        assert 1 <= after <= keep <= tokens
        if budget >= tokens:
            assert keep == after == tokens
        elif after > 1:
            assert abs(plan.average(keep, after) - budget) <= 0.5


def test_images_share_the_budget_of_a_prompt():
    plan = STSConfig(budget=128).plan(32, 16)
    assert plan.keep_after([576, 576]) == 128
    assert plan.keep_after([576, 50]) == 64 + 50  # a small image keeps all it has
    assert plan.keep_after([]) == 0
    assert STSConfig(keep=192, keep_after=64).plan(32).keep_after([576, 576]) == 64


def test_stages_alone():
    structure = STSConfig(budget=128, rho=1.0).plan(32, 16)
    assert (structure.keep(576), structure.keep_after([576])) == (128, 128)
    structure = STSConfig(keep=100, keep_after=1.0).plan(32, 16)
    assert (structure.keep(576), structure.keep_after([576])) == (100, 100)
    semantics = STSConfig(keep_after=64).plan(32, 16)
    assert (semantics.keep(576), semantics.keep_after([576])) == (576, 64)
    assert STSConfig(keep=90).plan(32).keep_after([576]) == 30


def test_shares():
    plan = STSConfig(keep=0.5, keep_after=0.1).plan(32)
    assert plan.keep(576) == 288
    assert plan.keep_after([576, 64]) == 64  # of all the prompt's tokens
    assert STSConfig(keep=0.001).plan(32).keep(10) == 1


def test_numbers_of_numpy():
    given = STSConfig(keep=np.float32(0.5), keep_after=np.int64(64), prune_layer=np.int64(16))
    assert (given.keep, given.keep_after, given.prune_layer) == (0.5, 64, 16)
    assert given.plan(32).keep_after([576]) == 64
    whole = STS(keep_after=np.float32(1.0)).plan(Budget(keep=0.5), 32)
    assert (whole.keep(576), whole.cuts) == (288, ())


def test_default_layers():
    assert STSConfig(budget=8).plan(32, 16).prune_layer == 16
    assert STSConfig(budget=8).plan(6, 16).prune_layer == 3
    assert STSConfig(budget=8).plan(36).prune_layer == 18
    assert STSConfig(budget=8, prune_layer=5).plan(32, 16).prune_layer == 5
    with pytest.raises(ValueError, match="at most 5, the LLM has 6 layers, got 6"):
        STSConfig(budget=8, prune_layer=6).plan(6)


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({}, ValueError, "give budget, keep or keep_after"),
        ({"budget": 8, "keep": 4}, ValueError, "either budget, or keep"),
        ({"budget": 8, "keep_after": 4}, ValueError, "either budget, or keep"),
        ({"budget": 0}, ValueError, "budget must be at least 1 token, got 0"),
        ({"budget": 1.5}, ValueError, "a number of tokens is an int"),
        ({"keep": 0.0}, ValueError, "keep as a share"),
        ({"keep": True}, TypeError, "keep must be"),
        ({"keep_after": "half"}, TypeError, "keep_after must be"),
        ({"budget": 8, "rho": 0}, ValueError, "rho must be above 0"),
        ({"budget": 8, "rho": 1.1}, ValueError, "rho must be above 0 and at most 1, got 1.1"),
        ({"budget": 8, "rho": None}, TypeError, "rho must be a float"),
        ({"budget": 8, "eps": 0.0}, ValueError, "eps must be between 1e-30 and 1e.30, got 0.0"),
        ({"budget": 8, "eps": 1e300}, ValueError, "eps must be between 1e-30 and 1e.30, got 1e.300"),
        ({"budget": 8, "eps": 10**400}, ValueError, "eps must be between 1e-30 and 1e.30"),
        ({"budget": 8, "prune_layer": 0}, ValueError, "prune_layer must be at least 1"),
        ({"budget": 8, "prune_layer": 2.0}, TypeError, "prune_layer must be an int"),
        ({"budget": 8, "anchor": "best"}, ValueError, "anchor must be one of mean, first, saliency"),
        ({"budget": 8, "scope": "tile"}, ValueError, "scope must be one of image, crop"),
    ],
)
def test_refusals(arguments, error, match):
    with pytest.raises(error, match=match):
        STSConfig(**arguments)


def test_it_is_frozen():
    with pytest.raises(AttributeError):
        STSConfig(budget=8).budget = 9


def test_split_evenly():
    for capacities in itertools.product(range(5), repeat=3):
        for total in range(sum(capacities) + 2):
            parts = split_evenly(total, capacities)
            assert sum(parts) == min(total, sum(capacities))
            assert all(p <= c for p, c in zip(parts, capacities, strict=True))
            open_parts = [p for p, c in zip(parts, capacities, strict=True) if p < c]
            assert not open_parts or max(parts) - min(open_parts) <= 1
            assert open_parts == sorted(open_parts, reverse=True)
    assert split_evenly(10, [3, 3, 3, 3]) == [3, 3, 2, 2]
