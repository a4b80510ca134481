"""scatter_mean against its contract."""

import math

import oracle
import pytest
import torch
from cases import CASES, by_name, normal, with_dtypes

import sts_kernels

OP = "scatter_mean"
SMALL = [case for case in CASES if case.batch * case.tokens * case.channels <= 1e6]


def samples(device):
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(2, 9, 5, generator=rng).to(device)
    slot = torch.randint(-1, 4, (2, 9), generator=rng).to(device)
    weight = torch.rand(2, 9, generator=rng).to(device)
    return [
        (x, slot, 4),
        (x.half(), slot.int(), 7, weight),
        (x[:, ::2, 1:], slot[:, ::2], 4, weight[:, ::2].bfloat16()),
        (x.bfloat16().transpose(0, 1), slot.T, 4),
        (x[:, :1], slot[:, :1], 4),
        (x[:0], slot[:0], 4),
    ]


def sized(step, device):
    batch, tokens, channels, count = 2 + step, 11 + 6 * step, 5 + 2 * step, 3 + step
    rng = torch.Generator().manual_seed(step)
    return {
        "features": torch.randn(batch, tokens, channels, generator=rng).to(device),
        "assignment": torch.randint(-1, 3, (batch, tokens), generator=rng).to(device),
        "count": count,
        "weight": torch.rand(batch, tokens, generator=rng).to(device),
    }


def arguments(case, dtype, device, seed=1):
    rng = torch.Generator().manual_seed(seed)
    size = case.batch, case.tokens
    slot = torch.randint(-1, case.k, size, generator=rng)
    slot[:, 1::2] = torch.where(slot[:, 1::2] >= 0, 0, -1)  # a large slot, and some that stay empty
    weight = torch.rand(size, generator=rng) * (torch.rand(size, generator=rng) < 0.8)
    return case.features(seed, dtype, device), slot.to(device), case.k, weight.to(device)


@pytest.mark.parametrize(("case", "dtype"), with_dtypes(SMALL))
def test_values(backend, case, dtype):
    features, slot, count, weight = arguments(case, dtype, backend.device)
    before = features.clone()
    for w in (None, weight, weight.to(dtype)):
        oracle.check_scatter_mean(*backend(OP, features, slot, count, w), features, slot, count, w)
    oracle.check_scatter_mean(*backend(OP, features, slot.int(), count), features, slot, count)
    torch.testing.assert_close(features, before, rtol=0, atol=0, equal_nan=True)


def test_known_values(backend):
    x = torch.tensor([[1.0, 2.0], [3.0, 6.0], [9.0, 9.0], [5.0, 0.0]], device=backend.device)[None]
    slot = torch.tensor([[2, 2, -1, 0]], device=backend.device)
    mean, mass = backend(OP, x, slot, 4)
    assert mean.tolist() == [[[5, 0], [0, 0], [2, 4], [0, 0]]]
    assert mass.tolist() == [[1, 0, 2, 0]]
    mean, mass = backend(OP, x, slot, 4, torch.tensor([[3.0, 1.0, 1.0, 0.0]], device=backend.device))
    assert mean.tolist() == [[[0, 0], [0, 0], [1.5, 3], [0, 0]]]
    assert mass.tolist() == [[0, 0, 4, 0]]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_not_finite_counts_as_dropped(backend, value):
    features, slot, count, weight = arguments(by_name("2x257x1000_k33"), torch.float32, backend.device)
    slot[1, 33] = 5
    dropped = slot.clone()
    dropped[1, 33] = -1
    want = backend(OP, features, dropped, count, weight)
    spoiled = features.clone()
    spoiled[1, 33, 999] = value
    assert all(map(torch.equal, backend(OP, spoiled, slot, count, weight), want))
    spoiled = weight.clone()
    spoiled[1, 33] = value
    assert all(map(torch.equal, backend(OP, features, slot, count, spoiled), want))


