"""nearest against its contract."""

import importlib
import math

import oracle
import pytest
import torch
from cases import CASES, by_name, duplicates, normal, with_dtypes

import sts_kernels

OP = "nearest"
METRICS = ("cosine", "euclidean")
SMALL = [case for case in CASES if case.batch * case.tokens**2 * case.channels <= 30e6]


def samples(device):
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(2, 9, 5, generator=rng).to(device)
    rank = torch.randn(2, 9, generator=rng).to(device)
    count = torch.tensor([4, 0], dtype=torch.int32, device=device)
    return [
        (x, x),
        (x.half(), x[:, ::2].half(), "euclidean"),
        (x[:, :4], x[:, :, :], "cosine", rank[:, :4], rank.double(), True),
        (x.bfloat16(), x.transpose(0, 1).bfloat16()[:2].expand(2, 2, 5), "euclidean", None, None, True),
        (x, x, "cosine", (rank * 3).long(), rank, False, count),
        (x[:0], x[:0]),
    ]


def sized(step, device):
    batch, rows, keys, channels = 2 + step, 7 + 5 * step, 11 + 6 * step, 5 + 2 * step
    rng = torch.Generator().manual_seed(step)
    return {
        "query": torch.randn(batch, rows, channels, generator=rng).to(device),
        "key": torch.randn(batch, keys, channels, generator=rng).to(device),
        "metric": "euclidean",
        "query_rank": torch.randn(batch, rows, generator=rng).to(device),
        "key_rank": torch.randint(-1, 2, (batch, keys), generator=rng).to(device),
        "exclude_self": True,
        "num_keys": torch.randint(3, keys + 1, (batch,), generator=rng).to(device),
    }


