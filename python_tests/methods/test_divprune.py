"""DivPrune: vectors of the official code, greedy steps in float64, and errors of the official code."""

import math

import pytest
import torch

from sts_kernels import methods

from . import judge, recipe

DIVPRUNE = methods.create("divprune")


def check(x, order):
    """Asserts that `order` is a max-min selection of x (N, C) from the token whose nearest neighbour is furthest."""
    distance = judge.cosine_distance(x.cpu())
    others = distance.clone().fill_diagonal_(math.inf).amin(1)
    assert others[order[0]] >= others.max() - 1e-6
    error = judge.maxmin_error(distance, order.tolist(), 1e-3)
    assert not error, error


@pytest.mark.parametrize("case", recipe.cases("divprune"), ids=recipe.label)
def test_the_official_code(case):
    (x,) = recipe.tensors(case, recipe.features(case, recipe.start(case)))
    for dtype in (torch.float32, torch.float16):  # the recipe's numbers are exact in both
        order = DIVPRUNE.select(k=case["keep"], features=x[None].to(dtype)).order
        assert order[0].tolist() == case["order"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_greedy_in_float64(device, dtype):
    rng = torch.Generator().manual_seed(1)
    x = torch.randn(3, 150, 24, generator=rng)
    x[1] += 20  # a large common offset
    x[2] = x[2, :1] + 0.01 * x[2]  # near-duplicates
    x = x.to(device, dtype)
    order = DIVPRUNE.select(k=60, features=x).order
    for item in range(3):
        check(x[item].float(), order[item])


def test_equal_tokens_are_not_repeated(device):
    """The official code repeats token 6 sixteen times here; it picks a token of each kind first, as we do."""
    x = torch.randn(16, 32, generator=torch.Generator().manual_seed(30)).repeat(4, 1).to(device)
    order = DIVPRUNE.select(k=64, features=x[None]).order[0].tolist()
    assert sorted(order) == list(range(64))
    assert sorted(order[:16]) == list(range(16))
    assert order[16:] == list(range(16, 64))


def test_a_zero_row_has_cosine_0(device):
    x = torch.randn(64, 32, generator=torch.Generator().manual_seed(31)).abs()
    x[7] = 0  # all other cosines are positive: row 7 has the furthest nearest neighbour
    order = DIVPRUNE.select(k=16, features=x[None].to(device)).order[0]
    assert order[0] == 7
    check(x, order.cpu())
    x[9] = 0  # a second zero row is at distance 1 from the first, not 0
    check(x, DIVPRUNE.select(k=16, features=x[None].to(device)).order[0].cpu())


def test_tokens_that_do_not_count_are_nobodys_neighbours(device):
    """At 0, 100 and 225 degrees all cosines are negative: a NaN or a padded token at cosine 0 would be the nearest."""
    angle = torch.tensor([0.0, 100.0, 225.0], device=device).deg2rad()
    x = torch.stack([angle.cos(), angle.sin()], 1)
    spoiled = torch.cat([torch.full((1, 2), math.nan, device=device), x])
    assert DIVPRUNE.select(k=4, features=spoiled[None]).order.tolist() == [[3, 1, 2, 0]]
    padded = torch.cat([x, torch.zeros(2, 2, device=device)])
    count = torch.tensor([3], device=device)
    assert DIVPRUNE.select(k=4, features=padded[None], num_tokens=count).order.tolist() == [[2, 0, 1, -1]]


def test_nothing_n_by_n():
    tokens = 3000

    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                Largest.numel = max(Largest.numel, out.numel())
            return out

    with Largest():
        DIVPRUNE.select(k=2, features=torch.randn(1, tokens, 4))
    assert 0 < Largest.numel < tokens**2


def test_it_acts_behind_the_projector():
    assert (DIVPRUNE.site, DIVPRUNE.scope, DIVPRUNE.signals) == ("projected", "image", {"features"})
