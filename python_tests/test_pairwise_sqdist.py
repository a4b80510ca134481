"""pairwise_sqdist against its contract."""

import oracle
import pytest
import torch
from cases import CASES, Case, by_name, expanded, normal, with_dtypes

import sts_kernels

OP = "pairwise_sqdist"
# The brute force of the largest cases would take as long as all other cases together.
SMALL = [case for case in CASES if case.batch * case.tokens**2 * case.channels <= 150e6]


def samples(device):
    x = normal(torch.Generator().manual_seed(0), 2, 9, 5).to(device)
    return [(x,), (x.half(),), (x[:, ::2, 1:],), (x.bfloat16().transpose(0, 1),), (x[:, :1],), (x[:0],)]


def sized(step, device):
    features = normal(torch.Generator().manual_seed(step), 2 + step, 11 + 6 * step, 5 + 2 * step)
    return {"features": features.to(device)}


@pytest.mark.parametrize(("case", "dtype"), with_dtypes(SMALL))
def test_values(backend, case, dtype):
    features = case.features(seed=1, dtype=dtype, device=backend.device)
    before = features.clone()
    oracle.check_sqdist(backend(OP, features), features)
    torch.testing.assert_close(features, before, rtol=0, atol=0, equal_nan=True)


def test_known_values(backend):
    x = torch.tensor([[[0.0, 0.0], [3.0, 4.0], [3.0, -1.0]]], device=backend.device)
    assert backend(OP, x).tolist() == [[[0, 25, 10], [25, 0, 25], [10, 25, 0]]]


def test_out_of_range_is_infinite(backend):
    """A squared distance beyond float32's range is inf; that of the largest float16 numbers fits float32."""
    x = torch.tensor([0.0, 1e30], device=backend.device)[None, :, None]
    assert backend(OP, x).tolist() == [[[0, torch.inf], [torch.inf, 0]]]
    x = torch.tensor([-65504.0, 65504.0], device=backend.device, dtype=torch.float16)[None, :, None]
    assert backend(OP, x)[0, 0, 1].item() == pytest.approx(131008.0**2, rel=1e-6)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_not_finite_stays_in_its_row_and_column(backend, value):
    features = normal(torch.Generator().manual_seed(0), 2, 70, 65).to(backend.device)
    clean = backend(OP, features)
    features[1, 33, 64] = value
    got = backend(OP, features)
    spoiled = torch.zeros_like(got, dtype=torch.bool)
    spoiled[1, 33] = spoiled[1, :, 33] = True
    spoiled[1, 33, 33] = False
    assert torch.equal(got.isfinite(), ~spoiled)
    torch.testing.assert_close(got[~spoiled], clean[~spoiled])


@pytest.mark.parametrize("name", ["5x127x64_k40", "2x257x1000_k33", "near_duplicates", "not_finite_1000", "wide"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_input_same_output_whatever_the_batch(backend, name, dtype):
    features = by_name(name).features(seed=2, dtype=dtype, device=backend.device)
    first = backend(OP, features).view(torch.int32)  # bits: NaN is not equal to itself
    for _ in range(2):
        assert torch.equal(backend(OP, features).view(torch.int32), first)
    for b in range(features.shape[0]):
        assert torch.equal(backend(OP, features[b : b + 1]).view(torch.int32)[0], first[b])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_offsets_of_every_size(backend, dtype):
    """Channels with many different centres, and channels without a centre."""
    rng = torch.Generator().manual_seed(6)
    offset = 20 * torch.randn(1, 1, 400, generator=rng)
    features = (normal(rng, 2, 130, 400) + offset).to(backend.device, dtype)
    oracle.check_sqdist(backend(OP, features), features)


def test_same_bits_in_a_batch_of_any_size(backend):
    """An item has the same bits alone and in a large batch, which takes larger tiles."""
    features = Case("batch", 40, 200, 72, 1).features(seed=5, dtype=torch.bfloat16, device=backend.device)
    together = backend(OP, features)
    for b in (0, 17, 39):
        assert torch.equal(backend(OP, features[b : b + 1])[0], together[b])


def test_many_items(backend):
    features = Case("many", 300, 9, 5, 1).features(seed=3, device=backend.device)
    oracle.check_sqdist(backend(OP, features), features)
    features = expanded(features)
    oracle.check_sqdist(backend(OP, features), features)


def test_raw_op_is_the_public_function(device):
    features = by_name("channel_slice").features(seed=4, dtype=torch.float16, device=device)
    assert torch.equal(torch.ops.sts_kernels.pairwise_sqdist(features), sts_kernels.pairwise_sqdist(features))
