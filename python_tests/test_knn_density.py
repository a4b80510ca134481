"""knn_density against its contract."""

import math

import oracle
import pytest
import torch
from cases import CASES, by_name, normal, with_dtypes

import sts_kernels

OP = "knn_density"
SMALL = [case for case in CASES if case.batch * case.tokens**2 * case.channels <= 60e6]


def samples(device):
    x = torch.randn(2, 9, 5, generator=torch.Generator().manual_seed(0)).to(device)
    count = torch.tensor([4, 0], dtype=torch.int32, device=device)
    return [
        (x, 3),
        (x.half(), 9),
        (x[:, ::2, 1:], 1, count),
        (x.bfloat16().transpose(0, 1), 2),
        (x[:, :1], 1),
        (x[:0], 2),
    ]


def sized(step, device):
    batch, tokens, channels = 2 + step, 11 + 6 * step, 5 + 2 * step
    rng = torch.Generator().manual_seed(step)
    return {
        "features": torch.randn(batch, tokens, channels, generator=rng).to(device),
        "k": 3 + step,
        "num_tokens": torch.randint(3, tokens + 1, (batch,), generator=rng).to(device),
    }


@pytest.mark.parametrize(("case", "dtype"), with_dtypes(SMALL))
def test_values(backend, case, dtype):
    features = case.features(seed=1, dtype=dtype, device=backend.device)
    before = features.clone()
    num_tokens = None if case.num_tokens is None else torch.tensor(case.num_tokens, device=backend.device)
    for k in {1, min(5, case.tokens), case.k, case.tokens}:
        oracle.check_knn_density(backend(OP, features, k, num_tokens), features, k, num_tokens)
    torch.testing.assert_close(features, before, rtol=0, atol=0, equal_nan=True)


def test_known_values(backend):
    x = torch.tensor([0.0, 1.0, 3.0], device=backend.device)[None, :, None]
    want = [[math.exp(-0.5), math.exp(-0.5), math.exp(-2.0)]]
    torch.testing.assert_close(backend(OP, x, 2).tolist(), want, rtol=1e-6, atol=0)
    assert backend(OP, x, 1).tolist() == [[1, 1, 1]]


def test_ragged_items_know_only_their_own(backend):
    x = normal(torch.Generator().manual_seed(0), 3, 70, 20).to(backend.device)
    counts = torch.tensor([70, 31, 2], device=backend.device)
    padded = torch.where((torch.arange(70, device=x.device) < counts[:, None])[..., None], x, 1e6)
    got = backend(OP, padded, 5, counts)
    oracle.check_knn_density(got, padded, 5, counts)
    for b, count in enumerate(counts.tolist()):
        torch.testing.assert_close(
            got[b, :count], backend(OP, x[b : b + 1, :count], min(5, count))[0], rtol=1e-6, atol=0
        )


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_not_finite_is_nowhere(backend, value):
    x = normal(torch.Generator().manual_seed(0), 2, 70, 65).to(backend.device)
    x[1, 33, 64] = value
    got = backend(OP, x, 6)
    assert got[1, 33] == 0
    others = torch.arange(70, device=x.device) != 33
    torch.testing.assert_close(got[1, others], backend(OP, x[1:, others], 6)[0], rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["5x127x64_k40", "2x257x1000_k33", "near_duplicates", "not_finite_1000", "wide"])
def test_same_input_same_output_whatever_the_batch(backend, name, dtype):
    case = by_name(name)
    features = case.features(seed=2, dtype=dtype, device=backend.device)
    first = backend(OP, features, case.k)
    for _ in range(2):
        assert torch.equal(backend(OP, features, case.k), first)
    for b in range(features.shape[0]):
        assert torch.equal(backend(OP, features[b : b + 1], case.k)[0], first[b])


def test_sizes(backend):
    rng = torch.Generator().manual_seed(3)
    for batch, tokens, channels, k in ((300, 9, 5, 4), (1, 3000, 3, 64), (1, 700, 2, 700), (1, 9001, 2, 3)):
        features = normal(rng, batch, tokens, channels).to(backend.device)
        if backend.name == "reference" and tokens > 5000:
            continue
        oracle.check_knn_density(backend(OP, features, k), features, k)


@pytest.mark.parametrize("value", [-1, 10, -(2**31), 2**40])
def test_bad_num_tokens_on_cuda_is_no_token(cuda, value):
    x = torch.randn(2, 9, 5, device=cuda)
    want = sts_kernels.knn_density(x, 3)
    for call in (sts_kernels.knn_density, torch.ops.sts_kernels.knn_density):
        got = call(x, 3, torch.tensor([value, 9], device=cuda))
        assert (got[0] == 0).all()
        assert torch.equal(got[1], want[1])


def test_on_cuda_nothing_synchronises_and_graphs_replay(cuda):
    features = torch.randn(2, 130, 64, device=cuda)
    torch.cuda.set_sync_debug_mode("error")
    try:
        sts_kernels.knn_density(features, 5)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        sts_kernels.knn_density(features, 5)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = sts_kernels.knn_density(features, 5)
    features.copy_(features.flip(1) * 0.5)
    graph.replay()
    assert torch.equal(captured, sts_kernels.knn_density(features, 5))


BAD = [
    ("features", torch.zeros(2, 11), ValueError, "(2, 11)"),
    ("features", torch.zeros(2, 11, 5, dtype=torch.float64), TypeError, "float64"),
    ("features", torch.zeros(2, 0, 5), ValueError, "(2, 0, 5)"),
    ("k", 0, ValueError, "0"),
    ("k", 12, ValueError, "12"),
    ("k", 2.0, TypeError, "float"),
    ("k", None, TypeError, "NoneType"),
    ("num_tokens", torch.tensor([3]), ValueError, "(1,)"),
    ("num_tokens", torch.tensor([3.0, 4.0]), TypeError, "float32"),
    ("num_tokens", torch.tensor([3, 12]), ValueError, "12"),
    ("num_tokens", torch.tensor([-1, 3]), ValueError, "-1"),
]


@pytest.mark.parametrize(("name", "value", "error", "came"), BAD)
def test_message_names_the_argument_and_what_came(name, value, error, came):
    arguments = {**sized(0, "cpu"), name: value}
    with pytest.raises(error) as caught:
        sts_kernels.knn_density(**arguments)
    assert str(caught.value).startswith("knn_density: ")
    assert name in str(caught.value)
    assert came in str(caught.value)
    with pytest.raises((RuntimeError, ValueError, TypeError)):
        torch.ops.sts_kernels.knn_density(**arguments)


def test_tensors_on_different_devices():
    arguments = sized(0, "cpu")
    arguments["num_tokens"] = arguments["num_tokens"].to("meta")
    with pytest.raises(ValueError, match="knn_density: num_tokens must be on the device of features, cpu, got meta"):
        sts_kernels.knn_density(**arguments)
