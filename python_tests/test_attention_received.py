"""attention_received: float64 brute force, last_query_scores of a row, masks, layouts, memory, errors, compilation."""

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import attention_oracle as oracle
import pytest
import torch
from attention_oracle import received_inputs, row_options
from test_last_query_scores import pytest_in_its_own_process

from sts_kernels import _registry, attention_received, last_query_scores

HERE = Path(__file__).parent
ATOL = 1e-5  # absolute; scores lie in [0, 1]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SHAPES = [  # B, R, S, Hq, Hkv, D: lengths around the block size; MHA, GQA and MQA
    (1, 1, 1, 1, 1, 64),
    (2, 5, 1, 4, 2, 64),
    (2, 1, 130, 4, 1, 128),
    (1, 63, 65, 2, 2, 80),
    (1, 129, 127, 3, 1, 72),
    (2, 128, 64, 4, 4, 96),
    (1, 257, 320, 6, 2, 128),
    (3, 40, 300, 2, 1, 256),
    (1, 577, 577, 2, 2, 64),
    *((2, 75, 70, 4, 2, dim) for dim in (1, 2, 8, 16, 33, 48, 100, 160, 257, 512)),
]
KINDS = ["weight", "position", "mask", "weight position", "position mask", "weight position mask"]


def samples(device):
    query, key = received_inputs(2, 5, 7, 4, 2, 64, device=device)
    given = row_options(2, 5, 7, "weight position mask", device)
    weight, position, mask = given.values()
    return [
        (query, key),
        (query.half(), key.half(), 0.5, weight, position, mask, True),
        (query.bfloat16().transpose(0, 1).contiguous().transpose(0, 1), key.bfloat16(), None, weight.half()),
        (query, key.transpose(1, 2).contiguous().transpose(1, 2), None, None, position.int(), mask.T.contiguous().T),
        (query[:0], key[:0]),
    ]


def sized(step, device):
    batch, rows, keys, heads, kv_heads, dim = 2 + step, 9 + 4 * step, 11 + 6 * step, 2 * (2 + step), 2 + step, 7 + step
    query, key = received_inputs(batch, rows, keys, heads, kv_heads, dim, device=device, seed=step)
    options = row_options(batch, rows, keys, "weight position mask", device, seed=step)
    return {"query": query, "key": key, "scale": 0.3, **options}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equals_float64(device, shape, dtype):
    query, key = received_inputs(*shape, dtype, device)
    want = oracle.received(query, key, per_head=True)
    got = attention_received(query, key, per_head=True)
    assert oracle.error(got, want) < ATOL
    assert (got.sum(-1) - 1).abs().max() < 1e-5
    mean = attention_received(query, key)
    assert oracle.error(mean, want.mean(1)) < ATOL
    assert (mean.sum(-1) - 1).abs().max() < 1e-5


