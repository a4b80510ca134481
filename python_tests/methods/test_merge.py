"""merge and merge_packed: every method's rows in any batch, the weighted mean by hand, errors."""

import math

import pytest
import torch

from sts_kernels import methods
from sts_kernels.methods import Method, Selection

from .contract import ITEM, SELECTING, alone, packed, parts, signals


@pytest.mark.parametrize("name", SELECTING)
def test_merged_rows_are_the_same_padded_packed_or_alone(name, device):
    method, k = methods.create(name), 16
    given, lengths = signals(method, device=device), [ITEM, 17, ITEM, 5]
    x = torch.randn(len(lengths), ITEM, 12, generator=torch.Generator().manual_seed(9)).to(device)
    budgets = [min(k, length) for length in lengths]
    given = {n: v[: len(lengths)] for n, v in given.items()}
    selection = method.select(k=k, num_tokens=torch.tensor(lengths, device=device), **given)
    rows = methods.merge(x, selection)
    assert rows.shape == (len(lengths), k, 12)
    flat = method.select_packed(lengths, budgets, **packed(given, lengths))
    flat = methods.merge_packed(parts(x, lengths), flat, lengths, budgets).split(budgets)
    for item, (length, budget) in enumerate(zip(lengths, budgets, strict=True)):
        own = methods.merge(x[item : item + 1, :length], alone(method, given, item, length, budget))[0]
        assert torch.equal(rows[item, :budget], own)
        assert torch.equal(flat[item], own)
        assert (rows[item, budget:] == 0).all()
        if selection.assignment is None:
            assert torch.equal(own, x[item, selection.order[item, :budget]])


@pytest.mark.parametrize("name", SELECTING)
def test_an_item_that_keeps_everything_stays_as_it_is(name, device):
    method = methods.create(name)
    given, counts = signals(method, device=device), [ITEM, 17, 1, 0, ITEM, 17]
    x = torch.randn(len(counts), ITEM, 12, generator=torch.Generator().manual_seed(10)).to(device)
    selection = method.select(k=ITEM, num_tokens=torch.tensor(counts, device=device), **given)
    rows = methods.merge(x, selection)
    for item, count in enumerate(counts):
        assert sorted(selection.order[item, :count].tolist()) == list(range(count))
        assert torch.equal(rows[item, :count], x[item, selection.order[item, :count]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("weighted", [False, True])
def test_the_default_merge_is_the_weighted_mean(device, dtype, weighted):
    """By hand in float64: slots with and without tokens, dropped tokens, weights of 0, a NaN, a slot past the count."""
    rng = torch.Generator().manual_seed(5)
    batch, tokens, k = 2, 30, 4
    x = (torch.randn(batch, tokens, 8, generator=rng) + 3).to(dtype)
    x[0, 6] = math.nan
    order = torch.tensor([[3, 6, 9, 2], [1, 0, -1, -1]])
    assignment = torch.randint(-1, 3, (batch, tokens), generator=rng)
    assignment[0, 6] = 1
    weight = torch.rand(batch, tokens, generator=rng)
    weight[0, 9:12] = 0
    selection = Selection(order.to(device), assignment.to(device), weight.to(device) if weighted else None)
    rows = methods.merge(x.to(device), selection)
    assert rows.dtype == dtype
    assert torch.equal(rows, methods.merge(x.to(device), selection))  # NaN-free: equal bit for bit
    for b in range(batch):
        for slot in range(k):
            members = [i for i in range(tokens) if assignment[b, i] == slot and x[b, i].isfinite().all()]
            share = [weight[b, i].item() if weighted else 1.0 for i in members]
            if order[b, slot] < 0:
                want = torch.zeros(8, dtype=torch.float64)
            elif not sum(share):
                want = x[b, order[b, slot]].double()
            else:
                want = sum(s * x[b, i].double() for s, i in zip(share, members, strict=True)) / sum(share)
            torch.testing.assert_close(rows[b, slot].cpu(), want.float().to(dtype), rtol=1e-6, atol=0)


def test_a_method_merges_in_its_own_way():
    class Doubling(Method):
        name = "doubling"

        def merge(self, features, selection):
            return 2 * features[:, : selection.order.shape[1]]

    x = torch.ones(1, 3, 2)
    order, assignment = torch.tensor([[0]]), torch.tensor([[0, 0, 0]])
    assert (methods.merge(x, Selection(order, assignment, method=Doubling())) == 2).all()
    assert (methods.merge_packed(x[0], Selection(order[0], assignment[0], method=Doubling()), [3], [1]) == 2).all()
    assert (methods.merge(x, Selection(order, method=Doubling())) == 1).all()  # nothing is merged
    assert (methods.create("divprune").merge(x, Selection(order)) == 1).all()


def test_bad_merges():
    x, order = torch.ones(2, 3, 4), torch.zeros(2, 1, dtype=torch.int64)
    for call, match in (
        (lambda: methods.merge(x, order), "merge: selection must be a Selection, got Tensor"),
        (lambda: methods.merge(x[0], Selection(order)), r"merge: features must have shape \(B, N, C\), got \(3, 4\)"),
        (lambda: methods.merge(x[:1], Selection(order)), "merge: selection must have the 1 items of features, got 2"),
        (lambda: methods.merge(x, Selection(order + 3)), "merge: selection.order must be between -1 and 2, got 3"),
        (lambda: methods.merge(x, Selection(order[0])), "merge: selection must have an order of 2 dimensions, got 1"),
        (lambda: methods.merge(x, Selection(order, order)), r"selection.assignment must have shape \(2, 3\), got"),
        (lambda: methods.merge_packed(x[0], Selection(order[0]), [3], [2]), "must have 2 picks, the sum of budgets"),
        (
            lambda: methods.merge_packed(x[0], Selection(order[0] + 1), [1, 2], [1, 0]),
            "merge_packed: selection.order must be between -1 and 0, got 1",
        ),
        (lambda: methods.merge_packed(x[0], Selection(order[0]), [4], [1]), "must have 4 rows, the sum of lengths"),
    ):
        with pytest.raises((TypeError, ValueError), match=match):
            call()
