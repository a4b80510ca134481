"""The Triton kernels in Triton's interpreter, on CPU tensors. test_last_query_scores.py runs it in its own process.

Calls the launchers with plans that cut small inputs into several blocks and splits, which ops do for large ones only.
"""

import itertools

import attention_oracle as oracle
import pytest
import torch
import triton
from attention_oracle import ATOL, inputs

from sts_kernels.ops import _last_query_scores_triton as kernels
from sts_kernels.ops._last_query_scores_plan import Plan

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
WHOLE, SPLIT = "one launch", "two launches"


def plan(kind, group, keys, tiles=1, block=32, blocks_per_split=2):
    if kind is WHOLE:
        return Plan(True, tiles, group // tiles, max(16, triton.next_power_of_2(keys)), keys, 1)
    span = block * blocks_per_split
    return Plan(False, tiles, group // tiles, block, span, triton.cdiv(keys, span))


def test_is_interpreted():
    assert kernels.INTERPRETED


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", [WHOLE, SPLIT])
@pytest.mark.parametrize(
    ("shape", "tiles"),
    [
        ((2, 200, 8, 2, 128), 1),
        ((1, 97, 4, 4, 64), 1),
        ((2, 130, 6, 1, 72), 1),
        ((1, 65, 3, 1, 192), 1),
        ((1, 1, 2, 1, 256), 1),
        ((1, 100, 36, 2, 64), 2),  # 18 query heads per key head: two padded tiles
    ],
    ids=str,
)
@pytest.mark.parametrize("masked", [False, True])
def test_equals_float64(dtype, kind, shape, tiles, masked):
    query, key = inputs(*shape, dtype)
    mask = None
    if masked:
        mask = oracle.holes(*shape[:2])
        mask[-1] &= shape[0] == 1  # the last of several rows has no allowed key
        key[~mask] = float("nan")
    got = kernels.scores(query, key, None, mask, plan(kind, shape[2] // shape[3], shape[1], tiles))
    assert oracle.error(got, oracle.scores(query, key, None, mask)) < ATOL
    if masked:
        assert (got[~mask] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", [WHOLE, SPLIT])
@pytest.mark.parametrize("dim", [1, 2, 8, 16, 32, 33, 48, 100, 160, 257, 512, 576])
def test_any_head_dimension(dtype, kind, dim):
    """No column past D is used: the rows are views into a buffer of NaN, with odd strides."""
    query, key = inputs(1, 40, 4, 2, dim, dtype)
    wide = torch.full((1, 42, 3, dim + 5), float("nan"), dtype=dtype)
    wide[:, 1:41, 1:, 3 : dim + 3] = key
    odd = torch.full((1, 5, dim + 2), float("nan"), dtype=dtype)
    odd[:, 1:, 1 : dim + 1] = query
    query, key = odd[:, 1:, 1 : dim + 1], wide[:, 1:41, 1:, 3 : dim + 3]
    expected = oracle.scores(query, key)
    cut = plan(kind, 2, 40, blocks_per_split=1)
    assert oracle.error(kernels.scores(query, key, None, None, cut), expected) < ATOL
    packed = kernels.scores_varlen(query, key[0], torch.tensor([0, 40]), 40, None, cut)
    assert oracle.error(packed[None], expected) < ATOL


@pytest.mark.parametrize("kind", [WHOLE, SPLIT])
def test_strides(kind):
    query, key = inputs(2, 70, 4, 2, 72)
    expected = oracle.scores(query, key)
    wide = torch.full((2, 75, 3, 80), float("nan"))
    wide[:, 2:72, 1:, 3:75] = key
    for view in (
        key.transpose(1, 2).contiguous().transpose(1, 2),
        wide[:, 2:72, 1:, 3:75],
        key.transpose(0, 1).clone().mT.mT.transpose(0, 1),
    ):
        assert oracle.error(kernels.scores(query, view, None, None, plan(kind, 2, 70)), expected) < ATOL
    mask = oracle.holes(70, 2).T
    spread = torch.stack([query, -query], dim=2).flatten(1, 2)[:, ::2]
    got = kernels.scores(spread, key, 0.3, mask, plan(kind, 2, 70))
    assert oracle.error(got, oracle.scores(query, key, 0.3, mask)) < ATOL


@pytest.mark.parametrize("kind", [WHOLE, SPLIT])
def test_nan_spoils_the_allowed_keys_of_its_row(kind):
    query, key = inputs(2, 70, 4, 2, 64)
    mask = torch.ones(2, 70, dtype=torch.bool)
    mask[0, 3] = False
    key[0, 40, 1, 9] = float("nan")
    got = kernels.scores(query, key, None, mask, plan(kind, 2, 70))
    assert got[0, 3] == 0
    assert got[0, mask[0]].isnan().all()
    assert oracle.error(got[1:], oracle.scores(query[1:], key[1:])) < ATOL


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", [WHOLE, SPLIT])
@pytest.mark.parametrize("offsets", [torch.int32, torch.int64], ids=str)
def test_varlen(dtype, kind, offsets):
    starts = [0, 5, 5, 70, 71, 170]
    query, _ = inputs(5, 1, 4, 2, 64, dtype)
    _, key = inputs(1, 175, 4, 2, 64, dtype, seed=1)
    cu_seqlens = torch.tensor([starts, starts[::-1]], dtype=offsets).T[:, 0]  # any stride
    got = kernels.scores_varlen(query, key[0], cu_seqlens, 99, None, plan(kind, 2, 99))
    for item, (start, end) in enumerate(itertools.pairwise(starts)):
        expected = oracle.scores(query[item : item + 1], key[:, start:end])[0]
        assert oracle.error(got[start:end], expected) < ATOL
    assert (got[170:] == 0).all()  # tokens of no item


@pytest.mark.parametrize("kind", [WHOLE, SPLIT])
@pytest.mark.parametrize(
    "wrong", [[0, -3, 60, 90], [0, 50, 20, 90], [7, 2**31 - 1, 20, 90], [0, 30, 60, 10**9]], ids=str
)
def test_offsets_that_do_not_fit(kind, wrong):
    """Invalid items are empty; tokens of one valid item are right. An access out of bounds crashes."""
    query, _ = inputs(3, 1, 4, 2, 64)
    _, key = inputs(1, 90, 4, 2, 64, seed=1)
    got = kernels.scores_varlen(query, key[0], torch.tensor(wrong, dtype=torch.int32), 70, None, plan(kind, 2, 70))
    expected, items = torch.zeros(90, dtype=torch.float64), torch.zeros(90)
    for item, (start, end) in enumerate(itertools.pairwise(wrong)):
        if 0 <= start <= end <= 90 and end - start <= 70:
            expected[start:end] = oracle.scores(query[item : item + 1], key[:, start:end])[0]
            items[start:end] += 1
    assert oracle.error(got[items <= 1], expected[items <= 1]) < ATOL


def test_same_bits_in_any_batch():
    query, key = inputs(3, 150, 4, 2, 64, torch.float16)
    got = kernels.scores(query, key, None, None, plan(SPLIT, 2, 150))
    assert torch.equal(got[1:2], kernels.scores(query[1:2], key[1:2], None, None, plan(SPLIT, 2, 150)))
