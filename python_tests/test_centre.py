"""The centre that tensor-core distances subtract from all tokens: exact differences, and no cancellation left."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from emulator import build, calls, operations

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


@pytest.fixture(scope="module")
def module():
    if reason := build.missing_tool():
        pytest.skip(reason)
    return build.module()


def centre(module, name, low, high):
    bits = module.run(f"exact_centre_{name}", float(low), float(high))
    return torch.tensor([bits], dtype=torch.int32).to(torch.int16).view(DTYPES[name])[0]


@pytest.mark.parametrize("name", DTYPES)
def test_no_difference_to_the_centre_is_rounded(module, name):
    bits = torch.randint(1, 0x7B00, (300, 2), generator=torch.Generator().manual_seed(1), dtype=torch.int32)
    near = bits[:, :1] + torch.tensor([[0, 1, 60, 200]]).repeat(75, 1).view(-1, 1)  # pairs that are near, or arbitrary
    for pair in torch.cat([bits, torch.cat([bits[:, :1], near], 1)]).sort(1).values.clamp(max=0x7BFF):
        low, high = pair.to(torch.int16).view(DTYPES[name]).float()
        c = centre(module, name, low, high)
        assert centre(module, name, -high, -low) == -c
        every = torch.arange(int(pair[0]), int(pair[1]) + 1, dtype=torch.int32).to(torch.int16).view(DTYPES[name])
        difference = every.double() - c.double()
        assert (difference.to(DTYPES[name]).double() == difference).all()
        if c:
            assert low / 2 <= c <= 2 * high
        assert c or high > 3.9 * low


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize(("low", "high"), [(0, 0), (-1, 1), (0, 5), (-5, 0), (1, 4.5), (np.inf, -np.inf)])
def test_unlike_values_have_none(module, name, low, high):
    assert centre(module, name, low, high) == 0


def marked(module, x):
    """The number of 64 x 64 tiles in which pairs are recomputed by differences."""
    batch, tokens, _ = x.shape
    tiles = -(-tokens // 64)
    notes = np.zeros((batch, tiles, tiles), np.uint32)
    call = operations.repulsion_select("any", x, 2, 1e-6, notes=notes, wgmma=0)
    notes = calls.run_in(module, replace(call, judge=lambda *_: None))[-2]
    return sum(int(np.triu(of_item).sum()) for of_item in notes)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
def test_what_tokens_have_in_common_costs_no_repair(module, dtype):
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(2, 150, 72, generator=generator)
    offset = 60 * torch.randn(2, 1, 72, generator=generator)  # of either sign, large and small
    assert marked(module, x.to(dtype)) == 0
    assert marked(module, (x + offset).to(dtype)) == 0
    assert marked(module, (x + 100).to(dtype)) == 0
    some = x + offset
    some[1, 77] = some[1, 5]  # one pair of duplicates
    assert marked(module, some.to(dtype)) == 1


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
def test_tokens_that_are_not_finite_cost_no_repair(module, dtype):
    x = torch.randn(1, 150, 72, generator=torch.Generator().manual_seed(3))
    x[0, 80, 5], x[0, 3, 0], x[0, 149, -1] = torch.nan, torch.inf, -torch.inf
    assert marked(module, x.to(dtype)) == 0
    x[0, 77] = x[0, 5]
    assert marked(module, x.to(dtype)) == 1
