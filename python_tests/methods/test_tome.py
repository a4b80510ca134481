"""ToMe: one matching of the official code, rounds of matchings in float64."""

import math

import pytest
import torch

from sts_kernels import methods
from sts_kernels.methods.tome import matching

from . import judge, recipe


def round_by_hand(x, keys, sizes, merged):
    """Lists of rows, keys and sizes after a matching, in float64."""
    similarity = 1 - judge.cosine_distance(torch.stack(keys))
    even, odd = range(0, len(x), 2), range(1, len(x), 2)
    best = {i: max(odd, key=lambda j: (similarity[i, j].item(), -j)) for i in even}
    ranked = sorted(even, key=lambda i: (-similarity[i, best[i]].item(), i))
    groups = [[i] for i in ranked[merged:]] + [[j, *(i for i in ranked[:merged] if best[i] == j)] for j in odd]
    mean = lambda values, group: sum(sizes[i] * values[i] for i in group) / sum(sizes[i] for i in group)  # noqa: E731
    return [mean(x, g) for g in groups], [mean(keys, g) for g in groups], [sum(sizes[i] for i in g) for g in groups]


@pytest.mark.parametrize("case", recipe.cases("tome"), ids=recipe.label)
def test_a_matching_of_the_official_code(case):
    rs = recipe.start(case)
    x, metric = recipe.normal(rs, 1, case["N"], case["C"]), recipe.normal(rs, 1, case["N"], case["metric"])
    x, metric, sizes = recipe.tensors(case, x, metric, rs.randint(1, 5, (1, case["N"], 1)).astype("float32"))
    merged = torch.tensor([min(case["r"], case["N"] // 2)])
    moved, survives = matching(metric, torch.tensor([case["N"]]), merged)
    assert survives.sum() == case["tokens_left"]
    mass = torch.zeros(case["tokens_left"]).index_add(0, moved[0], sizes[0, :, 0])
    assert mass.tolist() == case["sizes"]
    total = torch.zeros(case["tokens_left"], case["C"]).index_add(0, moved[0], x[0] * sizes[0])
    torch.testing.assert_close((total / mass[:, None]).sum(1), torch.tensor(case["row_sums"]), rtol=0, atol=1e-3)


@pytest.mark.parametrize(("n", "k"), [(64, 40), (64, 32), (64, 9), (37, 5), (37, 1), (2, 1), (9, 9), (91, 30)])
def test_rounds_in_float64(device, n, k):
    rng = torch.Generator().manual_seed(n * k)
    keys, x = torch.randn(1, n, 12, generator=rng), torch.randn(1, n, 6, generator=rng)
    selection = methods.create("tome").select(k=k, keys=keys.to(device))
    rows, metric, sizes = list(x[0].double()), list(keys[0].double()), [1] * n
    while len(rows) > k:
        rows, metric, sizes = round_by_hand(rows, metric, sizes, min(len(rows) - k, len(rows) // 2))
    got = methods.merge(x.to(device), selection)[0].cpu().double()
    torch.testing.assert_close(got, torch.stack(rows), rtol=1e-5, atol=1e-5)
    order, assignment = selection.order[0].tolist(), selection.assignment[0].cpu()
    assert torch.bincount(assignment, minlength=k).tolist() == sizes
    assert assignment[order].tolist() == list(range(k))


def test_tokens_that_are_no_numbers(device):
    """NaN tokens merge with nothing, and are kept where no other token is left."""
    keys = torch.randn(1, 9, 4, generator=torch.Generator().manual_seed(1)).to(device)
    keys[0, [1, 6]] = math.nan
    selection = methods.create("tome").select(k=3, keys=keys)
    assert selection.assignment[0, [1, 6]].tolist() == [-1, -1]
    finite = [0, 2, 3, 4, 5, 7, 8]
    own = methods.create("tome").select(k=3, keys=keys[:, finite])
    assert selection.order[0].tolist() == [finite[i] for i in own.order[0].tolist()]
    whole = methods.create("tome").select(k=8, keys=keys)
    assert whole.order[0].tolist() == [*finite, 1]
    assert whole.assignment[0].tolist() == [0, 7, 1, 2, 3, 4, -1, 5, 6]


def test_it_has_no_options():
    assert methods.create("tome").options() == {}
