"""suppress_select_varlen against its contract."""

import oracle
import pytest
import torch
from cases import VARLEN_CASES, VarlenCase, by_name, with_dtypes
from op_inputs import sized_packed
from selection_inputs import of_case, random_inputs, ranks, taus

import sts_kernels

OP = "suppress_select_varlen"


def samples(device):
    rng = torch.Generator().manual_seed(0)
    flat = torch.randn(13, 5, generator=rng).to(device)
    rank, tau = ranks(rng, 13).to(device), taus(rng, 13).to(device)
    index = lambda *values, dtype=torch.int64: torch.tensor(values, dtype=dtype, device=device)  # noqa: E731
    return [
        (flat, rank, tau, index(0, 6, 13), index(0, 2, 5), 5),
        (flat.half(), rank.int(), tau.half(), index(0, 6, 6, 13), index(0, 1, 1, 8, dtype=torch.int32), 8),
        (flat[:, 1:], rank, tau, index(0, 13), index(0, 0), 0),
        (flat, rank, tau, index(0, 6, 13), index(0, 2, 5), 5, 7),
    ]


def sized(step, device):
    rng, lengths, arguments = sized_packed(step, device)
    return {
        **arguments,
        "rank": ranks(rng, sum(lengths)).to(device),
        "tau": taus(rng, sum(lengths)).to(device),
    }


@pytest.mark.parametrize(("case", "dtype"), with_dtypes(VARLEN_CASES))
def test_picks_are_a_walk(backend, case, dtype):
    inputs = of_case(OP, case, seed=1, dtype=dtype, device=backend.device)
    oracle.check_suppress_varlen(backend(OP, **inputs), **inputs)


@pytest.mark.parametrize("seed", range(100))
def test_random_inputs(backend, seed):
    inputs = random_inputs(OP, seed, backend.device)
    oracle.check_suppress_varlen(backend(OP, **inputs), **inputs)


@pytest.mark.parametrize("case", VARLEN_CASES, ids=lambda case: case.name)
def test_each_item_is_picked_as_by_suppress_select(backend, case):
    inputs = of_case(OP, case, seed=2, device=backend.device)
    picks = backend(OP, **inputs)
    starts, budgets = inputs["cu_seqlens"].tolist(), inputs["cu_budgets"].tolist()
    for b, budget in enumerate(case.budgets):
        if budget:
            rows = slice(starts[b], starts[b + 1])
            given = {n: inputs[n][None, rows] for n in ("features", "rank", "tau")}
            assert torch.equal(picks[budgets[b] : budgets[b + 1]], backend("suppress_select", k=budget, **given)[0])


def test_many_items(backend):
    lengths = tuple((7 * b) % 41 for b in range(300))
    case = VarlenCase("many", lengths, tuple(n // 3 for n in lengths), 6)
    inputs = of_case(OP, case, seed=5, device=backend.device)
    oracle.check_suppress_varlen(backend(OP, **inputs), **inputs)


def test_raw_op_is_the_public_function(device):
    inputs = of_case(OP, by_name("unequal", VARLEN_CASES), seed=7, device=device)
    want = sts_kernels.suppress_select_varlen(**inputs)
    assert torch.equal(torch.ops.sts_kernels.suppress_select_varlen(**inputs), want)
    assert torch.equal(torch.ops.sts_kernels.suppress_select_varlen.default(*inputs.values()), want)
