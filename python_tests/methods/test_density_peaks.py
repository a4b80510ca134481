"""Density peaks clustering: SparseVLM's official code, a float64 oracle, any spread, batches, bad values."""

import math

import numpy as np
import pytest
import torch

from sts_kernels import methods
from sts_kernels.methods import Selection
from sts_kernels.methods._density_peaks import density_peaks

from . import recipe
from .density import clusters_of

CASES = [case for case in recipe.cases("sparsevlm") if "clusters" in case]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case['recipe']}-{case['N']}-{case['clusters']}")
def test_the_official_code(case, device):
    """`cluster_and_merge` of the official code: centers, clusters, sizes, means."""
    (x,) = recipe.tensors(case, recipe.features(case, recipe.start(case)))
    x = x[None].to(device)
    centers, assignment = density_peaks(x, case["clusters"])
    assert centers[0].tolist() == case["centers"]
    assert assignment[0].tolist() == case["cluster"]
    assert assignment[0].bincount().tolist() == case["sizes"]
    stored = np.load(recipe.VECTORS / "sparsevlm.npz")[f"merged_{case['seed']}"]
    rows = methods.merge(x, Selection(centers, assignment))[0].cpu()
    torch.testing.assert_close(rows, torch.from_numpy(stored), rtol=0, atol=1e-4)


@pytest.mark.parametrize("spread", ["as it is", "wide", "narrow", "far away", "massive channels"])
def test_the_float64_oracle(spread, device):
    """Seeds that the vectors do not use; only inputs whose decisions all have a margin are compared."""
    compared = 0
    for seed in range(60):
        rs, size = np.random.RandomState(1000 + seed), (1, 2, 7, 40, 61)[seed % 5]
        x = torch.from_numpy(recipe.clustered(rs, 1, size, 24)[0] if seed % 2 else recipe.normal(rs, size, 24))
        x = {
            "as it is": x,
            "wide": 300 * x,
            "narrow": x / 4096,
            "far away": x / 16 + 20,
            "massive channels": x * torch.where(torch.arange(24) == 5, 1000, 1),
        }[spread]
        clusters = min(size, (1, 3, 8)[seed % 3])
        neighbors = (None, 5)[seed % 2]
        centers, belongs, margin = clusters_of(x, clusters, min(size, neighbors or clusters))
        if margin < 1e-4:
            continue
        compared += 1
        got = density_peaks(x[None].to(device), clusters, neighbors)
        assert got[0][0].tolist() == centers
        assert got[1][0].tolist() == belongs
    assert compared > 25


def test_equal_tokens(device):
    """As many centers as asked for, each in its own cluster; equal scores go to the lowest index."""
    x = torch.ones(1, 9, 4, device=device)
    centers, assignment = density_peaks(x, 3)
    assert centers.tolist() == [[0, 1, 2]]
    assert assignment.tolist() == [[0, 1, 2, 0, 0, 0, 0, 0, 0]]
    x[0, ::2] = 2
    centers, assignment = density_peaks(x, 9)
    assert sorted(centers[0].tolist()) == list(range(9))
    assert torch.equal(centers[0, assignment[0]], torch.arange(9, device=device))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_an_item_does_not_depend_on_its_batch(dtype, device):
    rng, counts = torch.Generator().manual_seed(3), [30, 11, 1, 0, 30, 4]
    x = (torch.randn(6, 30, 12, generator=rng) * 3).to(dtype).to(device)
    for item, count in enumerate(counts):
        x[item, count:] = math.nan if item % 2 else 1e4
    centers, assignment = density_peaks(x, 5, num_tokens=torch.tensor(counts, device=device))
    for item, count in enumerate(counts):
        clusters = min(5, count)
        assert (assignment[item, count:] == -1).all()
        if not count:
            continue
        alone = density_peaks(x[item : item + 1, :count], clusters, 5)
        assert torch.equal(centers[item, :clusters], alone[0][0])
        assert torch.equal(assignment[item, :count], alone[1][0])
        wide = density_peaks(x[item : item + 1, :count].float(), clusters, 5)
        assert torch.equal(alone[0], wide[0])
        assert torch.equal(alone[1], wide[1])


def test_bad_values_are_no_centers_and_in_no_cluster(device):
    x = torch.randn(1, 20, 8, generator=torch.Generator().manual_seed(1)).to(device)
    good = [i for i in range(20) if i not in (2, 9, 10)]
    want = density_peaks(x[:, good], 4)
    x[0, 2, 3], x[0, 9, 0], x[0, 10] = math.nan, math.inf, -math.inf
    centers, assignment = density_peaks(x, 4)
    assert centers[0].tolist() == [good[i] for i in want[0][0].tolist()]
    assert assignment[0, good].tolist() == want[1][0].tolist()
    assert (assignment[0, [2, 9, 10]] == -1).all()
    centers, assignment = density_peaks(x, 19)
    assert sorted(centers[0].tolist()[:17]) == good
    assert centers[0].tolist()[17:] == [2, 9]
    rows = methods.merge(x, Selection(centers, assignment))
    assert rows[0, :17].isfinite().all()


def test_half_precision_far_from_the_origin(device):
    """All tokens but one are equal: division by their spread would overflow."""
    x = torch.full((1, 64, 16), 1000.0, device=device, dtype=torch.float16)
    x[0, 7, 3] += 1
    centers, assignment = density_peaks(x, 2)
    assert assignment.min() == 0
    assert (x[0, centers[0]] == x[0, centers[0]].float()).all()
    assert set(centers[0].tolist()) == {0, 1} or 7 in centers[0].tolist()
