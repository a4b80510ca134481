"""last_query_scores_varlen: float64 brute force, valid and invalid offsets, layouts, graphs, errors."""

import itertools

import attention_oracle as oracle
import pytest
import torch
from attention_oracle import ATOL, inputs

from sts_kernels import last_query_scores, last_query_scores_varlen

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def packed(lengths, heads, kv_heads, dim, dtype=torch.float32, device="cpu", seed=0):
    """query (B, Hq, D), key (T, Hkv, D), cu_seqlens (B+1,) int32."""
    query, _ = inputs(len(lengths), 1, heads, kv_heads, dim, dtype, device, seed)
    _, key = inputs(1, sum(lengths), heads, kv_heads, dim, dtype, device, seed + 1)
    starts = [0, *itertools.accumulate(lengths)]
    return query, key[0], torch.tensor(starts, dtype=torch.int32, device=device)


def brute_force(query, key, starts, scale=None):
    out = torch.zeros(len(key), dtype=torch.float64)
    for item, (start, end) in enumerate(itertools.pairwise(starts)):
        out[start:end] = oracle.scores(query[item : item + 1], key[None, start:end], scale)[0]
    return out


def samples(device):
    query, key, cu_seqlens = packed([5, 0, 8], 4, 2, 64, device=device)
    return [
        (query, key, cu_seqlens, 8),
        (query.half(), key.half(), cu_seqlens.long(), 20, 0.5),
        (query.bfloat16(), key.bfloat16().transpose(0, 1).contiguous().transpose(0, 1), cu_seqlens, 8),
        (query[:0], key[:0], cu_seqlens[:1], 0),
    ]


def sized(step, device):
    lengths = [11 + 6 * step + item for item in range(2 + step)]
    query, key, cu_seqlens = packed(lengths, (2 + step) * (3 + step), 2 + step, 7 + step, device=device, seed=step)
    return {"query": query, "key": key, "cu_seqlens": cu_seqlens, "max_seqlen": max(lengths), "scale": 0.3}


