"""Autograd, forward-mode AD, torch.func and autocast over all ops: no derivative is lost silently."""

import warnings

import pytest
import torch
from op_inputs import OPS, assert_equal, outputs, results, sized, tensors, written
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import forward_ad

import sts_kernels

DIFFERENTIABLE = ["nearest", "pairwise_sqdist", "scatter_mean"]
INDICES = [op for op in OPS if "_select" in op and op != "dpp_select"]  # dpp_select returns gains too
REFUSING = [op for op in OPS if op not in DIFFERENTIABLE + INDICES]
FLOATS = [
    pytest.param(op, name, id=f"{op}-{name}")
    for op in OPS
    for name, value in tensors(sized(op, 0)).items()
    if value.is_floating_point() and name != written(op)
]


def namespace(raw):
    return torch.ops.sts_kernels if raw else sts_kernels


def refuses(op, name):
    return pytest.raises(NotImplementedError, match=rf"^{op}: {name} is being differentiated.*give {name}\.detach\(\)$")


@pytest.mark.parametrize("raw", [False, True], ids=["public", "raw"])
@pytest.mark.parametrize(("op", "name"), FLOATS)
def test_outputs_say_whether_they_have_a_gradient(device, op, name, raw):
    arguments = sized(op, 0, device)
    want = results(op, getattr(sts_kernels, op), arguments)
    arguments[name].requires_grad_()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        out = getattr(namespace(raw), op)(**arguments)
    for got, expected in zip(outputs(out), want, strict=False):
        assert got.requires_grad == (op in DIFFERENTIABLE and got.is_floating_point())
        assert torch.equal(got, expected)
    if written(op):
        assert not arguments[written(op)].requires_grad


@pytest.mark.parametrize("raw", [False, True], ids=["public", "raw"])
@pytest.mark.parametrize(("op", "name"), FLOATS)
def test_forward_mode(device, op, name, raw):
    arguments = sized(op, 0, device)
    call = getattr(namespace(raw), op)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(arguments[name], torch.ones_like(arguments[name]))
        if op in REFUSING:
            with refuses(op, name):
                call(**{**arguments, name: dual})
            call(**{**arguments, name: dual.detach()})
        else:
            for out in outputs(call(**{**arguments, name: dual})):
                tangent = forward_ad.unpack_dual(out).tangent
                assert (tangent is not None) == (op in DIFFERENTIABLE and out.is_floating_point())


@pytest.mark.parametrize(("op", "name"), FLOATS)
def test_torch_func(device, op, name):
    """grad and jvp run on differentiable ops and through indices; ops with scores raise and say what to do."""
    arguments = sized(op, 0, device)
    call = lambda value: getattr(sts_kernels, op)(**{**arguments, name: value})  # noqa: E731
    value = arguments[name]

    def grad(detached):
        loss = lambda x: sum((o * x.sum()).sum() for o in outputs(call(x.detach() if detached else x)))  # noqa: E731
        return torch.func.grad(loss)(value)

    def jvp(detached):
        return torch.func.jvp(lambda x: call(x.detach() if detached else x), (value,), (torch.ones_like(value),))

    for transformed in (grad, jvp):
        if op in REFUSING:
            with refuses(op, name):
                transformed(False)
            if written(op) is None:
                transformed(True)
        else:
            transformed(False)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_autocast(device, op, dtype):
    """autocast changes no bit: the ops compute in float32."""
    arguments = sized(op, 1, device)
    for name, value in tensors(arguments).items():
        if value.is_floating_point() and name != written(op):
            arguments[name] = value.to(dtype)
    want = results(op, getattr(sts_kernels, op), arguments)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        assert_equal(results(op, getattr(sts_kernels, op), arguments), want)
        compiled = torch.compile(lambda **kwargs: getattr(sts_kernels, op)(**kwargs), backend="aot_eager")
        assert_equal(results(op, compiled, arguments), want)
    torch._dynamo.reset()


# ---- The gradient of pairwise_sqdist ------------------------------------------------------------------------------


def formula(x):
    return (x[:, :, None] - x[:, None]).square().sum(-1)


