"""The Triton kernels in Triton's interpreter, on CPU tensors. test_attention_received.py runs it in its own process.

Calls the launcher with plans that cut small inputs into several blocks, which the op does for large ones only.
"""

import attention_oracle as oracle
import pytest
import torch
from attention_oracle import received_inputs, row_options

from sts_kernels.ops import _attention_received_triton as kernels
from sts_kernels.ops._attention_received_plan import Plan

ATOL = 2e-6
SMALL = Plan(rows=32, moving_keys=16, keys=32, moving_rows=16, warps=4, stages=2)
KINDS = ["", "weight", "position", "mask", "weight position", "position mask", "weight position mask"]


def run(query, key, scale=None, row_weight=None, row_position=None, key_mask=None, per_head=False, plan=SMALL):
    shape = (key.shape[0], query.shape[2], key.shape[1]) if per_head else key.shape[:2]
    out = torch.full(shape, float("nan"))
    return kernels.received(out, query, key, scale, row_weight, row_position, key_mask, per_head, plan)


def test_is_interpreted():
    assert kernels.INTERPRETED


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "shape",
    [(2, 70, 50, 2, 1, 64), (1, 33, 40, 2, 2, 80), (1, 1, 50, 4, 1, 128), (2, 40, 1, 2, 1, 72), (1, 96, 48, 1, 1, 33)],
    ids=str,
)
def test_equals_float64(dtype, shape):
    query, key = received_inputs(*shape, dtype)
    for per_head in (False, True):
        got = run(query, key, per_head=per_head)
        assert oracle.error(got, oracle.received(query, key, per_head=per_head)) < ATOL
        assert (got.sum(-1) - 1).abs().max() < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kinds", KINDS)
@pytest.mark.parametrize("shape", [(2, 70, 50, 2, 1, 40), (2, 35, 70, 1, 1, 16)], ids=str)
def test_rows_and_keys_that_count(dtype, kinds, shape):
    """Rows of weight 0, masked keys and keys past every row's position do not count: they hold NaN."""
    query, key = received_inputs(*shape, dtype)
    given = row_options(*shape[:3], kinds)
    if "weight" in kinds:
        given["row_weight"][-1] = 0
        query[given["row_weight"] == 0] = float("nan")
    if "mask" in kinds:
        given["key_mask"][0, :5] = False
        given["key_mask"][1] = False
        key[~given["key_mask"]] = float("nan")
    if "position" in kinds:
        given["row_position"] = given["row_position"].clamp(max=shape[2] - 3)
        key[:, -2:] = float("nan")
    got = run(query, key, 0.3, per_head=True, **given)
    assert oracle.error(got, oracle.received(query, key, 0.3, per_head=True, **given)) < ATOL
    assert ((got.sum(-1) - 1).abs() < 1e-5).logical_or((got == 0).all(-1)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dim", [1, 2, 8, 16, 33, 72, 96, 100, 160, 257, 320])
def test_any_head_dimension(dtype, dim):
    """No column past D is used: the rows are views into a buffer of NaN, with odd strides."""
    query, key = received_inputs(1, 40, 35, 2, 1, dim, dtype)
    wide = torch.full((1, 42, 3, dim + 5), float("nan"), dtype=dtype)
    wide[:, 1:41, 1:, 3 : dim + 3] = query
    tall = torch.full((1, 2, 37, dim + 2), float("nan"), dtype=dtype)
    tall[:, 1:, 1:36, 1 : dim + 1] = key.transpose(1, 2)
    got = run(wide[:, 1:41, 1:, 3 : dim + 3], tall[:, 1:, 1:36, 1 : dim + 1].transpose(1, 2))
    assert oracle.error(got, oracle.received(query, key)) < ATOL


def test_strides_of_weights_positions_and_masks():
    query, key = received_inputs(2, 50, 60, 2, 1, 64)
    given = row_options(2, 50, 60, "weight position mask")
    spread = {name: torch.stack([value, ~value if value.dtype == torch.bool else -value], 2)[..., 0].T.clone().T
              for name, value in given.items()}  # fmt: skip
    spread["row_position"] = spread["row_position"].int()
    assert torch.equal(run(query, key, **spread), run(query, key, **given))
    half = run(query, key, row_weight=given["row_weight"].half())
    assert oracle.error(half, oracle.received(query, key, row_weight=given["row_weight"].half())) < ATOL


def test_blocks_of_rows_that_count_for_nothing():
    """Blocks of rows with weight 0, or without a visible key, add nothing, wherever they lie."""
    query, key = received_inputs(1, 200, 90, 2, 2, 64)
    weight = torch.zeros(1, 200)
    weight[:, 40:50] = 0.5
    weight[:, 170:] = 2
    position = torch.arange(200)[None] // 3
    want = oracle.received(query, key, row_weight=weight, row_position=position)
    assert oracle.error(run(query, key, row_weight=weight, row_position=position), want) < ATOL
    assert (run(query, key, row_weight=torch.zeros_like(weight)) == 0).all()
    assert (run(query, key, row_position=torch.full_like(position, -1)) == 0).all()


def test_large_logits_and_negative_scales():
    query, key = received_inputs(1, 60, 70, 2, 1, 64)
    for scale in (0.0, -0.5, 40.0, 1):
        got = run(query, key, scale)
        assert oracle.error(got, oracle.received(query, key, scale)) < 2e-5
        assert (got.sum(-1) - 1).abs().max() < 1e-5


def test_nan_stays_in_its_item():
    query, key = received_inputs(2, 50, 40, 2, 1, 64)
    clean = run(query, key)
    key[1, 3, 0, 5] = float("nan")
    got = run(query, key)
    assert got[1].isnan().all()
    assert torch.equal(got[0], clean[0])


def test_same_bits_in_any_batch():
    query, key = received_inputs(3, 50, 40, 4, 2, 64, torch.float16)
    given = row_options(3, 50, 40, "weight position mask")
    got = run(query, key, **given)
    one = {name: value[1:2] for name, value in given.items()}
    assert torch.equal(got[1:2], run(query[1:2], key[1:2], **one))


def test_the_plan_of_the_op():
    query, key = received_inputs(1, 150, 140, 2, 1, 80)
    assert oracle.error(run(query, key, plan=None), oracle.received(query, key)) < ATOL