def test_sums_are_float64(backend):
    """A mean of +-2^26 and ones, which float32 sums would lose, is right to the last bit."""
    features = torch.ones(1, 3000, 3, device=backend.device)
    features[0, 0], features[0, 1] = 2.0**26, -(2.0**26)
    slot = torch.zeros(1, 3000, dtype=torch.int64, device=backend.device)
    mean, mass = backend(OP, features, slot, 1)
    assert torch.equal(mean, torch.tensor(2998 / 3000, device=backend.device).expand(1, 1, 3))
    assert mass.item() == 3000


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "name", ["5x127x64_k40", "2x257x1000_k33", "common_offset", "not_finite_1000", "channel_slice"]
)
def test_same_input_same_output_whatever_the_batch(backend, name, dtype):
    features, slot, count, weight = arguments(by_name(name), dtype, backend.device)
    first = backend(OP, features, slot, count, weight)
    for _ in range(2):
        assert all(map(torch.equal, backend(OP, features, slot, count, weight), first))
    for b in range(len(features)):
        alone = backend(OP, features[b : b + 1], slot[b : b + 1], count, weight[b : b + 1])
        assert all(torch.equal(a[0], f[b]) for a, f in zip(alone, first, strict=True))


def test_sizes(backend):
    rng = torch.Generator().manual_seed(3)
    for batch, tokens, channels, count in ((300, 5, 6, 9), (1, 3000, 2, 1), (1, 3, 5, 2000), (70000, 1, 2, 1)):
        features = normal(rng, batch, tokens, channels).to(backend.device)
        slot = torch.randint(-1, count, (batch, tokens), generator=rng).to(backend.device)
        got = backend(OP, features, slot, count)
        if batch < 1000:
            oracle.check_scatter_mean(*got, features, slot, count)
        else:
            assert torch.equal(got[0], torch.where(slot[..., None] == 0, features, 0))


def test_strided_assignment_and_weight(backend):
    features, slot, count, weight = arguments(by_name("5x127x64_k40"), torch.float32, backend.device)
    want = backend(OP, features, slot, count, weight)
    woven = [torch.stack([t, t], -1)[..., 0] for t in (slot, weight)]
    assert all(map(torch.equal, backend(OP, features, woven[0], count, woven[1]), want))
    columns = [t.T.contiguous().T for t in (slot, weight)]
    assert all(map(torch.equal, backend(OP, features, columns[0], count, columns[1]), want))


@pytest.mark.parametrize("value", [-2, 4, -(2**63), 2**63 - 1, 2**32])
def test_bad_assignment_on_cuda_is_dropped(cuda, value):
    features = torch.randn(1, 9, 5, device=cuda)
    slot = torch.arange(9, device=cuda)[None] % 4
    dropped, bad = slot.clone(), slot.clone()
    dropped[0, 3], bad[0, 3] = -1, value
    want = sts_kernels.scatter_mean(features, dropped, 4)
    for call in (sts_kernels.scatter_mean, torch.ops.sts_kernels.scatter_mean):
        assert all(map(torch.equal, call(features, bad, 4), want))


def test_on_cuda_nothing_synchronises_and_graphs_replay(cuda):
    features, slot, count, weight = arguments(by_name("5x127x64_k40"), torch.float32, cuda)
    call = lambda: sts_kernels.scatter_mean(features, slot, count, weight)  # noqa: E731
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
    features.copy_(features.flip(1))
    slot.copy_(slot.roll(1, 1))
    graph.replay()
    assert all(map(torch.equal, captured, call()))


# ---- The gradient ------------------------------------------------------------------------------------------------


def formula(features, weight, slot, count):
    one_hot = (slot[:, None] == torch.arange(count, device=slot.device)[:, None]) * weight[:, None]
    mass = one_hot.sum(-1)
    return one_hot @ features / torch.where(mass > 0, mass, 1.0)[..., None], mass


def inputs(device, dtype=torch.float32, seed=0):
    rng = torch.Generator().manual_seed(seed)
    features, weight = torch.randn(2, 9, 4, generator=rng), 0.1 + torch.rand(2, 9, generator=rng)
    slot = torch.randint(-1, 3, (2, 9), generator=rng)
    return features.to(device, dtype), weight.to(device, dtype), slot.to(device), 4  # slot 3 stays empty


def loss(mean, mass):
    return mean.sin().sum() + mass.square().sum()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_gradient_equals_float64(device, dtype):
    features, weight, slot, count = inputs(device, dtype)
    judges = [t.double().requires_grad_() for t in (features, weight)]
    want = torch.autograd.grad(loss(*formula(*judges, slot, count)), judges)
    features.requires_grad_()
    weight.requires_grad_()
    got = torch.autograd.grad(loss(*sts_kernels.scatter_mean(features, slot, count, weight)), (features, weight))
    precision = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]
    for g, w in zip(got, want, strict=True):
        assert g.dtype == dtype
        torch.testing.assert_close(g.double(), w, rtol=precision, atol=precision)


