"""repulsion_select_varlen against its contract."""

from functools import partial

import oracle
import pytest
import torch
from cases import VARLEN_CASES, VarlenCase, by_name, with_dtypes
from op_inputs import sized_packed
from selection_inputs import of_case

import sts_kernels

OP = "repulsion_select_varlen"


def samples(device):
    flat = torch.randn(13, 5, generator=torch.Generator().manual_seed(0)).to(device)
    index = lambda *values, dtype=torch.int64: torch.tensor(values, dtype=dtype, device=device)  # noqa: E731
    return [
        (flat, index(0, 6, 13), index(0, 2, 5), 5),
        (flat.half(), index(0, 6, 6, 13, dtype=torch.int32), index(0, 1, 1, 8, dtype=torch.int32), 8, 0.1),
        (flat[:, 1:], index(0, 6, 13), index(0, 2, 5), 5, 1e-6, index(0, 6)),
        (flat, index(0, 13), index(0, 0), 0),
        (flat[:0], index(0, 0, 0), index(0, 0, 0), 0, 1e-6, index(0, 0), 0),
        (flat, index(0, 6, 13), index(0, 2, 5), 5, 1e-6, None, 7),
    ]


def sized(step, device):
    rng, lengths, arguments = sized_packed(step, device)
    return {
        **arguments,
        "eps": 1e-3,
        "anchor": torch.randint(min(lengths), (len(lengths),), generator=rng).to(device),
    }