@pytest.mark.parametrize("lengths", [[1], [300], [5, 0, 64, 65, 0, 20], [700, 1, 333], [0, 0], [4500, 100]], ids=str)
@pytest.mark.parametrize("heads", [(4, 4, 64), (14, 2, 128), (9, 1, 80)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equals_float64(device, lengths, heads, dtype):
    query, key, cu_seqlens = packed(lengths, *heads, dtype, device)
    got = last_query_scores_varlen(query, key, cu_seqlens, max(lengths))
    assert oracle.error(got, brute_force(query, key, cu_seqlens.tolist())) < ATOL


@pytest.mark.parametrize("longer", [0, 1, 5000])
def test_max_seqlen_may_be_larger_and_offsets_int64(device, longer):
    query, key, cu_seqlens = packed([30, 70, 11], 8, 2, 128, torch.bfloat16, device)
    got = last_query_scores_varlen(query, key, cu_seqlens.long(), 70 + longer, 0.2)
    assert oracle.error(got, brute_force(query, key, cu_seqlens.tolist(), 0.2)) < ATOL


def test_equals_the_batched_op(device):
    query, key = inputs(3, 500, 8, 2, 128, torch.bfloat16, device)
    cu_seqlens = torch.arange(0, 1501, 500, dtype=torch.int32, device=device)
    got = last_query_scores_varlen(query, key.flatten(0, 1), cu_seqlens, 500)
    assert torch.equal(got.view(3, 500), last_query_scores(query, key))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layouts(device, dtype):
    query, key, cu_seqlens = packed([60, 340], 6, 3, 72, dtype, device)
    expected = brute_force(query, key, cu_seqlens.tolist())
    wide = torch.full((400, 4, 100), float("nan"), dtype=dtype, device=device)
    wide[:, 1:, 3:75] = key
    heads_first = key.transpose(0, 1).contiguous().transpose(0, 1)
    for view in (wide[:, 1:, 3:75], heads_first):
        got = last_query_scores_varlen(query.transpose(0, 1).contiguous().transpose(0, 1), view, cu_seqlens, 340)
        assert oracle.error(got, expected) < ATOL
    column = torch.stack([cu_seqlens, cu_seqlens.flip(0)], 1)[:, 0]
    assert oracle.error(last_query_scores_varlen(query, key, column, 340), expected) < ATOL


def test_vmap_over_offsets_that_leave_tokens_out(cuda):
    """Tokens of no item score 0, also those between the items of two lanes."""
    query, key, _ = packed([50, 50], 4, 2, 64, device=cuda)
    offsets = torch.tensor([[0, 30], [10, 50]], dtype=torch.int32, device=cuda)
    call = torch.vmap(lambda q, k, at: last_query_scores_varlen(q, k, at, 50))
    got = call(query[:, None], key.view(2, 50, 2, 64), offsets)
    for lane, at in enumerate(offsets):
        assert torch.equal(
            got[lane], last_query_scores_varlen(query[lane : lane + 1], key.view(2, 50, 2, 64)[lane], at, 50)
        )


def test_other_items_do_not_matter(device):
    """NaN in one item changes no bit of the other items."""
    query, key, cu_seqlens = packed([90, 300, 80], 8, 2, 64, torch.float16, device)
    clean = last_query_scores_varlen(query, key, cu_seqlens, 300)
    key[100] = float("nan")
    got = last_query_scores_varlen(query, key, cu_seqlens, 300)
    assert got[90:390].isnan().all()
    assert torch.equal(got[:90], clean[:90])
    assert torch.equal(got[390:], clean[390:])


@pytest.mark.slow
def test_long_items(device):
    query, key, cu_seqlens = packed([100000, 3, 31069], 2, 1, 64, torch.bfloat16, device)
    got = last_query_scores_varlen(query, key, cu_seqlens, 100000)
    assert oracle.error(got, brute_force(query, key, cu_seqlens.tolist())) < ATOL


WRONG = [[0, -3, 60, 90], [0, 50, 20, 90], [7, 2**31 - 1, 20, 90], [0, 30, 60, 10**9], [0, 10, 85, 90], [3, 10, 20, 80]]


@pytest.mark.parametrize("wrong", WRONG, ids=str)
def test_offsets_that_do_not_fit_on_a_gpu(cuda, wrong):
    """Invalid items score 0. Tokens of one valid item are right, of none 0, of several undefined."""
    query, key, _ = packed([90, 0, 0], 4, 2, 64, device=cuda)
    got = last_query_scores_varlen(query, key, torch.tensor(wrong, dtype=torch.int32, device=cuda), 70)
    expected, items = torch.zeros(90, dtype=torch.float64), torch.zeros(90)
    for item, (start, end) in enumerate(itertools.pairwise(wrong)):
        if 0 <= start <= end <= 90 and end - start <= 70:
            expected[start:end] = oracle.scores(query[item : item + 1], key[None, start:end])[0]
            items[start:end] += 1
    assert oracle.error(got.cpu()[items <= 1], expected[items <= 1]) < ATOL


@pytest.mark.filterwarnings("ignore:STS_KERNELS_CHECK")
@pytest.mark.parametrize("wrong", WRONG, ids=str)
def test_offsets_that_do_not_fit_are_errors_where_read(device, wrong, monkeypatch):
    monkeypatch.setenv("STS_KERNELS_CHECK", "1")
    query, key, _ = packed([90, 0, 0], 4, 2, 64, device=device)
    wrong = torch.tensor(wrong, dtype=torch.int32, device=device)
    with pytest.raises(ValueError, match=r"cu_seqlens must rise from 0 to 90|max_seqlen must be"):
        last_query_scores_varlen(query, key, wrong, 70)


def test_compiles_once_for_every_length(device):
    graphs = []

    def backend(module, example):
        graphs.append(module)
        return module.forward

    torch._dynamo.reset()
    compiled = torch.compile(
        lambda *arguments: last_query_scores_varlen(*arguments) * 2, fullgraph=True, dynamic=True, backend=backend
    )
    for lengths in ([30, 12], [64, 100], [3, 900]):
        arguments = (*packed(lengths, 4, 2, 64, device=device), max(lengths))
        assert torch.equal(compiled(*arguments), last_query_scores_varlen(*arguments) * 2)
    assert len(graphs) == 1


def test_cuda_graph_and_no_sync(cuda):
    """Offsets may change between replays of a CUDA graph, within max_seqlen."""
    query, key, cu_seqlens = packed([60, 400, 40], 8, 2, 128, torch.bfloat16, cuda)
    last_query_scores_varlen(query, key, cu_seqlens, 450)
    graph = torch.cuda.CUDAGraph()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.cuda.graph(graph):
            out = last_query_scores_varlen(query, key, cu_seqlens, 450)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for starts in ([0, 100, 200, 500], [0, 450, 450, 500]):
        cu_seqlens.copy_(torch.tensor(starts))
        graph.replay()
        assert oracle.error(out, brute_force(query, key, starts)) < ATOL


def fails(error, message, *args, **kwargs):
    with pytest.raises(error, match=message):
        last_query_scores_varlen(*args, **kwargs)


def test_errors(device):
    query, key, cu = packed([4, 3], 4, 2, 64, device=device)
    fails(TypeError, "query must be a tensor of shape", 3, key, cu, 4)
    fails(TypeError, "key must have the dtype of query, float32, got bfloat16", query, key.bfloat16(), cu, 4)
    fails(ValueError, r"key must have shape \(T, Hkv, D\), got", query, key[None], cu, 4)
    fails(ValueError, "multiple of the heads of key, got 3 and 2", query[:, :3], key, cu, 4)
    fails(ValueError, "head dimension of query must be at least 1, got 0", query[..., :0], key[..., :0], cu, 4)
    fails(ValueError, "key must be contiguous in its last dimension", query, key.mT.contiguous().mT, cu, 4)
    fails(TypeError, "cu_seqlens must be a tensor of shape", query, key, [0, 4, 7], 4)
    fails(TypeError, "cu_seqlens must be int64, int32, got float32", query, key, cu.float(), 4)
    fails(ValueError, r"cu_seqlens must have shape \(B\+1,\) = \(3,\), got \(2,\)", query, key, cu[1:], 4)
    fails(ValueError, r"cu_seqlens must have shape \(B\+1,\), got", query, key, cu[None], 4)
    fails(TypeError, "max_seqlen must be an int, got float", query, key, cu, 4.0)
    fails(ValueError, "max_seqlen must be at least 0, got -1", query, key, cu, -1)
    fails(
        ValueError,
        "max_seqlen must be between 0 and 9223372036854775807, got 9223372036854775808",
        query,
        key,
        cu,
        2**63,
    )
    fails(ValueError, "scale must be finite in float32, got inf", query, key, cu, 4, float("inf"))
    fails(ValueError, "cu_seqlens must be on the device of query, .*, got meta", query, key, cu.to("meta"), 4)


def test_wrong_values_on_the_cpu():
    query, key, cu = packed([4, 3], 4, 2, 64)
    fails(ValueError, r"max_seqlen must be at least 4, the length of the longest item, got 3", query, key, cu, 3)
    fails(
        ValueError,
        r"cu_seqlens must rise from 0 to 7, the number of keys, got \[0, 4, 6\]",
        query,
        key,
        cu - cu // 7,
        4,
    )
