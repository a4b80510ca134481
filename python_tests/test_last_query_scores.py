"""last_query_scores: float64 brute force, SDPA and transformers, layouts, masks, memory, errors, compilation."""

import os
import runpy
import subprocess
import sys
import textwrap
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import attention_oracle as oracle
import pytest
import torch
from attention_oracle import ATOL, inputs
from torch.nn.functional import scaled_dot_product_attention

from sts_kernels import _registry, last_query_scores

HERE = Path(__file__).parent
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SHAPES = [  # B, S, Hq, Hkv, D: MHA, GQA and MQA; every head size; lengths around the block size
    (1, 1, 4, 4, 64),
    (2, 2, 6, 2, 72),
    (1, 63, 8, 8, 80),
    (2, 65, 7, 1, 96),
    (1, 128, 14, 2, 112),
    (2, 320, 8, 2, 128),
    (1, 577, 12, 12, 128),
    (1, 257, 12, 3, 192),
    (2, 300, 16, 1, 256),
    (1, 2003, 28, 4, 128),
    (1, 500, 34, 2, 64),  # 17 query heads per key head: no power of two, more than a float32 tile holds
    (1, 130, 96, 1, 128),
    (3, 4100, 4, 2, 64),
    *((2, 75, 4, 2, dim) for dim in (1, 2, 8, 16, 32, 33, 48, 100, 160, 257, 512, 576)),
]


def samples(device):
    query, key = inputs(2, 7, 4, 2, 64, device=device)
    mask = oracle.left_padding(2, 7).to(device)
    return [
        (query, key),
        (query.half(), key.half(), 0.5, mask),
        (query.bfloat16(), key.bfloat16().transpose(0, 1).contiguous().transpose(0, 1), None, mask.T.contiguous().T),
        (query[:0], key[:0]),
    ]


def sized(step, device):
    batch, keys, heads, kv_heads, dim = 2 + step, 11 + 6 * step, (2 + step) * (3 + step), 2 + step, 7 + step
    query, key = inputs(batch, keys, heads, kv_heads, dim, device=device, seed=step)
    mask = torch.rand(batch, keys, generator=torch.Generator().manual_seed(step)) < 0.75
    return {"query": query, "key": key, "scale": 0.3, "key_mask": mask.to(device)}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equals_float64(device, shape, dtype):
    query, key = inputs(*shape, dtype, device)
    got = last_query_scores(query, key)
    assert oracle.error(got, oracle.scores(query, key)) < ATOL
    assert (got.sum(1) - 1).abs().max() < 1e-5


@pytest.mark.parametrize("scale", [0.0, 0.02, 0.4, -0.3, 1])
def test_scale(device, scale):
    query, key = inputs(2, 333, 8, 2, 128, torch.bfloat16, device)
    assert oracle.error(last_query_scores(query, key, scale), oracle.scores(query, key, scale)) < ATOL


@pytest.mark.parametrize("shape", [(3, 40, 4, 4, 64), (2, 700, 8, 2, 128)], ids=str)
@pytest.mark.parametrize("make", [oracle.left_padding, oracle.holes])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_key_mask(device, shape, make, dtype):
    query, key = inputs(*shape, dtype, device)
    mask = make(*shape[:2]).to(device)
    key[~mask] = float("nan")  # masked keys must not matter: padding often holds garbage
    key[~mask & (torch.arange(shape[1], device=device) % 2 == 0)] = float("inf")
    got = last_query_scores(query, key, None, mask)
    assert oracle.error(got, oracle.scores(query, key, None, mask)) < ATOL
    assert (got[~mask] == 0).all()


def test_a_row_without_allowed_keys_is_zero(device):
    query, key = inputs(3, 50, 4, 2, 64, device=device)
    mask = torch.ones(3, 50, dtype=torch.bool, device=device)
    mask[1] = False
    got = last_query_scores(query, key, None, mask)
    assert (got[1] == 0).all()
    assert torch.equal(got[::2], last_query_scores(query, key, None, torch.ones_like(mask))[::2])