@pytest.mark.parametrize(("case", "dtype"), with_dtypes(VARLEN_CASES))
def test_picks_are_greedy(backend, case, dtype):
    inputs = case.inputs(seed=1, dtype=dtype, device=backend.device)
    before = inputs["features"].clone()
    picks = backend(OP, **inputs)
    oracle.check_select_varlen(picks, **inputs)
    torch.testing.assert_close(inputs["features"], before, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(("case", "dtype"), with_dtypes(VARLEN_CASES))
def test_each_item_is_picked_as_by_repulsion_select(backend, case, dtype):
    inputs = case.inputs(seed=2, dtype=dtype, device=backend.device)
    picks = backend(OP, **inputs)
    starts, budgets = inputs["cu_seqlens"].tolist(), inputs["cu_budgets"].tolist()
    for b in range(len(case.lengths)):
        if case.budgets[b]:
            tokens = inputs["features"][None, starts[b] : starts[b + 1]]
            anchor = None if inputs["anchor"] is None else inputs["anchor"][b : b + 1]
            dense = backend("repulsion_select", tokens, case.budgets[b], case.eps, anchor)
            assert torch.equal(picks[budgets[b] : budgets[b + 1]], dense[0])


def test_indices_are_local_to_their_item(backend):
    x = torch.tensor([0.0, 1.0, 10.0, 5.0, 6.0, 70.0], device=backend.device)[:, None]
    cu_seqlens = torch.tensor([0, 3, 6], dtype=torch.int32, device=backend.device)
    cu_budgets = torch.tensor([0, 2, 5], dtype=torch.int32, device=backend.device)
    anchor = torch.tensor([0, 1], device=backend.device)
    assert backend(OP, x, cu_seqlens, cu_budgets, 5, anchor=anchor).tolist() == [0, 2, 1, 2, 0]


@pytest.mark.parametrize("name", ["three", "unequal", "near_duplicates", "not_finite", "empty_items"])
def test_same_input_same_output(backend, name):
    inputs = by_name(name, VARLEN_CASES).inputs(seed=3, device=backend.device)
    first = backend(OP, **inputs)
    for _ in range(3):
        assert torch.equal(backend(OP, **inputs), first)


@pytest.mark.parametrize("name", ["three", "near_duplicates", "not_finite"])
def test_prefix(backend, name):
    """Smaller budgets give the first picks of larger budgets."""
    case = by_name(name, VARLEN_CASES)
    inputs = case.inputs(seed=4, device=backend.device)
    full = backend(OP, **inputs).split(list(case.budgets))
    smaller = [budget // 2 for budget in case.budgets]
    cu_budgets = torch.tensor([0, *torch.tensor(smaller).cumsum(0)], dtype=torch.int32, device=backend.device)
    part = backend(OP, **{**inputs, "cu_budgets": cu_budgets, "total_k": sum(smaller)}).split(smaller)
    for whole, half in zip(full, part, strict=True):
        assert torch.equal(whole[: len(half)], half)


@pytest.mark.parametrize("op", ["repulsion_select_varlen", "farthest_select_varlen", "suppress_select_varlen"])
def test_a_bound_on_the_length_changes_no_result(backend, op):
    case = by_name("unequal", VARLEN_CASES)
    make = case.inputs if op == OP else partial(of_case, op, case)
    inputs = make(seed=8, device=backend.device)
    want = backend(op, **inputs)
    for bound in (max(case.lengths), max(case.lengths) + 1, 10**9, 2**62):
        assert torch.equal(backend(op, **inputs, max_seqlen=bound), want)


def test_items_on_both_sides_of_what_is_stored(backend):
    """Items below and above the limit of stored weights, in one batch, have the picks of each item alone."""
    case = VarlenCase("both", (40, 9000, 500, 8300, 8192, 1), (20, 12, 60, 7, 9, 1), 16)
    for dtype in (torch.float32, torch.bfloat16):
        inputs = case.inputs(seed=9, dtype=dtype, device=backend.device)
        parts = backend(OP, **inputs).split(list(case.budgets))
        for rows, budget, part in zip(inputs["features"].split(list(case.lengths)), case.budgets, parts, strict=True):
            assert torch.equal(part, backend("repulsion_select", rows[None], budget, case.eps)[0])


def test_long_items_of_which_clusters_share_few_or_all(cuda):
    """One long item, and more than a GPU has clusters for: each picked as alone."""
    for lengths in ((40, 2100, 577), (1100,) * 70 + (50, 2100, 1500)):
        case = VarlenCase("long", lengths, tuple(min(n, 30) for n in lengths), 64)
        inputs = case.inputs(seed=10, dtype=torch.bfloat16, device=cuda)
        parts = sts_kernels.repulsion_select_varlen(**inputs).split(list(case.budgets))
        for rows, budget, part in zip(inputs["features"].split(list(lengths)), case.budgets, parts, strict=True):
            assert torch.equal(part, sts_kernels.repulsion_select(rows[None], budget, case.eps)[0])


def test_on_a_gpu_items_that_do_not_fit_come_out_as_none(cuda):
    """Invalid items give -1; items after a decreasing offset or before a too long item are right."""
    x = torch.randn(300, 64, generator=torch.Generator().manual_seed(0)).to(cuda, torch.bfloat16)
    cu_seqlens = torch.tensor([0, 100, 50, 200, 300], device=cuda)  # item 2 begins in item 0
    cu_budgets = torch.tensor([0, 10, 20, 30, 40], device=cuda)
    first, last = (sts_kernels.repulsion_select(x[None, rows], 10)[0] for rows in (slice(100), slice(200, 300)))
    none = torch.full((10,), -1, device=cuda)
    picks = sts_kernels.repulsion_select_varlen(x, cu_seqlens, cu_budgets, 40)
    assert torch.equal(picks, torch.cat([first, none, none, last]))
    cu_seqlens = torch.tensor([0, 100, 200, 300], device=cuda)
    picks = sts_kernels.repulsion_select_varlen(
        x, cu_seqlens + torch.tensor([0, 0, -1, 0], device=cuda), cu_budgets[:4], 30, max_seqlen=100
    )
    assert torch.equal(picks[:10], first)
    assert (picks[20:] == -1).all()


@pytest.mark.parametrize("op", ["repulsion_select_varlen", "farthest_select_varlen", "suppress_select_varlen"])
@pytest.mark.parametrize("items", [0, 1, 3])
@pytest.mark.parametrize("max_seqlen", [None, 0, 9])
def test_no_tokens(backend, op, items, max_seqlen):
    """A batch whose items are all empty, as of a step without images."""
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.zeros(0, 5, dtype=dtype, device=backend.device)
        numbers = torch.zeros(0, device=backend.device)
        per_token = {"rank": numbers.int(), "tau": numbers} if op.startswith("suppress") else {}
        offsets = torch.zeros(items + 1, dtype=torch.int32, device=backend.device)
        picks = backend(op, x, **per_token, cu_seqlens=offsets, cu_budgets=offsets, total_k=0, max_seqlen=max_seqlen)
        assert picks.shape == (0,)
        assert picks.dtype == torch.int64


def test_offsets_must_end_at_no_tokens():
    """In the raw op too, which has only the checks of the compiled library."""
    x, offsets = torch.zeros(0, 5), torch.tensor([0, 1])
    for namespace in (sts_kernels, torch.ops.sts_kernels):
        with pytest.raises((ValueError, RuntimeError), match="cu_seqlens must rise from 0 to 0"):
            namespace.repulsion_select_varlen(x, offsets, offsets * 0, 0)


def test_many_items(backend):
    lengths = tuple((7 * b) % 41 for b in range(300))
    case = VarlenCase("many", lengths, tuple(n // 3 for n in lengths), 6)
    inputs = case.inputs(seed=5, device=backend.device)
    oracle.check_select_varlen(backend(OP, **inputs), **inputs)


def test_offsets_of_mixed_integer_types(backend):
    """int32 and int64 offsets and anchors may be mixed in one call."""
    inputs = by_name("anchors", VARLEN_CASES).inputs(seed=6, device=backend.device)
    want = backend(OP, **inputs)
    for name in ("cu_seqlens", "cu_budgets", "anchor"):
        assert torch.equal(backend(OP, **{**inputs, name: inputs[name].long()}), want)


def test_raw_op_is_the_public_function(device):
    inputs = by_name("anchors", VARLEN_CASES).inputs(seed=7, device=device)
    want = sts_kernels.repulsion_select_varlen(**inputs)
    assert torch.equal(torch.ops.sts_kernels.repulsion_select_varlen(**inputs), want)
    assert torch.equal(torch.ops.sts_kernels.repulsion_select_varlen.default(*inputs.values()), want)
    del inputs["eps"], inputs["anchor"]
    want = sts_kernels.repulsion_select_varlen(*inputs.values(), 1e-6, None)
    assert torch.equal(torch.ops.sts_kernels.repulsion_select_varlen(**inputs), want), "the schema's defaults differ"