def near_duplicates():
    """Pairs of tokens far from the origin: some equal, some nearly equal."""
    x = 50 + torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(0)).repeat_interleave(2, 1)
    x[:, 1::4] += 1e-3
    return x


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_gradient_equals_float64(device, dtype):
    """The slope of 1 / (d + eps) at equal tokens is 1e12: it amplifies the float32 error of an expanded form."""
    x = near_duplicates().to(device, dtype)
    judge = x.double().requires_grad_()
    (want,) = torch.autograd.grad((1 / (formula(judge) + 1e-6)).sum(), judge)
    x.requires_grad_()
    with torch.autocast(device.type, dtype=torch.bfloat16):
        loss = (1 / (sts_kernels.pairwise_sqdist(x) + 1e-6)).sum()
    (got,) = torch.autograd.grad(loss, x)
    assert got.dtype == dtype
    precision = {torch.float32: 1e-4, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype]
    largest = torch.finfo(dtype).max
    got, want = got.double().clamp(-largest, largest), want.clamp(-largest, largest)
    torch.testing.assert_close(got, want, rtol=precision, atol=precision)


def test_the_distances_may_be_overwritten_before_backward(device):
    x = near_duplicates().to(device).requires_grad_()
    (want,) = torch.autograd.grad((1 / (sts_kernels.pairwise_sqdist(x) + 1)).sum(), x)
    (got,) = torch.autograd.grad(sts_kernels.pairwise_sqdist(x).add_(1).reciprocal_().sum(), x)
    torch.testing.assert_close(got, want)


def test_tangent_equals_float64(device):
    x = near_duplicates().to(device)
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(device)
    out, tangent = torch.func.jvp(sts_kernels.pairwise_sqdist, (x,), (direction,))
    want, want_tangent = torch.func.jvp(formula, (x.double(),), (direction.double(),))
    torch.testing.assert_close(out.double(), want, rtol=1e-5, atol=0)
    torch.testing.assert_close(tangent.double(), want_tangent, rtol=1e-5, atol=1e-9)


def test_derivatives_compose(device):
    """Compositions of grad, jvp, jacrev, jacfwd, hessian and vmap equal those of the formula."""
    rng = torch.Generator().manual_seed(2)
    x, t, w = (torch.randn(*shape, generator=rng).to(device) for shape in ((2, 4, 3), (2, 4, 3), (2, 4, 4)))
    loss = lambda f: lambda x: (w * f(x)).sin().sum()  # noqa: E731
    func = torch.func
    for transformed in (
        lambda f: func.hessian(loss(f))(x),
        lambda f: func.jacrev(func.jacrev(loss(f)))(x),
        lambda f: func.jacfwd(func.jacfwd(loss(f)))(x),
        lambda f: func.grad(lambda x: func.jvp(loss(f), (x,), (t,))[1])(x),
        lambda f: func.vmap(func.grad(loss(f)))(torch.stack([x, t])),
        lambda f: func.grad(lambda xs: func.vmap(loss(f))(xs).sum())(torch.stack([x, t])),
    ):
        torch.testing.assert_close(transformed(sts_kernels.pairwise_sqdist), transformed(formula), rtol=1e-3, atol=1e-3)


def test_gradient_is_compiled_once_for_every_size(device):
    torch._dynamo.reset()
    graphs = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda x: sts_kernels.pairwise_sqdist(x).sin().sum(), backend=graphs, fullgraph=True)
    for step in (0, 1, 2, 3):
        x = sized("pairwise_sqdist", step, device)["features"].requires_grad_()
        (got,) = torch.autograd.grad(compiled(x), x)
        torch.testing.assert_close(got, torch.autograd.grad(sts_kernels.pairwise_sqdist(x).sin().sum(), x)[0])
    assert graphs.frame_count <= 2
    torch._dynamo.reset()


@pytest.mark.parametrize("transformed", [torch.func.grad, torch.func.jacfwd], ids=["grad", "jacfwd"])
def test_torch_func_inside_torch_compile(device, transformed):
    x = sized("pairwise_sqdist", 0, device)["features"]
    torch._dynamo.reset()
    call = transformed(lambda x: sts_kernels.pairwise_sqdist(x).sin().sum())
    got = torch.compile(call, backend="aot_eager", fullgraph=True)(x)
    torch.testing.assert_close(got, call(x))
    torch._dynamo.reset()


@pytest.mark.parametrize("op", OPS)
def test_opcheck_of_what_requires_grad(device, op):
    arguments = sized(op, 0, device)
    for name, value in tensors(arguments).items():
        if value.is_floating_point() and name != written(op):
            value.requires_grad_()
    tests = ["test_schema", "test_autograd_registration", "test_faketensor"]
    if op not in ("dpp_select", "nearest"):  # opcheck sums outputs in place: an index plus a float fails
        tests.append("test_aot_dispatch_dynamic")
    torch.library.opcheck(getattr(torch.ops.sts_kernels, op).default, (), arguments, test_utils=tests)
