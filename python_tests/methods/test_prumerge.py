"""PruMerge and PruMerge+: rows of the official code, exactly k of them, the row of all others."""

import math

import numpy as np
import pytest
import torch

from sts_kernels import methods
from sts_kernels.methods.base import Pool

from . import judge, recipe


def merged(x, keys, scores, picks, neighbours):
    """Float64 rows of `picks`, then the row of all other tokens; and the indices of those others."""
    x, similarity = x.double(), 1 - judge.cosine_distance(keys)
    rows = []
    for i in picks:
        ranked = sorted((j for j in range(len(x)) if j != i), key=lambda j: (-similarity[i, j].item(), j))
        rows.append(x[i] + sum((scores[j].double() * x[j] for j in ranked[:neighbours]), torch.zeros_like(x[i])))
    others = [j for j in range(len(x)) if j not in picks]
    return [*rows, sum((scores[j].double() * x[j] for j in others), torch.zeros_like(x[0]))], others


def picks_of(scores, count, plus):
    ranked = judge.best_first(scores.tolist(), len(scores))
    if not plus:
        return ranked[:count]
    best = ranked[: max(1, math.floor(count / 4 + 0.5))]
    left = sorted(set(ranked) - set(best))
    return best + [left[i * len(left) // (count - len(best))] for i in range(count - len(best))]


@pytest.mark.parametrize("case", recipe.cases("prumerge"), ids=recipe.label)
def test_rows_of_the_official_code(case):
    """Rows for given picks, with all heads as one: the official code's number of picks follows the image, ours is k."""
    rs = recipe.start(case)
    n = case["N"] + 1
    hidden, query, key = recipe.tensors(case, *(recipe.normal(rs, 1, n, case["C"]) for _ in range(3)))
    logits = query[0, 0].double() @ key[0].double().T / case["C"] ** 0.5
    attention = logits.softmax(0)[1:].float()
    method = methods.create("prumerge", neighbours=case["neighbours"])
    picks = case["picks"]
    others = next(i for i in range(case["N"]) if i not in picks)
    pool = Pool.sized(len(picks) + 1, 1, case["N"], "cpu", scores=attention[None], keys=key[:, 1:])
    behind = torch.tensor([[len(picks)]])
    merges = torch.tensor([[True]])
    selection = method.around(pool, torch.tensor([[*picks, others]]), behind, pool.present, merges)
    want = np.load(recipe.VECTORS / "prumerge.npz")[f"{case['variant']}_{case['seed']}"]
    np.testing.assert_allclose(method.merge(hidden[:, 1:], selection)[0].numpy(), want, atol=2e-4)
    if case["variant"] != "plus":
        order = method.select(k=len(picks) + 1, scores=attention[None], keys=key[:, 1:]).order[0].tolist()
        assert order == [*picks, others]


@pytest.mark.parametrize("plus", [False, True])
def test_exactly_k_rows(device, plus):
    rng = torch.Generator().manual_seed(0)
    method = methods.create("prumerge", plus=plus, neighbours=5)
    for n, k in ((40, 16), (40, 18), (40, 39), (40, 2), (7, 3), (90, 33)):
        scores, keys = torch.rand(2, n, generator=rng), torch.randn(2, n, 12, generator=rng)
        x = torch.randn(2, n, 6, generator=rng)
        selection = method.select(k=k, scores=scores.to(device), keys=keys.to(device))
        rows = methods.merge(x.to(device), selection).cpu().double()
        for item in range(2):
            picks = picks_of(scores[item], k - 1, plus)
            want, others = merged(x[item], keys[item], scores[item], picks, 5)
            assert selection.order[item].tolist() == [*picks, others[0]]
            assert selection.assignment[item, others].tolist() == [k - 1] * len(others)
            torch.testing.assert_close(rows[item], torch.stack(want), rtol=1e-5, atol=1e-5)


def test_one_row_is_the_token_of_most_attention(device):
    scores, keys = torch.tensor([[0.1, 0.7, 0.2]], device=device), torch.eye(3, device=device)[None]
    selection = methods.create("prumerge", neighbours=1).select(k=1, scores=scores, keys=keys)
    assert selection.order.tolist() == [[1]]
    assert selection.assignment.tolist() == [[-1, 0, -1]]
    x = torch.tensor([[[1.0], [10.0], [100.0]]], device=device)
    assert methods.merge(x, selection).tolist() == [[[pytest.approx(10.1)]]]  # token 0 is the first of two equal ones


def test_many_tokens_in_blocks(monkeypatch):
    from sts_kernels.methods import prumerge

    rng = torch.Generator().manual_seed(2)
    given = {"scores": torch.rand(2, 60, generator=rng), "keys": torch.randn(2, 60, 8, generator=rng)}
    whole = methods.create("prumerge").select(k=20, **given).sources
    monkeypatch.setattr(prumerge, "BLOCK", 2 * 60 * 3)
    assert torch.equal(methods.create("prumerge").select(k=20, **given).sources, whole)


def test_tokens_that_are_no_numbers(device):
    """Non-finite tokens are merged nowhere, and kept unchanged where no other token is left."""
    rng = torch.Generator().manual_seed(1)
    scores, keys = torch.rand(1, 9, generator=rng), torch.randn(1, 9, 4, generator=rng)
    scores[0, 2], keys[0, 6, 1] = math.nan, math.nan
    method = methods.create("prumerge")
    selection = method.select(k=8, scores=scores.to(device), keys=keys.to(device))
    finite = [0, 1, 3, 4, 5, 7, 8]
    picks = [finite[i] for i in picks_of(scores[0, finite], 6, False)]
    last = next(i for i in finite if i not in picks)
    assert selection.order[0].tolist() == [*picks, last, 2]
    assert not torch.isin(selection.sources.cpu(), torch.tensor([2, 6])).any()
    x = torch.randn(1, 9, 3, generator=rng)
    x[0, 6] = math.inf
    rows = methods.merge(x.to(device), selection)
    assert rows.isfinite().all()
    assert torch.equal(rows[0, 7].cpu(), x[0, 2])


def test_it_needs_the_last_layer():
    assert methods.create("prumerge").encoder_attention == "last"
    assert methods.create("visionzip").encoder_attention == "features"


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"plus": 1}, TypeError, "prumerge: plus must be True or False, got int"),
        ({"neighbours": 0}, ValueError, "prumerge: neighbours must be at least 1, got 0"),
    ],
)
def test_bad_options(options, error, match):
    with pytest.raises(error, match=match):
        methods.create("prumerge", **options)


def test_bad_sources():
    x, order = torch.ones(1, 3, 2), torch.tensor([[0, 1]])
    selection = methods.Selection(order, torch.tensor([[0, 1, 1]]), sources=torch.zeros(1, 3, 4, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"merge: selection.sources must have shape \(\*order, M\) = \(1, 2, M\), got"):
        methods.merge(x, selection)