def test_derivatives_compose(device):
    features, weight, slot, count = inputs(device)
    turned = features.flip(1)
    mine = lambda x, w: loss(*sts_kernels.scatter_mean(x, slot, count, w))  # noqa: E731
    judge = lambda x, w: loss(*formula(x, w, slot, count))  # noqa: E731
    func = torch.func
    for transformed in (
        lambda f: func.grad(f, (0, 1))(features, weight),
        lambda f: func.hessian(f, 1)(features, weight),
        lambda f: func.jacrev(func.jacrev(f, 0), 1)(features, weight),
        lambda f: func.jacfwd(func.jacfwd(f, 0), 1)(features, weight),
        lambda f: func.jvp(f, (features, weight), (turned, weight.square())),
        lambda f: func.grad(lambda x: func.jvp(lambda x: f(x, weight), (x,), (turned,))[1])(features),
        lambda f: func.vmap(func.grad(f), (0, None))(torch.stack([features, turned]), weight),
    ):
        torch.testing.assert_close(transformed(mine), transformed(judge), rtol=1e-4, atol=1e-5)
    plain = lambda x: loss(*sts_kernels.scatter_mean(x, slot, count))  # noqa: E731
    ones = lambda x: judge(x, torch.ones_like(weight))  # noqa: E731
    for transformed in (lambda f: func.grad(f)(features), lambda f: func.jvp(f, (features,), (turned,))):
        torch.testing.assert_close(transformed(plain), transformed(ones), rtol=1e-4, atol=1e-5)


def test_what_is_dropped_has_no_gradient(device):
    features, weight, slot, count = inputs(device)
    slot[0, 0], slot[0, 1] = -1, 2
    features[0, 1] = math.nan
    features.requires_grad_()
    weight.requires_grad_()
    out = sts_kernels.scatter_mean(features, slot, count, weight)
    for grad in torch.autograd.grad(loss(*out), (features, weight)):
        assert (grad[0, :2] == 0).all()
        assert grad.isfinite().all()


def test_gradient_is_compiled(device):
    torch._dynamo.reset()
    features, weight, slot, count = inputs(device)
    features.requires_grad_()
    call = lambda x: loss(*sts_kernels.scatter_mean(x, slot, count, weight))  # noqa: E731
    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(
        torch.autograd.grad(compiled(features), features), torch.autograd.grad(call(features), features)
    )
    torch._dynamo.reset()


# ---- Bad arguments -----------------------------------------------------------------------------------------------


def good():
    return sized(0, "cpu")


BAD = [
    ("features", torch.zeros(2, 11), ValueError, "(2, 11)"),
    ("features", torch.zeros(2, 11, 5, dtype=torch.int32), TypeError, "int32"),
    ("features", torch.zeros(2, 0, 5), ValueError, "(2, 0, 5)"),
    ("assignment", torch.zeros(2, 12, dtype=torch.int64), ValueError, "(2, 12)"),
    ("assignment", torch.zeros(2, 11), TypeError, "float32"),
    ("assignment", torch.full((2, 11), 3), ValueError, "3"),
    ("assignment", torch.full((2, 11), -2), ValueError, "-2"),
    ("assignment", None, TypeError, "NoneType"),
    ("count", 0, ValueError, "0"),
    ("count", 2**31, ValueError, "between 1 and 2147483647, got 2147483648"),
    ("count", 2.0, TypeError, "float"),
    ("count", True, TypeError, "bool"),
    ("weight", torch.zeros(2, 12), ValueError, "(2, 12)"),
    ("weight", torch.zeros(2, 11, dtype=torch.int64), TypeError, "int64"),
    ("weight", 1.0, TypeError, "float"),
]


@pytest.mark.parametrize(("name", "value", "error", "came"), BAD)
def test_message_names_the_argument_and_what_came(name, value, error, came):
    with pytest.raises(error) as caught:
        sts_kernels.scatter_mean(**{**good(), name: value})
    assert str(caught.value).startswith("scatter_mean: ")
    assert name in str(caught.value)
    assert came in str(caught.value)
    if value is True:
        return  # a bool is a number to the dispatcher
    with pytest.raises((RuntimeError, ValueError, TypeError)):
        torch.ops.sts_kernels.scatter_mean(**{**good(), name: value})


@pytest.mark.parametrize("name", ["assignment", "weight"])
def test_tensors_on_different_devices(name):
    arguments = good()
    with pytest.raises(ValueError, match=f"scatter_mean: {name} must be on the device of features, cpu, got meta"):
        sts_kernels.scatter_mean(**{**arguments, name: arguments[name].to("meta")})
