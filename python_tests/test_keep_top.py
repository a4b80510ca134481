"""keep_top: against sorting by hand, ties, too few candidates, NaN and infinite scores, errors."""

import math

import pytest
import torch

from sts_kernels import keep_top

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def by_hand(scores, candidates, k):
    """(B, k): the top k by score, ties to the lowest position; positions ascend, padded with -1."""
    rows = []
    for row, mask in zip(scores.tolist(), candidates.tolist(), strict=True):
        ranked = sorted((p for p in range(len(row)) if mask[p]), key=lambda p: (-row[p], p))
        kept = sorted(ranked[:k])
        rows.append(kept + [-1] * (k - len(kept)))
    return torch.tensor(rows, dtype=torch.int64)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("batch", "keys", "k"), [(1, 1, 1), (3, 10, 4), (2, 577, 64), (4, 33, 33), (2, 4099, 1)])
def test_equals_sorting_by_hand(device, dtype, batch, keys, k):
    rng = torch.Generator().manual_seed(keys)
    scores = torch.randn(batch, keys, generator=rng).to(dtype)
    candidates = torch.rand(batch, keys, generator=rng) > 0.3
    positions, valid = keep_top(scores.to(device), candidates.to(device), k)
    expected = by_hand(scores, candidates, k)
    assert positions.dtype == torch.int64
    assert valid.dtype == torch.bool
    assert torch.equal(positions.cpu(), expected)
    assert torch.equal(valid.cpu(), expected >= 0)


@pytest.mark.parametrize("keys", [8, 100, 5000])
def test_ties_go_to_the_lowest_position(device, keys):
    rng = torch.Generator().manual_seed(0)
    scores = torch.randint(3, (4, keys), generator=rng).float()
    candidates = torch.rand(4, keys, generator=rng) > 0.2
    positions, _ = keep_top(scores.to(device), candidates.to(device), keys // 3)
    assert torch.equal(positions.cpu(), by_hand(scores, candidates, keys // 3))
    positions, _ = keep_top(
        torch.zeros(1, keys, device=device), torch.ones(1, keys, dtype=torch.bool, device=device), 5
    )
    assert positions.tolist() == [[0, 1, 2, 3, 4]]


def test_fewer_candidates_than_k(device):
    scores = torch.tensor([[5.0, 4.0, 3.0, 2.0], [1.0, 2.0, 3.0, 4.0], [0.0, 0.0, 0.0, 0.0]], device=device)
    candidates = torch.tensor([[0, 1, 0, 1], [0, 0, 0, 0], [1, 1, 1, 1]], dtype=torch.bool, device=device)
    positions, valid = keep_top(scores, candidates, 3)
    assert positions.tolist() == [[1, 3, -1], [-1, -1, -1], [0, 1, 2]]
    assert valid.tolist() == [[True, True, False], [False, False, False], [True, True, True]]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_candidates_beat_the_others_whatever_they_score(device, dtype):
    nan, inf = math.nan, math.inf
    scores = torch.tensor([[9.0, nan, inf, -inf, -3.0, nan, inf]], dtype=dtype, device=device)
    candidates = torch.tensor([[0, 1, 0, 1, 1, 0, 1]], dtype=torch.bool, device=device)
    kept = [keep_top(scores, candidates, k)[0].tolist()[0] for k in (1, 2, 4, 5)]
    assert kept == [[6], [4, 6], [1, 3, 4, 6], [1, 3, 4, 6, -1]]


def test_scores_of_zero_are_kept_before_nothing(device):
    """Candidates with score 0, as last_query_scores gives to a row of padding, are kept."""
    positions, valid = keep_top(torch.zeros(1, 6, device=device), torch.arange(6, device=device)[None] > 3, 3)
    assert positions.tolist() == [[4, 5, -1]]
    assert valid.tolist() == [[True, True, False]]


def test_strides_and_inputs_left_alone(device):
    scores = torch.randn(7, 2, generator=torch.Generator().manual_seed(0)).to(device).requires_grad_()
    candidates = torch.ones(7, 2, dtype=torch.bool, device=device)
    before = scores.detach().clone()
    positions, _ = keep_top(scores.T, candidates.T, 3)
    assert torch.equal(positions.cpu(), by_hand(before.cpu().T, candidates.cpu().T, 3))
    assert torch.equal(scores, before)


def test_empty_batch(device):
    positions, valid = keep_top(torch.zeros(0, 4, device=device), torch.zeros(0, 4, dtype=torch.bool, device=device), 2)
    assert positions.shape == valid.shape == (0, 2)


def test_compiles(device):
    scores = torch.randn(2, 50, generator=torch.Generator().manual_seed(0)).to(device)
    candidates = scores > -0.5
    compiled = torch.compile(keep_top, fullgraph=True, backend="aot_eager")
    for got, expected in zip(compiled(scores, candidates, 7), keep_top(scores, candidates, 7), strict=True):
        assert torch.equal(got, expected)


def test_nothing_is_read_back(cuda):
    scores, candidates = torch.randn(2, 50, device=cuda), torch.ones(2, 50, dtype=torch.bool, device=cuda)
    torch.cuda.set_sync_debug_mode("error")
    try:
        keep_top(scores, candidates, 7)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (TypeError, "scores must be a tensor of shape", (3, torch.ones(1, 4, dtype=torch.bool), 1)),
        (TypeError, "scores must be float32, .*, got int64", (torch.ones(1, 4).long(), torch.ones(1, 4).bool(), 1)),
        (TypeError, "candidates must be bool, got float32", (torch.ones(1, 4), torch.ones(1, 4), 1)),
        (ValueError, r"scores must have shape \(B, S\), got \(4,\)", (torch.ones(4), torch.ones(4).bool(), 1)),
        (ValueError, r"the shape of scores, \(1, 4\), got \(1, 3\)", (torch.ones(1, 4), torch.ones(1, 3).bool(), 1)),
        (
            ValueError,
            "on the device of scores, cpu, got meta",
            (torch.ones(1, 4), torch.ones(1, 4).bool().to("meta"), 1),
        ),
        (ValueError, "k must be between 1 and 4 .*, got 0", (torch.ones(1, 4), torch.ones(1, 4).bool(), 0)),
        (ValueError, "k must be between 1 and 4 .*, got 5", (torch.ones(1, 4), torch.ones(1, 4).bool(), 5)),
        (TypeError, "k must be an int, got float", (torch.ones(1, 4), torch.ones(1, 4).bool(), 1.0)),
    ],
)
def test_errors(error, message, arguments):
    with pytest.raises(error, match=message):
        keep_top(*arguments)