@pytest.mark.parametrize("kinds", KINDS)
@pytest.mark.parametrize("shape", [(3, 150, 200, 4, 2, 64), (2, 70, 33, 2, 1, 72)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_and_keys_that_count(device, shape, dtype, kinds):
    """Rows and keys that do not count hold NaN or inf. One item has no key, the last item no row."""
    query, key = received_inputs(*shape, dtype, device)
    given = row_options(*shape[:3], kinds, device)
    if "weight" in kinds:
        given["row_weight"][-1] = 0
        query[given["row_weight"] == 0] = float("nan")
    if "mask" in kinds:
        given["key_mask"][0, :5] = False
        given["key_mask"][1] = False
        key[~given["key_mask"]] = float("nan")
    if "position" in kinds:
        given["row_position"] = given["row_position"].clamp(max=shape[2] - 3)
        key[:, -2:] = float("inf")
    before = {name: value.clone() for name, value in given.items()}
    want = oracle.received(query, key, 0.3, per_head=True, **given)
    for per_head in (False, True):
        got = attention_received(query, key, 0.3, per_head=per_head, **given)
        assert oracle.error(got, want if per_head else want.mean(1)) < ATOL
        assert ((got.sum(-1) - 1).abs() < 1e-5).logical_or((got == 0).all(-1)).all()
    if "mask" in kinds:
        assert (got[1] == 0).all()
    if "weight" in kinds:
        assert (got[-1] == 0).all()
    assert all(torch.equal(given[name], value) for name, value in before.items())


@pytest.mark.parametrize("scale", [0.0, 0.02, -0.4, 3.0, 1])
def test_scale(device, scale):
    query, key = received_inputs(2, 90, 133, 4, 2, 128, torch.bfloat16, device)
    got = attention_received(query, key, scale)
    assert oracle.error(got, oracle.received(query, key, scale)) < ATOL
    assert (got.sum(-1) - 1).abs().max() < 1e-5


def test_rows_without_keys_do_not_count(device):
    """Left padding of a causal prompt does not change the scores of the other tokens."""
    query, key = received_inputs(1, 60, 60, 4, 2, 64, device=device)
    position = torch.arange(60, device=device)[None]
    mask = position >= 13
    got = attention_received(query, key, None, None, position, mask)
    alone = attention_received(query[:, 13:], key[:, 13:], None, None, position[:, :-13])
    torch.testing.assert_close(got[:, 13:], alone, rtol=0, atol=1e-6)
    assert (got[:, :13] == 0).all()


@pytest.mark.parametrize("factor", [1e-20, 1e20])
def test_weights_are_a_proportion(device, factor):
    query, key = received_inputs(2, 60, 70, 4, 2, 64, device=device)
    weight = row_options(2, 60, 70, "weight", device)["row_weight"]
    got = attention_received(query, key, None, weight * factor)
    torch.testing.assert_close(got, attention_received(query, key, None, weight), rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("masked", [False, True])
def test_one_row_is_last_query_scores(device, masked):
    query, key = received_inputs(3, 1, 200, 8, 2, 64, torch.float16, device)
    mask = oracle.left_padding(3, 200).to(device) if masked else None
    want = last_query_scores(query[:, 0], key, None, mask)
    torch.testing.assert_close(attention_received(query, key, key_mask=mask), want, rtol=1e-5, atol=1e-8)
    position = torch.tensor([[150], [199], [-1]], device=device)
    seen = torch.arange(200, device=device) <= position
    want = last_query_scores(query[:, 0], key, None, seen)
    torch.testing.assert_close(attention_received(query, key, None, None, position), want, rtol=1e-5, atol=1e-8)


def test_equals_the_mean_of_the_matrix(device):
    """Against the mean of the softmax matrix, as encoders compute it."""
    query, key = received_inputs(2, 144, 144, 4, 4, 64, device=device)
    matrix = (query.transpose(1, 2) @ key.permute(0, 2, 3, 1) / 8).softmax(-1)
    got = attention_received(query, key)
    torch.testing.assert_close(got, matrix.mean((1, 2)), rtol=0, atol=ATOL)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layouts(device, dtype):
    query, key = received_inputs(2, 50, 60, 4, 2, 72, dtype, device)
    want = oracle.received(query, key)
    wide = torch.full((2, 55, 5, 80), float("nan"), dtype=dtype, device=device)
    wide[:, 2:52, 1:, 3:75] = query
    fused = torch.full((2, 60, 2, 3, 72), float("nan"), dtype=dtype, device=device)
    fused[:, :, :, 1] = key
    for one, other in (
        (query.transpose(1, 2).contiguous().transpose(1, 2), key.transpose(1, 2).contiguous().transpose(1, 2)),
        (wide[:, 2:52, 1:, 3:75], fused[:, :, :, 1]),
        (query.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3), key.transpose(0, 1).contiguous().transpose(0, 1)),
    ):
        assert oracle.error(attention_received(one, other), want) < ATOL
    every_other = attention_received(query[:, ::2], key[:, ::3])
    assert oracle.error(every_other, oracle.received(query[:, ::2], key[:, ::3])) < ATOL
    expanded = attention_received(query[:, :1].expand(2, 90, 4, 72), key)
    assert oracle.error(expanded, oracle.received(query[:, :1], key)) < ATOL


def test_positions_out_of_int32(device):
    query, key = received_inputs(1, 4, 30, 2, 1, 64, device=device)
    position = torch.tensor([[2**40, -(2**40), 2**31, 12]], device=device)
    want = oracle.received(query, key, row_position=position)
    assert oracle.error(attention_received(query, key, None, None, position), want) < ATOL


def test_nan_stays_in_its_item(device):
    query, key = received_inputs(3, 100, 90, 4, 2, 64, device=device)
    clean = attention_received(query, key)
    key[1, 5, 0, 7] = float("nan")
    got = attention_received(query, key)
    assert got[1].isnan().all()
    assert torch.equal(got[::2], clean[::2])


def test_same_bits_again_and_in_any_batch(device):
    for shape in [(4, 33, 64, 8, 2, 64), (3, 500, 700, 4, 2, 128)]:
        query, key = received_inputs(*shape, torch.bfloat16, device)
        given = row_options(*shape[:3], "weight position mask", device)
        got = attention_received(query, key, **given)
        assert all(torch.equal(got, attention_received(query, key, **given)) for _ in range(3))
        for b in range(shape[0]):
            one = {name: value[b : b + 1] for name, value in given.items()}
            assert torch.equal(got[b : b + 1], attention_received(query[b : b + 1], key[b : b + 1], **one))


def test_several_blocks_of_the_reference(monkeypatch):
    """So many keys that the reference takes blocks of MIN_ROWS rows; the last block is smaller."""
    blocks, softmax = [], torch.softmax
    monkeypatch.setattr(torch, "softmax", lambda x, *args, **kw: blocks.append(len(x)) or softmax(x, *args, **kw))
    query, key = received_inputs(1, 75, 40000, 2, 1, 16)
    weight = torch.ones(1, 75)
    weight[0, 3] = 0
    got = _registry.OPS["attention_received"].reference(query, key, None, weight)
    assert blocks == [32, 32, 32, 32, 20]
    logits = torch.einsum("rhd,sd->hrs", query[0].double(), key[0, :, 0].double()) / 4
    want = (logits.softmax(-1) * weight[0, :, None]).sum(1).mean(0) / 74
    assert oracle.error(got[0], want) < 1e-8


def test_many_rows_and_keys_on_the_gpu(cuda):
    """Against float64 on the GPU, one head at a time."""
    query, key = received_inputs(1, 4096, 5000, 2, 1, 80, torch.float16, cuda)
    position = torch.arange(4096, device=cuda)[None] + 904
    got = attention_received(query, key, None, None, position, per_head=True)
    hidden = torch.arange(5000, device=cuda) > position[0, :, None]
    for head in range(2):
        logits = query[0, :, head].double() @ key[0, :, 0].double().T * 80**-0.5
        want = logits.masked_fill_(hidden, -torch.inf).softmax(-1).mean(0)
        assert oracle.error(got[0, head], want.cpu()) < 1e-6


# ---- Cost --------------------------------------------------------------------------------------------------------

MEMORY = """
import resource, sys, torch
from sts_kernels import attention_received
query = torch.ones(1, 4096, 2, 64, dtype=getattr(torch, sys.argv[1]))
attention_received(query[:, :64], query[:, :64])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
attention_received(query, query)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 / (4096 * 4096 * 4))
"""


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_memory_on_the_cpu(dtype):
    """A call allocates far less than the attention matrix of one head."""
    if sys.platform != "linux":
        pytest.skip("reads the peak memory of a process as Linux reports it")
    command = [sys.executable, "-c", MEMORY, dtype]
    done = subprocess.run(command, capture_output=True, text=True, cwd=HERE.parent)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 0.25


def test_memory_on_the_gpu(cuda):
    query = torch.ones(1, 8192, 8, 64, dtype=torch.bfloat16, device=cuda)
    attention_received(query, query)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    attention_received(query, query)
    assert torch.cuda.max_memory_allocated() - before < 1.3 * 8192 * (3 * 8 + 1) * 4  # scratch and scores


# ---- PyTorch -----------------------------------------------------------------------------------------------------


def test_compiles_once_for_every_length(device):
    graphs = []

    def backend(module, example):
        graphs.append(module)
        return module.forward

    torch._dynamo.reset()
    compiled = torch.compile(lambda q, k: attention_received(q * 2, k) + 1, fullgraph=True, backend=backend)
    for rows, keys in ((37, 64), (64, 37), (129, 200)):
        query, key = received_inputs(2, rows, keys, 4, 2, 64, device=device)
        torch._dynamo.mark_dynamic(query, 1)
        torch._dynamo.mark_dynamic(key, 1)
        assert torch.equal(compiled(query, key), attention_received(query * 2, key) + 1)
    assert len(graphs) == 1


def test_cuda_graph_and_no_sync(cuda):
    query, key = received_inputs(2, 300, 300, 4, 2, 64, torch.bfloat16, cuda)
    given = row_options(2, 300, 300, "weight position mask", cuda)
    attention_received(query, key, **given)
    torch.cuda.set_sync_debug_mode("error")
    try:
        attention_received(query, key, **given)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attention_received(query, key, **given)
    for seed in (1, 2):
        new_query, new_key = received_inputs(2, 300, 300, 4, 2, 64, torch.bfloat16, cuda, seed)
        query.copy_(new_query)
        key.copy_(new_key)
        graph.replay()
        assert torch.equal(out, attention_received(query, key, **given))


def test_backends():
    op = _registry.OPS["attention_received"]
    assert op.backend("CPU") == "reference"
    assert op.backend("CUDA") == ("triton" if find_spec("triton") else "reference")


# ---- Triton without a GPU ----------------------------------------------------------------------------------------


def test_kernels_in_the_interpreter():
    pytest_in_its_own_process("attention_received_interpreted.py", TRITON_INTERPRET="1")


@pytest.mark.parametrize(
    "which", ["not slow", pytest.param("slow", marks=[pytest.mark.slow, pytest.mark.timeout(900)])]
)
def test_kernels_compile_without_spills(which):
    pytest_in_its_own_process("attention_received_compiled.py", "-m", which, TRITON_INTERPRET="0")


# ---- Errors ------------------------------------------------------------------------------------------------------


def fails(error, message, *args, **kwargs):
    with pytest.raises(error, match=message):
        attention_received(*args, **kwargs)


def test_errors(device):
    query, key = received_inputs(2, 5, 7, 4, 2, 64, device=device)
    weight, position, mask = row_options(2, 5, 7, "weight position mask", device).values()
    fails(TypeError, "query must be a tensor of shape", 3, key)
    fails(TypeError, "query must be float32, float16, bfloat16, got float64", query.double(), key.double())
    fails(TypeError, "key must have the dtype of query, float32, got float16", query, key.half())
    fails(ValueError, r"query must have shape \(B, R, Hq, D\), got", query[0], key)
    fails(ValueError, r"key must have shape \(B, S, Hkv, D\), got", query, key[0])
    fails(ValueError, "key must have the batch size of query, 2, got 1", query, key[:1])
    fails(ValueError, "multiple of the heads of key, got 3 and 2", query[:, :, :3], key)
    fails(ValueError, "key must have the head dimension of query, 64, got 32", query, key[..., :32])
    fails(ValueError, r"at least one position, got shape \(2, 0, 2, 64\)", query, key[:, :0])
    fails(ValueError, r"query must have at least one row, got shape \(2, 0, 4, 64\)", query[:, :0], key)
    fails(ValueError, "query must be contiguous in its last dimension", query.mT.contiguous().mT, key)
    fails(TypeError, "scale must be a float, got str", query, key, "1")
    fails(ValueError, "scale must be finite in float32, got", query, key, float("inf"))
    fails(TypeError, "row_weight must be float32, float16, bfloat16, got int64", query, key, None, position)
    fails(ValueError, r"row_weight must have shape \(B, R\) = \(2, 5\), got \(2, 4\)", query, key, None, weight[:, 1:])
    fails(TypeError, "row_position must be int64, int32, got float32", query, key, None, None, weight)
    fails(ValueError, r"row_position must have shape \(B, R\), got \(5,\)", query, key, None, None, position[0])
    fails(TypeError, "key_mask must be bool, got int64", query, key, None, None, None, mask.long())
    fails(ValueError, r"key_mask must have shape \(B, S\) = \(2, 7\), got", query, key, key_mask=mask[:, 1:])
    fails(TypeError, "per_head must be True or False, got int", query, key, per_head=1)
    other = torch.device("meta")
    fails(ValueError, "key must be on the device of query, .*, got meta", query, key.to(other))
    fails(ValueError, "row_weight must be on the device of query, .*, got meta", query, key, None, weight.to(other))
    fails(ValueError, "row_position must be on the device of", query, key, None, None, position.to(other))
    fails(ValueError, "key_mask must be on the device of", query, key, key_mask=mask.to(other))
