"""VisionZip: vectors of the official code, its rule in float64, splits, non-finite tokens."""

import math

import numpy as np
import pytest
import torch

from sts_kernels import methods

from . import judge, recipe


def expected(scores, keys, dominant, contextual):
    """Order, and for each token its slot or -1, of one item of finite tokens."""
    ranked = judge.best_first(scores.tolist(), len(scores))
    rest = sorted(ranked[dominant:])
    step = max(1, len(rest) // contextual) if contextual else 1
    targets = rest[::step][:contextual]
    slot = {token: i for i, token in enumerate(ranked[:dominant] + targets)}
    similarity = 1 - judge.cosine_distance(keys)
    for token in rest:
        if targets and token not in slot:
            slot[token] = dominant + int(similarity[token, targets].argmax())
    return ranked[:dominant] + targets, [slot.get(token, -1) for token in range(len(scores))]


@pytest.mark.parametrize("case", recipe.cases("visionzip"), ids=recipe.label)
def test_the_official_code(case):
    rs = recipe.start(case)
    hidden, metric = (recipe.normal(rs, 1, case["N"] + 1, case[size]) for size in ("C", "metric"))
    x, keys, heads = recipe.tensors(case, hidden, metric, recipe.positive(rs, 1, case["heads"], case["N"]))
    dominant, contextual = case["dominant"], case["contextual"]
    method = methods.create("visionzip", dominant=dominant, contextual=contextual)
    given = {"scores": heads.mean(1), "keys": keys[:, 1:]}
    selection = method.select(k=dominant + contextual, **given)
    order = selection.order[0].tolist()
    assert sorted(order[:dominant]) == case["kept"]
    assert order[dominant:] == case["targets"]
    others = [i for i in range(case["N"]) if i not in order]
    assert (selection.assignment[0, others] - dominant).tolist() == case["clusters"]
    rows = methods.merge(x[:, 1:], selection)[0]
    assert torch.equal(rows[:dominant], x[0, 1:][order[:dominant]])
    want = np.load(recipe.VECTORS / "visionzip.npz")[f"contextual_{case['seed']}"]
    np.testing.assert_allclose(rows[dominant:].numpy(), want, atol=1e-5)


@pytest.mark.parametrize("parts", [(54, 10), (1, 1), (0, 1), (1, 0)])
def test_the_rule(device, parts):
    rng = torch.Generator().manual_seed(0)
    method = methods.create("visionzip", dominant=parts[0], contextual=parts[1])
    for n, k in ((64, 64), (64, 30), (37, 36), (37, 1), (5, 2), (1, 1), (90, 7)):
        scores, keys = torch.rand(2, n, generator=rng), torch.randn(2, n, 12, generator=rng)
        x = torch.randn(2, n, 6, generator=rng)
        selection = method.select(k=k, scores=scores.to(device), keys=keys.to(device))
        rows = methods.merge(x.to(device), selection).cpu()
        dominant = math.floor(k * parts[0] / sum(parts) + 0.5)
        for item in range(2):
            order, slot = expected(scores[item], keys[item], dominant, k - dominant)
            assert selection.order[item].tolist() == order
            assert selection.assignment[item].tolist() == slot
            for s, token in enumerate(order):
                joined = [i for i in range(n) if slot[i] == s and i != token]
                want = x[item, token].double() + (x[item, joined].double().mean(0) if joined else 0)
                torch.testing.assert_close(rows[item, s].double(), want, rtol=1e-6, atol=1e-6)


def test_published_splits():
    method = methods.create("visionzip")
    assert [(int(method.dominant_of(k)), k - int(method.dominant_of(k))) for k in (64, 128, 192, 32)] == [
        (54, 10),
        (108, 20),
        (162, 30),
        (27, 5),
    ]


def test_tokens_that_are_no_numbers(device):
    """Non-finite tokens are no targets and join none; they are kept where no other token is left.

    A NaN in the features merges nowhere.
    """
    rng = torch.Generator().manual_seed(1)
    scores, keys = torch.rand(1, 12, generator=rng), torch.randn(1, 12, 4, generator=rng)
    scores[0, 3], keys[0, 5, 1] = math.nan, math.inf
    method = methods.create("visionzip", dominant=1, contextual=1)
    selection = method.select(k=4, scores=scores.to(device), keys=keys.to(device))
    finite = [i for i in range(12) if i not in (3, 5)]
    order, slot = expected(scores[0, finite], keys[0, finite], 2, 2)
    assert selection.order[0].tolist() == [finite[i] for i in order]
    assert [selection.assignment[0, i].item() for i in finite] == slot
    assert selection.assignment[0, [3, 5]].tolist() == [-1, -1]
    whole = method.select(k=11, scores=scores.to(device), keys=keys.to(device))
    assert whole.order[0, 10] == 3
    assert whole.assignment[0, [3, 5]].tolist() == [10, -1]
    x = torch.zeros(1, 12, 3, device=device)
    joined = next(i for i in range(12) if selection.assignment[0, i] >= 2 and i not in selection.order[0].tolist())
    x[0, joined] = math.nan
    assert methods.merge(x, selection).isfinite().all()


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"dominant": -1}, ValueError, "visionzip: dominant must be at least 0, got -1"),
        ({"contextual": 0.5}, TypeError, "visionzip: contextual must be an int, got float"),
        ({"dominant": 0, "contextual": 0}, ValueError, "visionzip: dominant and contextual must not both be 0"),
    ],
)
def test_bad_options(options, error, match):
    with pytest.raises(error, match=match):
        methods.create("visionzip", **options)