@pytest.mark.parametrize("keys", [40, 700])
def test_nan_stays_in_its_row(device, keys):
    query, key = inputs(3, keys, 4, 2, 64, device=device)
    clean = last_query_scores(query, key)
    mask = torch.ones(3, keys, dtype=torch.bool, device=device)
    mask[1, 3] = False
    key[1, 5, 0, 7] = float("nan")
    got = last_query_scores(query, key, None, mask)
    assert got[1, 3] == 0
    assert got[1, mask[1]].isnan().all()
    assert oracle.error(got[::2], clean[::2].cpu().double()) < ATOL


def layouts(key):
    """The same keys in other memory layouts."""
    batch, keys, kv_heads, dim = key.shape
    wide = torch.full((batch, keys, kv_heads, 3 * dim), float("nan"), dtype=key.dtype, device=key.device)
    wide[..., dim : 2 * dim] = key
    odd = torch.full((key.numel() + 1,), float("nan"), dtype=key.dtype, device=key.device)
    odd[1:] = key.flatten()
    longer = torch.full((batch, keys + 5, kv_heads + 1, dim), float("nan"), dtype=key.dtype, device=key.device)
    longer[:, 2:-3, 1:] = key
    return {
        "Hugging Face cache": key.transpose(1, 2).contiguous().transpose(1, 2),
        "keys first": key.transpose(0, 1).contiguous().transpose(0, 1),
        "heads first": key.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3),
        "part of a fused projection": wide[..., dim : 2 * dim],
        "not aligned": odd[1:].view_as(key),
        "part of a longer cache": longer[:, 2:-3, 1:],
    }