def arguments(case, dtype, device, seed=1):
    """Keys of `case`; queries from the same distribution, and every third key."""
    key = case.features(seed, dtype, device)
    query = torch.cat([case.features(seed + 1, dtype, device)[:, : case.tokens // 2 + 1], key[:, ::3]], 1)
    num_keys = None if case.num_tokens is None else torch.tensor(case.num_tokens, device=device)
    return query, key, num_keys


def ranks(rng, query, key):
    """Few distinct values, so many ranks tie."""
    return [torch.randint(0, 5, x.shape[:2], generator=rng).to(x.device) for x in (query, key)]


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(("case", "dtype"), with_dtypes(SMALL))
def test_values(backend, case, dtype, metric):
    query, key, num_keys = arguments(case, dtype, backend.device)
    before = query.clone(), key.clone()
    rng = torch.Generator().manual_seed(7)
    for options in (
        {"num_keys": num_keys},
        {"exclude_self": True},
        dict(zip(("query_rank", "key_rank"), ranks(rng, query, key), strict=True)),
    ):
        got = backend(OP, query, key, metric, **options)
        oracle.check_nearest(*got, query, key, metric, **options)
    for given, kept in zip((query, key), before, strict=True):
        torch.testing.assert_close(given, kept, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_a_set_with_itself(backend, metric, dtype):
    """The queries are the keys, with ranks, exclude_self and num_keys, as in a search for duplicates."""
    x = by_name("duplicates").features(seed=3, dtype=dtype, device=backend.device)
    rank = torch.randn(x.shape[:2], generator=torch.Generator().manual_seed(1)).to(x.device)
    num_keys = torch.tensor([130, 77], device=x.device)
    got = backend(OP, x, x, metric, rank, rank, True, num_keys)
    oracle.check_nearest(*got, x, x, metric, rank, rank, True, num_keys)
    index, value = backend(OP, x, x, metric)
    assert (index <= torch.arange(130, device=x.device)).all()
    if metric == "euclidean":
        assert (value == 0).all()
    strided = x.mT.contiguous().mT  # a layout that kernels copy
    for got, want in zip(backend(OP, strided, strided, metric), (index, value), strict=True):
        assert torch.equal(got, want)


def test_known_values(backend):
    query = torch.tensor([[[1.0, 0.0], [0.0, 0.0], [-2.0, -2.0]]], device=backend.device)
    key = torch.tensor([[[3.0, 4.0], [0.0, 0.0], [1.0, 0.0], [2.0, 0.0]]], device=backend.device)
    index, value = backend(OP, query, key)
    assert index.tolist() == [[2, 0, 1]]  # cosine 1 with keys 2 and 3; 0 with all keys; 0 with the zero row, else < 0
    assert value.tolist() == [[1, 0, 0]]
    index, value = backend(OP, query, key, "euclidean")
    assert index.tolist() == [[2, 1, 1]]
    assert value.tolist() == [[0, 0, 8]]


def test_ranks_are_compared_exactly(backend):
    """Integers that float32 rounds to one value, and NaN, which is neither below nor above any rank."""
    x = torch.ones(1, 1, 3, device=backend.device)
    key = x.expand(1, 3, 3).contiguous()
    rank = lambda *values, dtype=torch.int64: torch.tensor([values], dtype=dtype, device=backend.device)  # noqa: E731
    assert backend(OP, x, key, query_rank=rank(2**40 + 1), key_rank=rank(2**40 + 1, 2**40 + 2, 2**40))[0].item() == 2
    nan = rank(math.nan, math.nan, 0.5, dtype=torch.float32)
    assert backend(OP, x, key, query_rank=rank(1), key_rank=nan)[0].item() == 2
    assert backend(OP, x, key, query_rank=nan[:, :1], key_rank=rank(1, 2, 3))[0].item() == -1


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_not_finite_matches_nothing(backend, metric, value):
    x = normal(torch.Generator().manual_seed(0), 2, 70, 65).to(backend.device)
    spoiled = x.clone()
    spoiled[1, 33, 64] = value
    index, values = backend(OP, spoiled, x, metric)
    want, want_values = backend(OP, x, x, metric)
    want[1, 33] = -1
    want_values[1, 33] = -math.inf if metric == "cosine" else math.inf
    assert torch.equal(index, want)
    assert torch.equal(values, want_values)
    index, _ = backend(OP, x, spoiled, metric)
    assert index[1, 33] not in (-1, 33)
    oracle.check_nearest(*backend(OP, spoiled, spoiled, metric), spoiled, spoiled, metric)


def test_distances_out_of_range_are_infinite_and_matched(backend):
    query = torch.tensor([3e38, 0.0], device=backend.device)[None, :, None]
    key = torch.tensor([math.nan, -3e38, -2e38], device=backend.device)[None, :, None]
    index, value = backend(OP, query, key, "euclidean")
    assert index.tolist() == [[1, 1]]
    assert value.tolist() == [[math.inf, math.inf]]
    index, value = backend(OP, query, key)
    assert index.tolist() == [[1, 1]]
    assert value.tolist() == [[-1, 0]]


@pytest.mark.parametrize("scale", [2.0**-140, 2.0**-60, 2.0**60, 2.0**120])
def test_cosine_does_not_depend_on_the_scale(backend, scale):
    x = normal(torch.Generator().manual_seed(0), 1, 40, 33)
    x = (x * 2**8).round() / 2**8  # so that scaling rounds nothing
    _, value = backend(OP, x.to(backend.device), x.to(backend.device), exclude_self=True)
    scaled = (x * scale).to(backend.device)
    for got in (
        backend(OP, scaled, x.to(backend.device), exclude_self=True),
        backend(OP, scaled, scaled, "cosine", None, None, True),
    ):
        oracle.check_nearest(*got, scaled, scaled, exclude_self=True)
        torch.testing.assert_close(got[1], value, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["5x127x64_k40", "2x257x1000_k33", "near_duplicates", "not_finite_1000", "wide"])
def test_same_input_same_output_whatever_the_batch(backend, name, dtype, metric):
    query, key, _ = arguments(by_name(name), dtype, backend.device)
    first = backend(OP, query, key, metric)
    for _ in range(2):
        assert all(map(torch.equal, backend(OP, query, key, metric), first))
    for b in range(len(key)):
        alone = backend(OP, query[b : b + 1], key[b : b + 1], metric)
        assert all(torch.equal(a[0], f[b]) for a, f in zip(alone, first, strict=True))


@pytest.mark.parametrize("metric", METRICS)
def test_a_row_does_not_depend_on_the_other_rows(backend, metric):
    x = by_name("2x257x1000_k33").features(seed=5, device=backend.device)
    index, value = backend(OP, x, x, metric, exclude_self=False, num_keys=torch.tensor([9, 200], device=x.device))
    part = backend(OP, x[:, 3:20], x[:, :200], metric, num_keys=torch.tensor([9, 200], device=x.device))
    assert torch.equal(part[0], index[:, 3:20])
    if backend.name != "reference":  # the reference rounds a cosine once more, from float64
        assert torch.equal(part[1], value[:, 3:20])


@pytest.mark.parametrize("metric", METRICS)
def test_many_items_and_one_query(backend, metric):
    for batch, rows, keys, channels in ((300, 5, 9, 6), (2, 1, 3000, 3), (1, 3000, 1, 3), (70000, 1, 2, 2)):
        rng = torch.Generator().manual_seed(3)
        query = normal(rng, batch, rows, channels).to(backend.device)
        key = duplicates(rng, batch, keys, channels).to(backend.device)
        got = backend(OP, query, key, metric)
        if batch < 1000:
            oracle.check_nearest(*got, query, key, metric)
        else:
            want = torch.cdist(query.double(), key.double()).argmin(-1) if metric == "euclidean" else None
            assert want is None or torch.equal(got[0], want)


@pytest.mark.parametrize("metric", METRICS)
def test_blocks_of_the_reference(monkeypatch, metric):
    """The result of the reference does not depend on its block size."""
    module = importlib.import_module("sts_kernels.ops.nearest")
    x = normal(torch.Generator().manual_seed(2), 2, 90, 16)
    want = module.nearest_reference(x, x[:, :40], metric)
    for block in (1, 80 * 7, 80 * 64):
        monkeypatch.setattr(module, "BLOCK", block)
        assert all(map(torch.equal, module.nearest_reference(x, x[:, :40], metric), want))


@pytest.mark.parametrize("value", [-1, 10, -(2**31), 2**40])
def test_bad_num_keys_on_cuda_is_no_key(cuda, value):
    x = torch.randn(2, 9, 5, device=cuda)
    for call in (sts_kernels.nearest, torch.ops.sts_kernels.nearest):
        index, values = call(x, x, num_keys=torch.tensor([value, 9], device=cuda))
        assert (index[0] == -1).all()
        assert (values[0] == -math.inf).all()
        assert torch.equal(index[1], torch.arange(9, device=cuda))


def test_on_cuda_nothing_synchronises_and_graphs_replay(cuda):
    x, y = (torch.randn(2, 130, 64, device=cuda) for _ in range(2))
    rank = x[..., 0]

    def call():
        return sts_kernels.nearest(x, y, exclude_self=True) + sts_kernels.nearest(x, x, "euclidean", rank, rank)

    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    x.copy_(y)
    graph.replay()
    assert all(map(torch.equal, captured, call()))


# ---- The gradient of the value -----------------------------------------------------------------------------------


def formula(query, key, index, metric):
    """The value of each pair; 0 where there is no match."""
    row = key.gather(1, index.clamp(min=0)[..., None].expand(-1, -1, key.shape[2]))
    value = torch.cosine_similarity(query, row, -1) if metric == "cosine" else (query - row).square().sum(-1)
    return torch.where(index >= 0, value, 0.0)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_gradient_equals_float64(device, dtype, metric):
    rng = torch.Generator().manual_seed(0)
    query, key = (torch.randn(2, n, 6, generator=rng).to(device, dtype).requires_grad_() for n in (9, 4))
    rank = torch.randint(0, 2, (2, 9), generator=rng).to(device)
    rank[:, 0] = 0  # matched with nothing
    key_rank = torch.zeros(2, 4, device=device)
    index, value = sts_kernels.nearest(query, key, metric, rank, key_rank)
    assert not index.requires_grad
    scale = torch.randn(2, 9, generator=rng).to(device)
    got = torch.autograd.grad((torch.where(index >= 0, value, 0.0) * scale).sum(), (query, key))
    judges = [x.detach().double().requires_grad_() for x in (query, key)]
    want = torch.autograd.grad((formula(*judges, index, metric) * scale.double()).sum(), judges)
    precision = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype]
    for g, w in zip(got, want, strict=True):
        assert g.dtype == dtype
        torch.testing.assert_close(g.double(), w, rtol=precision, atol=precision)


@pytest.mark.parametrize("metric", METRICS)
def test_derivatives_compose(device, metric):
    rng = torch.Generator().manual_seed(2)
    x, y, t = (torch.randn(2, n, 3, generator=rng).to(device) for n in (5, 4, 5))
    index = sts_kernels.nearest(x, y, metric)[0]
    value = lambda x, y: sts_kernels.nearest(x, y, metric)[1]  # noqa: E731
    judge = lambda x, y: formula(x, y, index, metric)  # noqa: E731
    loss = lambda f: lambda x, y: f(x, y).sin().sum()  # noqa: E731
    func = torch.func
    for transformed in (
        lambda f: func.grad(loss(f), 1)(x, y),
        lambda f: func.hessian(loss(f), 1)(x, y),
        lambda f: func.jacrev(func.jacrev(loss(f), 0), 1)(x, y),
        lambda f: func.jacfwd(func.jacfwd(loss(f)))(x, y),
        lambda f: func.jvp(lambda x: f(x, y), (x,), (t,)),
        lambda f: func.grad(lambda x: func.jvp(lambda x: loss(f)(x, y), (x,), (t,))[1])(x),
        lambda f: func.vmap(func.grad(loss(f)), (0, None))(torch.stack([x, x]), y),
    ):
        torch.testing.assert_close(transformed(value), transformed(judge), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("metric", METRICS)
def test_zero_rows_and_no_match_have_no_gradient(device, metric):
    query, key = torch.zeros(1, 2, 3, device=device), torch.zeros(1, 2, 3, device=device)
    query[0, 1] = math.nan
    query.requires_grad_()
    key.requires_grad_()
    index, value = sts_kernels.nearest(query, key, metric)
    assert index.tolist() == [[0, -1]]
    for grad in torch.autograd.grad(value[0, 0] + value[0, 1], (query, key)):
        assert (grad == 0).all()


def test_gradient_is_compiled(device):
    torch._dynamo.reset()
    x = sized(0, device)["key"].requires_grad_()
    call = lambda x: sts_kernels.nearest(x, x, exclude_self=True)[1].sin().sum()  # noqa: E731
    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(torch.autograd.grad(compiled(x), x), torch.autograd.grad(call(x), x))
    torch._dynamo.reset()


# ---- Bad arguments -----------------------------------------------------------------------------------------------


def good():
    return sized(0, "cpu")


BAD = [
    ("query", torch.zeros(2, 7), ValueError, "(2, 7)"),
    ("query", torch.zeros(2, 7, 5, dtype=torch.float64), TypeError, "float64"),
    ("query", torch.zeros(2, 0, 5), ValueError, "(2, 0, 5)"),
    ("query", None, TypeError, "NoneType"),
    ("key", torch.zeros(2, 11, 5, dtype=torch.float16), TypeError, "float16"),
    ("key", torch.zeros(3, 11, 5), ValueError, "(3, 11, 5)"),
    ("key", torch.zeros(2, 11, 6), ValueError, "(2, 11, 6)"),
    ("key", torch.zeros(2, 0, 5), ValueError, "(2, 0, 5)"),
    ("key", [[1.0]], TypeError, "list"),
    ("metric", "manhattan", ValueError, "'manhattan'"),
    ("metric", None, TypeError, "NoneType"),
    ("query_rank", torch.zeros(2, 8), ValueError, "(2, 8)"),
    ("query_rank", torch.zeros(2, 7, dtype=torch.bool), TypeError, "bool"),
    ("query_rank", None, ValueError, "None"),
    ("key_rank", torch.zeros(11), ValueError, "(11,)"),
    ("key_rank", None, ValueError, "None"),
    ("exclude_self", 1, TypeError, "int"),
    ("num_keys", torch.tensor([3]), ValueError, "(1,)"),
    ("num_keys", torch.tensor([3.0, 4.0]), TypeError, "float32"),
    ("num_keys", torch.tensor([3, 12]), ValueError, "12"),
    ("num_keys", torch.tensor([-1, 3]), ValueError, "-1"),
]


@pytest.mark.parametrize(("name", "value", "error", "came"), BAD)
def test_message_names_the_argument_and_what_came(name, value, error, came):
    with pytest.raises(error) as caught:
        sts_kernels.nearest(**{**good(), name: value})
    assert str(caught.value).startswith("nearest: ")
    assert name in str(caught.value)
    assert came in str(caught.value)
    if name == "exclude_self":
        return  # an int is a bool to the dispatcher
    with pytest.raises((RuntimeError, ValueError, TypeError)):
        torch.ops.sts_kernels.nearest(**{**good(), name: value})


@pytest.mark.parametrize("name", ["key", "query_rank", "key_rank", "num_keys"])
def test_tensors_on_different_devices(name):
    arguments = good()
    with pytest.raises(
        ValueError, match=f"nearest: {name} must be on the device of (query|key|features), cpu, got meta"
    ):
        sts_kernels.nearest(**{**arguments, name: arguments[name].to("meta")})
