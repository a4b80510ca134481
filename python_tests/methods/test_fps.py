"""Farthest point sampling: a float64 reference's picks, greedy steps in float64, the anchor."""

import pytest
import torch

from sts_kernels import methods

from . import judge, recipe


@pytest.mark.parametrize("case", recipe.cases("fps"), ids=recipe.label)
def test_the_reference(case):
    rs = recipe.start(case)
    x, _ = recipe.tensors(case, recipe.features(case, rs), recipe.positive(rs, case["N"]))
    assert methods.create("fps").select(k=case["keep"], features=x[None]).order[0].tolist() == case["fps_first"]


@pytest.mark.parametrize("anchor", [0, 5])
def test_greedy_in_float64(device, anchor):
    x = torch.randn(2, 120, 16, generator=torch.Generator().manual_seed(3))
    x[1] = 20 + x[1] * 0.1
    order = methods.create("fps", anchor=anchor).select(k=50, features=x.to(device)).order.cpu()
    for item in range(2):
        assert order[item, 0] == anchor
        error = judge.maxmin_error(judge.sqdist(x[item]), order[item].tolist(), 1e-3)
        assert not error, error


def test_an_item_without_the_anchor_starts_at_its_lowest_finite_token(device):
    x = torch.randn(3, 12, 4, generator=torch.Generator().manual_seed(4), device="cpu")
    x[1, 5] = torch.nan
    x[2, 0] = torch.inf
    counts = torch.tensor([12, 12, 3], device=device)
    order = methods.create("fps", anchor=5).select(k=3, features=x.to(device), num_tokens=counts).order
    assert order[:, 0].tolist() == [5, 0, 1]
    assert methods.create("fps", anchor=99).select(k=1, features=x.to(device)).order.tolist() == [[0], [0], [1]]


def test_equal_tokens_tie_to_the_lowest_index(device):
    x = torch.tensor([[[1.0], [1.0], [0.0], [1.0], [0.0]]], device=device)
    assert methods.create("fps").select(k=5, features=x).order.tolist() == [[0, 2, 1, 3, 4]]
