"""FasterVLM + DivPrune: picks by attention, then greedy max-min steps in float64; shares that follow the erank."""

import math

import pytest
import torch

from sts_kernels import analysis, methods

from . import judge


def check(x, scores, order, k, attended):
    """Asserts that `order` is `attended` tokens by attention, then a max-min selection that starts from them."""
    best = judge.best_first(scores.tolist(), len(scores))
    if k >= len(x):
        assert order == best
        return
    assert order[:attended] == best[:attended]
    assert len(set(order)) == k
    distance = judge.cosine_distance(x)
    nearest = distance[order[:attended]].min(0).values
    left = torch.ones(len(x), dtype=bool)
    left[order[:attended]] = False
    for pick in order[attended:]:
        assert nearest[pick] >= nearest[left].max() * (1 - 1e-3) - 1e-6
        left[pick] = False
        nearest = torch.minimum(nearest, distance[pick])


@pytest.mark.parametrize("mixing", ["fixed", "adaptive", "inverse"])
def test_greedy_in_float64(device, mixing):
    rng = torch.Generator().manual_seed(0)
    for n, k, ratio in (
        (80, 30, 0.5),
        (80, 30, 0.0),
        (80, 30, 1.0),
        (40, 40, 0.5),
        (40, 39, 0.3),
        (9, 1, 0.5),
        (60, 7, 0.2),
    ):
        x, scores = torch.randn(2, n, 24, generator=rng), torch.rand(2, n, generator=rng)
        x[1] *= torch.logspace(0, -2, 24)
        method = methods.create(
            "fastervlm_divprune", attention_ratio=ratio, mixing=mixing, erank_avg=12.0, erank_iqr=20.0
        )
        order = method.select(k=k, features=x.to(device), scores=scores.to(device)).order.tolist()
        for item in range(2):
            share, sign = ratio, {"fixed": 0.0, "adaptive": 0.5, "inverse": -0.5}[mixing]
            if sign:
                complexity = float(analysis.erank(x[item : item + 1]).double())
                share = min(max(ratio + sign * (12.0 - complexity) / 20.0, 0.1), 0.9)
            check(x[item], scores[item], order[item], k, max(1, int(k * share)))


def test_the_attended_tokens_are_no_neighbours_picked_again(device):
    """Two directions, attention on the first: the first diverse pick has the other direction. Copies come last."""
    x = torch.tensor([[1.0, 0.0]] * 4 + [[0.0, 1.0]] * 4, device=device)[None]
    scores = torch.tensor([[8.0, 7, 6, 5, 4, 3, 2, 1]], device=device)
    order = methods.create("fastervlm_divprune").select(k=4, features=x, scores=scores).order
    assert order.tolist() == [[0, 1, 4, 2]]


def test_a_token_that_is_no_number(device):
    x = torch.randn(1, 8, 4, generator=torch.Generator().manual_seed(1)).to(device)
    scores = torch.arange(8.0, 0, -1, device=device)[None]
    x[0, 0], scores[0, 5] = math.nan, math.nan
    method = methods.create("fastervlm_divprune")
    order = method.select(k=8, features=x, scores=scores).order[0].tolist()
    assert order == [1, 2, 3, 4, 6, 7, 0, 5]
    assert not {0, 5} & set(method.select(k=5, features=x, scores=scores).order[0].tolist())


def test_mixing_reads_nothing_back():
    method = methods.create("fastervlm_divprune", mixing="inverse", complexity="participation", erank_avg=9.0)
    x, scores = torch.empty(2, 30, 8, device="meta"), torch.empty(2, 30, device="meta")
    assert method.select(k=9, features=x, scores=scores).order.shape == (2, 9)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        (
            {"attention_ratio": -0.5},
            ValueError,
            "fastervlm_divprune: attention_ratio must be between 0 and 1, got -0.5",
        ),
        ({"mixing": None}, TypeError, "fastervlm_divprune: mixing must be a str, got NoneType"),
    ],
)
def test_bad_options(options, error, match):
    with pytest.raises(error, match=match):
        methods.create("fastervlm_divprune", **options)