@pytest.mark.parametrize("layout", layouts(torch.zeros(1, 1, 1, 1)))
@pytest.mark.parametrize("shape", [(2, 60, 4, 2, 72), (2, 400, 6, 3, 128)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layouts(device, layout, shape, dtype):
    query, key = inputs(*shape, dtype, device)
    expected = oracle.scores(query, key)
    view = layouts(key)[layout]
    assert oracle.error(last_query_scores(query, view), expected) < ATOL
    strided = torch.stack([query, -query], dim=2).flatten(1, 2)[:, ::2]
    mask = torch.ones(*shape[1::-1], dtype=torch.bool, device=device).T
    assert oracle.error(last_query_scores(strided, view, None, mask), expected) < ATOL
    every_other = last_query_scores(query, view[:, ::2])
    assert oracle.error(every_other, oracle.scores(query, key[:, ::2])) < ATOL


def test_one_key_for_all(device):
    """One key expanded over S (stride 0) gets equal weights."""
    query, key = inputs(2, 1, 4, 2, 64, device=device)
    got = last_query_scores(query, key.expand(2, 300, 2, 64))
    torch.testing.assert_close(got, torch.full_like(got, 1 / 300), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_longest(device, dtype):
    query, key = inputs(1, 131072, 4, 1, 64, dtype, device)
    mask = torch.rand(1, 131072, generator=torch.Generator().manual_seed(2)).to(device) > 0.1
    assert oracle.error(last_query_scores(query, key), oracle.scores(query, key)) < 1e-8
    got = last_query_scores(query, key * 4, None, mask)
    assert oracle.error(got, oracle.scores(query, key * 4, None, mask)) < ATOL


@pytest.mark.parametrize("strides", [(2**31 + 72, 64), (320 * 64, 2**25 + 8), (64, 2**26)], ids=str)
def test_offsets_beyond_int32(device, strides):
    """Items, or the tokens of an item, lie more than 2^31 elements apart."""
    query, key = inputs(2, 80, 2, 1, 64, torch.float16, device)
    far = torch.empty(80 * strides[1] + strides[0] + 64, dtype=torch.float16, device=device)
    view = far.as_strided(key.shape, (*strides, 64, 1))
    view.copy_(key)
    assert oracle.error(last_query_scores(query, view), oracle.scores(query, key)) < ATOL


def test_same_bits_again_and_in_any_batch(device):
    for shape in [(4, 64, 8, 2, 64), (4, 3001, 8, 2, 128)]:
        query, key = inputs(*shape, torch.bfloat16, device)
        mask = oracle.holes(*shape[:2]).to(device)
        got = last_query_scores(query, key, None, mask)
        assert all(torch.equal(got, last_query_scores(query, key, None, mask)) for _ in range(5))
        for b in range(4):
            assert torch.equal(
                got[b : b + 1], last_query_scores(query[b : b + 1], key[b : b + 1], None, mask[b : b + 1])
            )


def test_empty_batch(device):
    query, key = inputs(0, 5, 4, 2, 64, device=device)
    assert last_query_scores(query, key).shape == (0, 5)


# ---- Other implementations of attention --------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_equals_sdpa_with_one_hot_values(device, dtype):
    """SDPA with the identity as values returns the attention weights."""
    query, key = inputs(2, 48, 6, 2, 96, dtype, device)
    mask = oracle.left_padding(2, 48).to(device)
    mask[1, 30:] = True
    one_hot = torch.eye(48, device=device).expand(2, 6, 48, 48)
    keys = key.float().transpose(1, 2).repeat_interleave(3, 1)
    weights = scaled_dot_product_attention(query.float()[:, :, None], keys, one_hot, mask[:, None, None])
    torch.testing.assert_close(last_query_scores(query, key, None, mask), weights[:, :, 0].mean(1), rtol=0, atol=ATOL)


def tiny_llama(transformers):
    config = transformers.LlamaConfig(
        vocab_size=97, hidden_size=512, intermediate_size=64, num_hidden_layers=2, num_attention_heads=8,
        num_key_value_heads=2, max_position_embeddings=128, attn_implementation="eager",
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def tiny_qwen2(transformers):
    config = transformers.Qwen2Config(
        vocab_size=97, hidden_size=384, intermediate_size=64, num_hidden_layers=2, num_attention_heads=6,
        num_key_value_heads=6, max_position_embeddings=128, attn_implementation="eager",
    )  # fmt: skip
    return transformers.Qwen2ForCausalLM(config).eval()


@pytest.mark.parametrize("build", [tiny_llama, tiny_qwen2])
def test_equals_transformers_eager_attention(device, build):
    """Scores from the KV cache equal the last row of the model's weights, mean over heads, with left padding."""
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    from transformers.models.llama.modeling_llama import rotate_half

    torch.manual_seed(0)
    model = build(transformers).to(device)
    with torch.no_grad():  # initial weights (std 0.02) would make all scores equal
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight.mul_(8)
            layer.self_attn.k_proj.weight.mul_(8)
    tokens = torch.randint(97, (3, 21), device=device)
    mask = torch.arange(21, device=device) >= torch.tensor([[0], [4], [13]], device=device)
    rotary = {}
    model.model.rotary_emb.register_forward_hook(lambda module, args, out: rotary.update(cos=out[0], sin=out[1]))
    queries = []
    for layer in model.model.layers:
        layer.self_attn.q_proj.register_forward_hook(lambda module, args, out: queries.append(out[:, -1]))
    with torch.no_grad():
        out = model(
            tokens, attention_mask=mask.long(), position_ids=(mask.cumsum(1) - 1).clamp(min=0), output_attentions=True
        )
    cos, sin = rotary["cos"][:, -1:], rotary["sin"][:, -1:]
    for index, projected in enumerate(queries):
        query = projected.view(3, model.config.num_attention_heads, -1)
        query = query * cos + rotate_half(query) * sin
        cache = out[1].layers[index].keys  # out[1]: the KV cache; its name depends on the version
        got = last_query_scores(query, cache.transpose(1, 2), None, mask)
        expected = out.attentions[index][:, :, -1].mean(1)
        assert expected.amax() > 3 * expected[expected > 0].median()  # scores are not uniform
        torch.testing.assert_close(got, expected, rtol=0, atol=ATOL)


# ---- Cost --------------------------------------------------------------------------------------------------------

MEMORY = """
import resource, sys, torch
from sts_kernels import last_query_scores
dtype, hugging_face = getattr(torch, sys.argv[1]), sys.argv[2] == "True"
query, shape = torch.ones(1, 8, 128, dtype=dtype), (1, 65536, 8, 128)
key = torch.ones(1, 8, 65536, 128, dtype=dtype).transpose(1, 2) if hugging_face else torch.ones(shape, dtype=dtype)
last_query_scores(query, key[:, :64])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
last_query_scores(query, key)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 / key.nbytes)
"""


@pytest.mark.parametrize("hugging_face", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_memory_on_the_cpu(dtype, hugging_face):
    """Peak memory grows by a small part of the keys: neither a copy of them nor a float32 version is made."""
    if sys.platform != "linux":
        pytest.skip("reads the peak memory of a process as Linux reports it")
    command = [sys.executable, "-c", MEMORY, dtype, str(hugging_face)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=HERE.parent)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 0.25


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_memory_on_the_gpu(cuda, dtype):
    query, key = torch.ones(1, 8, 128, dtype=dtype, device=cuda), torch.ones(1, 65536, 8, 128, dtype=dtype, device=cuda)
    last_query_scores(query, key)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    last_query_scores(query, key)
    assert torch.cuda.max_memory_allocated() - before < 1.3 * 65536 * (8 + 1) * 4  # logits and scores, in float32


# ---- PyTorch -----------------------------------------------------------------------------------------------------


def test_compiles_once_for_every_length(device):
    graphs = []

    def backend(module, example):
        graphs.append(module)
        return module.forward

    torch._dynamo.reset()
    compiled = torch.compile(lambda q, k, m: last_query_scores(q * 2, k, None, m) + 1, fullgraph=True, backend=backend)
    for keys in (37, 64, 129, 1000):
        query, key = inputs(2, keys, 4, 2, 64, device=device)
        mask = oracle.holes(2, keys).to(device)
        for tensor in (key, mask):
            torch._dynamo.mark_dynamic(tensor, 1)
        assert torch.equal(compiled(query, key, mask), last_query_scores(query * 2, key, None, mask) + 1)
    assert len(graphs) == 1


def test_compiled_by_inductor(device):
    query, key = inputs(2, 50, 4, 2, 64, device=device)
    compiled = torch.compile(lambda q, k: last_query_scores(q * 2, k.transpose(0, 1)) + 1, fullgraph=True)
    got = compiled(query, key.transpose(0, 1).contiguous())
    torch.testing.assert_close(got, last_query_scores(query * 2, key) + 1, rtol=0, atol=ATOL)


def test_cuda_graph(cuda):
    for keys in (40, 5000):
        query, key = inputs(2, keys, 8, 2, 128, torch.bfloat16, cuda)
        mask = oracle.holes(2, keys).to(cuda)
        last_query_scores(query, key, None, mask)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = last_query_scores(query, key, None, mask)
        for seed in (1, 2):
            new_query, new_key = inputs(2, keys, 8, 2, 128, torch.bfloat16, cuda, seed)
            query.copy_(new_query)
            key.copy_(new_key)
            graph.replay()
            assert torch.equal(out, last_query_scores(query, key, None, mask))


def test_other_stream(cuda):
    """The kernels run on the current stream, in order with the work before and after them."""
    query, key = inputs(1, 20000, 8, 2, 128, torch.bfloat16, cuda)
    expected = last_query_scores(query, key)
    late, stream = torch.zeros_like(key), torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        late.copy_(key)
        got = last_query_scores(query, late).clone()
    stream.synchronize()
    assert torch.equal(got, expected)


def test_second_gpu(cuda):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    query, key = inputs(1, 5000, 8, 2, 128, torch.bfloat16, "cuda:1")
    assert oracle.error(last_query_scores(query, key), oracle.scores(query, key)) < ATOL
    assert torch.cuda.current_device() == 0


def test_backends():
    op = _registry.OPS["last_query_scores"]
    assert op.backend("CPU") == "reference"
    assert op.backend("CUDA") == ("triton" if find_spec("triton") else "reference")


def test_import_leaves_triton_alone():
    code = "import sys, sts_kernels; assert not {'triton', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=HERE.parent)


def test_example(capsys):
    """The example checks itself against the full attention matrix and the varlen op."""
    runpy.run_path(str(HERE.parent / "examples" / "last_query_scores.py"), run_name="__main__")
    assert capsys.readouterr().out.count("stay, with") == 2


# ---- Triton without a GPU ----------------------------------------------------------------------------------------


def pytest_in_its_own_process(module, *arguments, **environment):
    """Runs the tests of `module` in their own process: Triton reads TRITON_INTERPRET at import."""
    if find_spec("triton") is None:
        pytest.skip("needs triton")
    if environment.get("TRITON_INTERPRET") == "1":
        triton, numpy = (tuple(map(int, version(name).split(".")[:2])) for name in ("triton", "numpy"))
        if triton < (3, 9) and numpy >= (2, 4):
            pytest.skip("Triton before 3.9 cannot interpret loops with NumPy 2.4 or newer")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments, str(HERE / module)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout, done.stdout


def test_kernels_in_the_interpreter():
    pytest_in_its_own_process("last_query_scores_interpreted.py", TRITON_INTERPRET="1")


@pytest.mark.parametrize(
    "which", ["not slow", pytest.param("slow", marks=[pytest.mark.slow, pytest.mark.timeout(900)])]
)
def test_kernels_compile_without_spills(which):
    pytest_in_its_own_process("last_query_scores_compiled.py", "-m", which, TRITON_INTERPRET="0")


# ---- Errors ------------------------------------------------------------------------------------------------------


def fails(error, message, *args, **kwargs):
    with pytest.raises(error, match=message):
        last_query_scores(*args, **kwargs)


def test_errors(device):
    query, key = inputs(2, 7, 4, 2, 64, device=device)
    mask = torch.ones(2, 7, dtype=torch.bool, device=device)
    fails(TypeError, "query must be a tensor of shape", 3, key)
    fails(TypeError, "query must be float32, float16, bfloat16, got float64", query.double(), key.double())
    fails(TypeError, "key must have the dtype of query, float32, got float16", query, key.half())
    fails(ValueError, r"query must have shape \(B, Hq, D\), got", query[0], key)
    fails(ValueError, r"key must have shape \(B, S, Hkv, D\), got", query, key[0])
    fails(ValueError, "key must have the batch size of query, 2, got 1", query, key[:1])
    fails(ValueError, "multiple of the heads of key, got 3 and 2", query[:, :3], key)
    fails(ValueError, "multiple of the heads of key, got 4 and 0", query, key[:, :, :0])
    fails(ValueError, "multiple of the heads of key, got 0 and 2", query[:, :0], key)
    fails(ValueError, "head dimension of query must be at least 1, got 0", query[..., :0], key[..., :0])
    fails(ValueError, "key must have the head dimension of query, 64, got 32", query, key[..., :32])
    fails(ValueError, r"at least one position, got shape \(2, 0, 2, 64\)", query, key[:, :0])
    fails(ValueError, "query must be contiguous in its last dimension", query.mT.contiguous().mT, key)
    fails(ValueError, "key must be contiguous in its last dimension, got strides", query, key.mT.contiguous().mT)
    fails(TypeError, "key_mask must be bool, got int64", query, key, None, mask.long())
    fails(ValueError, r"key_mask must have shape \(B, S\), got", query, key, None, mask[0])
    fails(ValueError, r"key_mask must have shape \(B, S\) = \(2, 7\), got \(2, 6\)", query, key, None, mask[:, 1:])
    for scale in (float("nan"), float("inf"), 1e39, 10**400):
        fails(ValueError, "scale must be finite in float32, got", query, key, scale)
    other = torch.device("meta")
    fails(ValueError, "key must be on the device of query, .*, got meta", query, key.to(other))
    fails(ValueError, "key_mask must be on the device of query, .*, got meta", query, key, None, mask.to(other))


def test_errors_while_compiling(device):
    query, key = inputs(1, 7, 3, 2, 64, device=device)
    with pytest.raises(Exception, match="multiple of the heads of key"):
        torch.compile(last_query_scores, fullgraph=True, backend="eager")(query, key)


def test_warns_on_the_reference():
    """Without Triton, CUDA tensors fall back to the reference, and say so."""
    code = textwrap.dedent("""
        import importlib.util
        find_spec = importlib.util.find_spec
        importlib.util.find_spec = lambda name, *args: None if name == "triton" else find_spec(name, *args)
        from sts_kernels import _registry
        for name in ("last_query_scores", "last_query_scores_varlen"):
            op = _registry.OPS[name]
            assert (op.backend("CUDA"), op.why("CUDA")) == ("reference", "triton is not installed")
    """)
    subprocess.run([sys.executable, "-c", code], check=True, cwd=HERE.parent)
