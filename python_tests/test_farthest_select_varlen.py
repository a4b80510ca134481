"""farthest_select_varlen against its contract."""

import oracle
import pytest
import torch
from cases import VARLEN_CASES, VarlenCase, by_name, with_dtypes
from op_inputs import sized_packed
from selection_inputs import of_case, qualities, random_inputs, starts

import sts_kernels

OP = "farthest_select_varlen"
VARIANTS = ("plain", "cosine", "quality", "start", "all")


def samples(device):
    rng = torch.Generator().manual_seed(0)
    flat = torch.randn(13, 5, generator=rng).to(device)
    quality, start = (make(rng, 13).to(device) for make in (qualities, starts))
    index = lambda *values, dtype=torch.int64: torch.tensor(values, dtype=dtype, device=device)  # noqa: E731
    return [
        (flat, index(0, 6, 13), index(0, 2, 5), 5),
        (flat.half(), index(0, 6, 6, 13, dtype=torch.int32), index(0, 1, 1, 8, dtype=torch.int32), 8, None, quality),
        (flat[:, 1:], index(0, 6, 13), index(0, 2, 5), 5, index(0, 6), None, start, "cosine"),
        (flat, index(0, 13), index(0, 0), 0),
        (flat[:0], index(0, 0), index(0, 0), 0, None, quality[:0], start[:0], "cosine", 0),
        (flat, index(0, 6, 13), index(0, 2, 5), 5, None, None, None, "euclidean", 7),
    ]


def sized(step, device):
    rng, lengths, arguments = sized_packed(step, device)
    return {
        **arguments,
        "anchor": torch.randint(min(lengths), (len(lengths),), generator=rng).to(device),
        "quality": torch.rand(sum(lengths), generator=rng).to(device),
        "start": torch.rand(sum(lengths), generator=rng).to(device),
        "metric": "cosine",
    }


@pytest.mark.parametrize(("case", "dtype"), with_dtypes(VARLEN_CASES))
@pytest.mark.parametrize("variant", VARIANTS)
def test_picks_are_greedy(backend, case, dtype, variant):
    inputs = of_case(OP, case, variant, 1, dtype, backend.device)
    oracle.check_farthest_varlen(backend(OP, **inputs), **inputs)


@pytest.mark.parametrize("seed", range(100))
def test_random_inputs(backend, seed):
    inputs = random_inputs(OP, seed, backend.device)
    oracle.check_farthest_varlen(backend(OP, **inputs), **inputs)


@pytest.mark.parametrize("case", VARLEN_CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("variant", ["plain", "all"])
def test_each_item_is_picked_as_by_farthest_select(backend, case, variant):
    inputs = of_case(OP, case, variant, 2, device=backend.device)
    picks = backend(OP, **inputs)
    starts_, budgets = inputs["cu_seqlens"].tolist(), inputs["cu_budgets"].tolist()
    for b, budget in enumerate(case.budgets):
        if budget:
            rows = slice(starts_[b], starts_[b + 1])
            given = {n: inputs[n][None, rows] for n in ("features", "quality", "start") if inputs.get(n) is not None}
            anchor = None if inputs["anchor"] is None else inputs["anchor"][b : b + 1]
            alone = backend("farthest_select", k=budget, anchor=anchor, metric=inputs["metric"], **given)
            assert torch.equal(picks[budgets[b] : budgets[b + 1]], alone[0])


def test_many_items(backend):
    lengths = tuple((7 * b) % 41 for b in range(300))
    inputs = of_case(
        OP, VarlenCase("many", lengths, tuple(n // 3 for n in lengths), 6), "all", 5, device=backend.device
    )
    oracle.check_farthest_varlen(backend(OP, **inputs), **inputs)


def test_raw_op_is_the_public_function(device):
    inputs = of_case(OP, by_name("anchors", VARLEN_CASES), "all", 7, device=device)
    want = sts_kernels.farthest_select_varlen(**inputs)
    assert torch.equal(torch.ops.sts_kernels.farthest_select_varlen(**inputs), want)
    needed = list(inputs.values())[:4]
    want = sts_kernels.farthest_select_varlen(*needed, None, None, None, "euclidean")
    assert torch.equal(torch.ops.sts_kernels.farthest_select_varlen(*needed), want), "the schema's defaults differ"
