"""The ops in PyTorch: schemas, fake kernels, torch.compile, streams, CUDA graphs, the fallback and its warning."""

import inspect
import os
import subprocess
import sys
import textwrap
import warnings

import oracle
import pytest
import torch
from cases import by_name
from conftest import REQUIRED
from emulator import ops as emulated_ops
from op_inputs import OPS, assert_equal, outputs, results, samples, sized

import sts_kernels
from sts_kernels import _checks, _native, _registry

SELECTING = [f"{rule}_select{varlen}" for rule in ("repulsion", "farthest", "suppress") for varlen in ("", "_varlen")]
STAGE_1 = ["pairwise_sqdist", "repulsion_step_", *SELECTING]
STAGE_1 += ["nearest", "scatter_mean", "knn_density"]


def test_what_is_required_is_there():
    """STS_KERNELS_TEST_REQUIRE=native,cuda: the kernels under test are the compiled ones, not their references."""
    if "native" in REQUIRED:
        status = _native.status()
        assert status.loaded, f"STS_KERNELS_TEST_REQUIRE=native, but {status.reason}"
        assert {op: _registry.OPS[op].backend("CPU") for op in STAGE_1} == dict.fromkeys(STAGE_1, "native")
    if "cuda" in REQUIRED:
        assert torch.cuda.is_available(), "STS_KERNELS_TEST_REQUIRE=cuda, but torch sees no GPU"
        slow = [f"{op.name}: {op.why('CUDA')}" for op in _registry.OPS.values() if op.backend("CUDA") == "reference"]
        assert not slow, f"STS_KERNELS_TEST_REQUIRE=cuda, but these ops run on their reference: {slow}"


@pytest.mark.parametrize("op", sorted(_registry.OPS))
def test_opcheck(device, op):
    overload = getattr(torch.ops.sts_kernels, op).default
    for arguments in samples(op, device):
        torch.library.opcheck(overload, arguments)


@pytest.mark.parametrize("op", sorted(_registry.OPS))
def test_meta_tensors_give_shapes_and_dtypes(device, op):
    overload = getattr(torch.ops.sts_kernels, op).default
    for arguments in samples(op, device):
        meta = [a.to("meta") if isinstance(a, torch.Tensor) else a for a in arguments]
        got, want = outputs(overload(*meta)), outputs(overload(*arguments))
        assert {each.device.type for each in got} == {"meta"}
        assert [(g.shape, g.dtype, g.stride()) for g in got] == [(w.shape, w.dtype, w.stride()) for w in want]


# Schemas of the public ops, verbatim: user code calls them by these names and positions.
SCHEMAS = {
    "pairwise_sqdist": "(Tensor features) -> Tensor",
    "repulsion_step_": "(Tensor(a!) potential, Tensor features, Tensor picked, float eps=1e-6) -> Tensor",
    "repulsion_select": "(Tensor features, SymInt k, float eps=1e-6, Tensor? anchor=None, Tensor? num_tokens=None)"
    " -> Tensor",
    "repulsion_select_varlen": "(Tensor features, Tensor cu_seqlens, Tensor cu_budgets, SymInt total_k, float eps=1e-6,"
    " Tensor? anchor=None, SymInt? max_seqlen=None) -> Tensor",
    "dpp_select": "(Tensor features, Tensor quality, SymInt k, float floor=1e-07, Tensor? num_tokens=None)"
    " -> (Tensor, Tensor)",
    "dedup_select": "(Tensor features, Tensor order, SymInt keep, SymInt step=8) -> Tensor",
    "farthest_select": "(Tensor features, SymInt k, Tensor? anchor=None, Tensor? quality=None, Tensor? start=None,"
    ' str metric="euclidean", Tensor? num_tokens=None) -> Tensor',
    "farthest_select_varlen": "(Tensor features, Tensor cu_seqlens, Tensor cu_budgets, SymInt total_k,"
    ' Tensor? anchor=None, Tensor? quality=None, Tensor? start=None, str metric="euclidean", SymInt? max_seqlen=None)'
    " -> Tensor",
    "suppress_select": "(Tensor features, Tensor rank, Tensor tau, SymInt k, Tensor? num_tokens=None) -> Tensor",
    "suppress_select_varlen": "(Tensor features, Tensor rank, Tensor tau, Tensor cu_seqlens, Tensor cu_budgets,"
    " SymInt total_k, SymInt? max_seqlen=None) -> Tensor",
    "nearest": '(Tensor query, Tensor key, str metric="cosine", Tensor? query_rank=None, Tensor? key_rank=None,'
    " bool exclude_self=False, Tensor? num_keys=None) -> (Tensor, Tensor)",
    "scatter_mean": "(Tensor features, Tensor assignment, SymInt count, Tensor? weight=None) -> (Tensor, Tensor)",
    "knn_density": "(Tensor features, SymInt k, Tensor? num_tokens=None) -> Tensor",
}


@pytest.mark.parametrize("op", SCHEMAS)
def test_public_schemas(op):
    want = torch._C.parse_schema(f"sts_kernels::{op}{SCHEMAS[op]}")
    assert str(getattr(torch.ops.sts_kernels, op).default._schema) == str(want)
    assert op in sts_kernels.__all__
    parameters = inspect.signature(getattr(sts_kernels, op)).parameters.values()
    assert [p.name for p in parameters] == [a.name for a in want.arguments]
    for parameter, argument in zip(parameters, want.arguments, strict=True):
        assert (parameter.default is not parameter.empty) == argument.has_default_value()
        if argument.has_default_value():
            assert parameter.default == argument.default_value


class CountGraphs:
    """A torch.compile backend that runs and records each graph."""

    def __init__(self):
        self.graphs = []

    def __call__(self, module, inputs):
        self.graphs.append(module)
        return module.forward


@pytest.fixture
def compiled():
    """(compile, graphs): `compile` is torch.compile(fullgraph=True) with dynamic sizes."""
    torch._dynamo.reset()
    backend = CountGraphs()
    yield lambda f: torch.compile(f, backend=backend, fullgraph=True, dynamic=True), backend.graphs
    torch._dynamo.reset()


@pytest.mark.parametrize(
    "call", [sts_kernels.repulsion_select, torch.ops.sts_kernels.repulsion_select], ids=["public", "raw"]
)
def test_changing_k_compiles_one_graph(device, compiled, call):
    compile, graphs = compiled
    features = by_name("5x127x64_k40").features(device=device)
    select = compile(lambda x, k: call(x, k) + 0)
    for k in (5, 3, 40, 126, 2):
        assert torch.equal(select(features, k), call(features, k))
    assert len(graphs) == 1
    nodes = [str(node.target) for node in graphs[0].graph.nodes]
    assert any("repulsion_select" in node for node in nodes), nodes


def test_changing_total_k_compiles_one_graph(device, compiled):
    compile, graphs = compiled
    features = torch.randn(50, 8, device=device)
    cu_seqlens = torch.tensor([0, 20, 50], device=device)
    select = compile(lambda x, cu_budgets, k: sts_kernels.repulsion_select_varlen(x, cu_seqlens, cu_budgets, k))
    for k in (6, 4, 20, 2):
        cu_budgets = torch.tensor([0, k // 2, k], device=device)
        want = sts_kernels.repulsion_select_varlen(features, cu_seqlens, cu_budgets, k)
        assert torch.equal(select(features, cu_budgets, k), want)
    assert len(graphs) == 1


def test_changing_shapes_compile_one_graph(device, compiled):
    compile, graphs = compiled
    sqdist = compile(lambda x: sts_kernels.pairwise_sqdist(x * 2))
    for shape in ((2, 9, 5), (3, 17, 4), (4, 33, 64)):
        x = torch.randn(shape, device=device)
        torch.testing.assert_close(sqdist(x), sts_kernels.pairwise_sqdist(x * 2), rtol=0, atol=0)
    assert len(graphs) == 1


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_with_every_argument(device, backend):
    """aot_eager functionalises: the step's mutation must survive it."""
    torch._dynamo.reset()
    inputs = by_name("ragged_anchor").inputs(device=device)
    select = torch.compile(sts_kernels.repulsion_select, backend=backend, fullgraph=True)
    assert torch.equal(select(**inputs), sts_kernels.repulsion_select(**inputs))

    def three_steps(features, token):
        potential = torch.zeros(features.shape[:2], device=features.device)
        picks = [token]
        for _ in range(3):
            picks.append(sts_kernels.repulsion_step_(potential, features, picks[-1]))
        return torch.stack(picks, 1), potential

    features = torch.randn(2, 30, 7, device=device)
    token = torch.tensor([3, 4], device=device)
    for got, want in zip(
        torch.compile(three_steps, backend=backend, fullgraph=True)(features, token),
        three_steps(features, token),
        strict=True,
    ):
        assert torch.equal(got, want)


def test_bad_arguments_fail_in_a_compiled_function_too(device):
    torch._dynamo.reset()
    select = torch.compile(lambda x: sts_kernels.repulsion_select(x, 99), backend="eager", fullgraph=True)
    with pytest.raises(Exception, match="k must be between 1 and 9"):
        select(torch.randn(1, 9, 3, device=device))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("op", OPS)
def test_the_default_dtype_changes_no_bit(device, op, dtype):
    """torch.set_default_dtype, which model loaders call, is not the dtype of any intermediate result."""
    arguments = sized(op, 20, device)
    calls = getattr(sts_kernels, op), _registry.OPS[op].reference
    want = [results(op, call, arguments) for call in calls]
    torch.set_default_dtype(dtype)
    try:
        got = [results(op, call, arguments) for call in calls]
    finally:
        torch.set_default_dtype(torch.float32)
    for ours, theirs in zip(got, want, strict=True):
        assert_equal(ours, theirs)


def test_inference_mode_and_no_grad(device):
    inputs = by_name("anchor").inputs(device=device)
    want = sts_kernels.repulsion_select(**inputs)
    with torch.inference_mode():
        assert torch.equal(sts_kernels.repulsion_select(**inputs), want)
        oracle.check_sqdist(sts_kernels.pairwise_sqdist(inputs["features"]), inputs["features"])
    with torch.no_grad():
        assert torch.equal(sts_kernels.repulsion_select(**inputs), want)


# ---- CUDA only: streams, graphs, values that the host does not read -----------------------------------------


def test_cuda_graph_replays_with_new_values(cuda):
    """No op synchronises or allocates outside the captured graph: a replay computes on new features."""
    first, second = (by_name("anchor").inputs(seed=seed, device=cuda) for seed in (0, 1))
    features, anchor = first["features"].clone(), first["anchor"].clone()
    num_tokens = torch.tensor([65, 3, 0, 40], device=cuda)
    flat = features.view(-1, features.shape[-1])
    cu_seqlens = torch.tensor([0, 65, 65, 195, 260], dtype=torch.int32, device=cuda)
    cu_budgets = torch.tensor([0, 9, 9, 20, 30], dtype=torch.int32, device=cuda)
    potential = torch.zeros(4, 65, device=cuda)

    def every_op():
        potential.zero_()
        return (
            sts_kernels.repulsion_select(features, 20),
            sts_kernels.repulsion_select(features, 20, 1e-6, anchor, num_tokens),
            sts_kernels.repulsion_select(features[:2].repeat(1, 20, 1), 70),  # shared by clusters
            sts_kernels.repulsion_select_varlen(flat, cu_seqlens, cu_budgets, 30),
            sts_kernels.pairwise_sqdist(features),
            sts_kernels.repulsion_step_(potential, features, anchor),
        )

    if _registry.OPS["repulsion_select_varlen"].backend("CUDA") == "reference":
        pytest.skip("the reference of repulsion_select_varlen reads its offsets back to the host")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        every_op()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = every_op()
    for inputs in (second, first, second):
        features.copy_(inputs["features"])
        graph.replay()
        got = [t.clone() for t in captured] + [potential.clone()]
        want = [*every_op(), potential]
        for a, b in zip(got, want, strict=True):
            assert torch.equal(a, b)


def test_no_op_synchronises(cuda):
    inputs = by_name("ragged_anchor").inputs(device=cuda)
    features = inputs["features"]
    varlen = samples("repulsion_select_varlen", cuda)[2]
    potential, picked = torch.zeros(features.shape[:2], device=cuda), inputs["anchor"]
    if _registry.OPS["repulsion_select_varlen"].backend("CUDA") == "reference":
        pytest.skip("the reference of repulsion_select_varlen reads its offsets back to the host")
    others = [(op, tuple_) for op in SELECTING[2:] for tuple_ in samples(op, cuda)]
    torch.cuda.set_sync_debug_mode("error")
    try:
        for op, arguments in others:
            if not op.endswith("varlen") or _registry.OPS[op].backend("CUDA") != "reference":
                getattr(sts_kernels, op)(*arguments)
        sts_kernels.repulsion_select(**inputs)
        sts_kernels.repulsion_select_varlen(*varlen)
        sts_kernels.pairwise_sqdist(features)
        sts_kernels.repulsion_step_(potential, features, picked)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_ops_run_on_the_current_stream(cuda):
    """An op sees work queued before it on a side stream; on another stream it would read the old features."""
    inputs = by_name("5x127x64_k40").inputs(device=cuda)
    new = by_name("5x127x64_k40").inputs(seed=1, device=cuda)["features"]
    want = sts_kernels.repulsion_select(new, 40), sts_kernels.pairwise_sqdist(new)
    for _ in range(3):
        features = inputs["features"].clone()
        torch.cuda.synchronize()
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(20_000_000)  # 10 ms in which the features are still the old ones
            features.copy_(new)
            got = sts_kernels.repulsion_select(features, 40), sts_kernels.pairwise_sqdist(features)
            potential = torch.zeros(5, 127, device=cuda)
            following = sts_kernels.repulsion_step_(potential, features, got[0][:, 0].contiguous())
        stream.synchronize()
        assert torch.equal(got[0], want[0])
        assert torch.equal(got[1], want[1])
        assert torch.equal(following, want[0][:, 1])


def test_several_streams_at_once(cuda):
    """Concurrent calls on several streams share no scratch memory."""
    names = "1x577x1024_k64", "1x1225x64_k1225", "2x257x1000_k33"
    cases = [by_name(name).inputs(seed=2, device=cuda) for name in names]
    want = [sts_kernels.repulsion_select(**inputs) for inputs in cases]
    streams = [torch.cuda.Stream() for _ in cases]
    torch.cuda.synchronize()
    got = []
    for _ in range(10):
        for stream, inputs in zip(streams, cases, strict=True):
            with torch.cuda.stream(stream):
                got.append(sts_kernels.repulsion_select(**inputs))
    torch.cuda.synchronize()
    for i, picks in enumerate(got):
        assert torch.equal(picks, want[i % len(want)])


def test_the_device_of_the_tensors_is_used(cuda):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    inputs = by_name("anchor").inputs(device="cuda:1")
    with torch.cuda.device(0):
        oracle.check_select(sts_kernels.repulsion_select(**inputs), **inputs)
        assert torch.cuda.current_device() == 0


OUT_OF_RANGE = [-1, -(2**31), 2**31 - 1, 2**40, -(2**62)]


@pytest.mark.parametrize("value", [*OUT_OF_RANGE, 65])
def test_bad_anchor_on_cuda_gives_minus_one(cuda, value):
    """A bad anchor is not read on the host and causes no access out of bounds; other items keep their picks."""
    inputs = by_name("anchor").inputs(device=cuda)
    want = sts_kernels.repulsion_select(**inputs)
    inputs["anchor"][1] = value
    for call in (sts_kernels.repulsion_select, torch.ops.sts_kernels.repulsion_select):
        picks = call(**inputs)
        torch.cuda.synchronize()
        assert (picks[1] == -1).all()
        assert torch.equal(picks[[0, 2, 3]], want[[0, 2, 3]])


@pytest.mark.parametrize("value", [*OUT_OF_RANGE, 51])
def test_bad_num_tokens_on_cuda_gives_minus_one(cuda, value):
    inputs = by_name("ragged_anchor").inputs(device=cuda)
    want = sts_kernels.repulsion_select(**inputs)
    inputs["num_tokens"][0] = value
    for anchor in (inputs["anchor"], None):
        picks = sts_kernels.repulsion_select(**{**inputs, "anchor": anchor})
        torch.cuda.synchronize()
        assert (picks[0] == -1).all()
    assert torch.equal(sts_kernels.repulsion_select(**inputs)[1:], want[1:])


@pytest.mark.parametrize("value", [*OUT_OF_RANGE[1:], 9])
def test_bad_picked_on_cuda_acts_as_minus_one(cuda, value):
    features = torch.randn(2, 9, 5, device=cuda)
    potential = torch.rand(2, 9, device=cuda)
    before = potential.clone()
    following = sts_kernels.repulsion_step_(potential, features, torch.tensor([value, 0], device=cuda))
    torch.cuda.synchronize()
    assert torch.equal(potential[0], before[0])
    assert following[0] == before[0].argmin()
    assert potential[1, 0] == torch.inf


@pytest.mark.parametrize(
    ("cu_seqlens", "cu_budgets"),
    [
        ((0, 20, 40, 30), (0, 5, 10, 15)),  # decreases
        ((0, 20, -(2**63), 40), (0, 5, 10, 15)),  # the differences wrap around
        ((0, 20, 30, 40), (0, 5, -(2**63), 15)),
        ((0, 20, 30, 40), (0, 5, 2**63 - 1, -(2**63))),
        ((0, 20, 30, 2**31 - 1), (0, 5, 10, 15)),  # past the end
        ((-(2**31), 20, 30, 40), (0, 5, 10, 15)),
        ((0, 20, 30, 40), (0, -5, 10, 15)),
        ((0, 20, 30, 40), (0, 5, 10, 2**31 - 1)),
        ((0, 20, 30, 40), (0, 5, 2**30, 15)),
        ((0, 3, 30, 40), (0, 5, 10, 15)),  # a budget over its length
        ((2**30, 2**30, 2**30, 2**30), (2**30, 2**30 + 5, 2**30 + 6, 2**30 + 7)),
    ],
)
def test_bad_offsets_on_cuda_stay_in_bounds(cuda, cu_seqlens, cu_budgets):
    """With any offsets, each pick is -1 or a valid index; items before the fault are right."""
    if _registry.OPS["repulsion_select_varlen"].backend("CUDA") == "reference":
        pytest.skip("the reference reads the offsets and raises")
    features = torch.randn(40, 6, device=cuda)
    wide = any(abs(v) > 2**31 for v in cu_seqlens + cu_budgets)
    dtype = torch.int64 if wide else torch.int32
    offsets = [torch.tensor(v, dtype=dtype, device=cuda) for v in (cu_seqlens, cu_budgets)]
    torch.full((15,), 2**60, device=cuda)  # what the result's memory holds before it is written
    picks = sts_kernels.repulsion_select_varlen(features, *offsets, 15)
    torch.cuda.synchronize()
    assert ((picks >= -1) & (picks < 40)).all()
    good = [
        b
        for b in range(3)
        if 0 <= cu_seqlens[b] <= cu_seqlens[b + 1] <= 40
        and 0 <= cu_budgets[b] <= cu_budgets[b + 1] <= 15
        and cu_budgets[b + 1] - cu_budgets[b] <= cu_seqlens[b + 1] - cu_seqlens[b]
    ]
    if good and good[0] == 0:
        error = oracle.greedy_error(features[: cu_seqlens[1]], picks[: cu_budgets[1]], 1e-6)
        assert not error, error


def test_check_variable_validates_values_on_cuda(cuda, monkeypatch):
    """STS_KERNELS_CHECK=1 reads values back, warns once, and raises on invalid values."""
    monkeypatch.setenv("STS_KERNELS_CHECK", "1")
    _checks._warn_sync.cache_clear()
    inputs = by_name("anchor").inputs(device=cuda)
    with pytest.warns(UserWarning, match="STS_KERNELS_CHECK=1.*synchronises"):
        sts_kernels.repulsion_select(**inputs)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sts_kernels.repulsion_select(**inputs)
        inputs["anchor"][2] = 65
        with pytest.raises(ValueError, match=r"anchor\[2\] must be between 0 and 64, got 65"):
            sts_kernels.repulsion_select(**inputs)
        inputs["num_tokens"] = torch.tensor([1, 1, 1, 66], device=cuda)
        with pytest.raises(ValueError, match=r"num_tokens\[3\] must be between 0 and 65"):
            sts_kernels.repulsion_select(**inputs)
        with pytest.raises(ValueError, match=r"picked\[0\]"):
            sts_kernels.repulsion_step_(
                torch.zeros(1, 4, device=cuda), torch.zeros(1, 4, 2, device=cuda), torch.tensor([4], device=cuda)
            )
        x, offsets = torch.randn(9, 2, device=cuda), torch.tensor([0, 8], device=cuda)
        with pytest.raises(ValueError, match="cu_seqlens must rise from 0 to 9"):
            sts_kernels.repulsion_select_varlen(x, offsets, offsets, 8)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize(
    ("op", "says", "args"),
    [
        ("repulsion_select", r"anchor\[1\] .* got 7", lambda x, of: (x, 2, 1e-6, of([1, 7]))),
        ("farthest_select", r"anchor\[0\] .* got 6", lambda x, of: (x, 2, of([6, 0]))),
        (
            "suppress_select_varlen", "cu_budgets must rise from 0 to 2",
            lambda x, of: (x[0], of(range(6)), x[0, :, 0], of([0, 6]), of([0, 3]), 2),
        ),
        ("repulsion_select_varlen", "cu_seqlens must rise", lambda x, of: (x[0], of([0, 5]), of([0, 2]), 2)),
        ("repulsion_step_", r"picked\[1\] .* got 6", lambda x, of: (x[..., 0].contiguous(), x, of([-1, 6]))),
        ("dpp_select", r"num_tokens\[1\] .* got -1", lambda x, of: (x, x[..., 0], 2, 0.0, of([6, -1]))),
        ("dedup_select", r"order\[1, 0\] .* got 6", lambda x, of: (x, of([[1, -1], [6, 0]]), 2)),
        ("nearest", r"num_keys\[0\] .* got 7", lambda x, of: (x, x, "cosine", None, None, False, of([7, 6]))),
        ("knn_density", r"num_tokens\[1\] .* got 7", lambda x, of: (x, 2, of([0, 7]))),
        ("scatter_mean", "assignment .* got 6", lambda x, of: (x, of([[*range(6)], [*range(1, 7)]]), 6)),
    ],
)  # fmt: skip
def test_check_variable_validates_values_in_the_cuda_kernel(emulated_library, monkeypatch, op, says, args, dtype):
    """Calls of torch.ops and compiled graphs reach the C++ kernels without the checks in Python."""
    given = args(torch.randn(2, 6, 3), lambda values: torch.tensor([*values], dtype=dtype))
    emulated_ops.call(op, *given)
    monkeypatch.setenv("STS_KERNELS_CHECK", "1")
    with pytest.raises(RuntimeError, match=f"sts_kernels::{op}: {says}"):
        emulated_ops.call(op, *given)


# ---- The registry itself -----------------------------------------------------------------------------------------


class PretendCuda(torch.Tensor):
    """A CPU tensor whose `is_cuda` is True."""

    is_cuda = True


@pytest.fixture
def fallback(monkeypatch):
    """(kernel that define_op registers for an op without a CUDA kernel, recorded calls of the reference)."""
    calls = []
    monkeypatch.setattr(_registry, "OPS", {})
    monkeypatch.setattr(
        torch._C, "_dispatch_has_kernel_for_dispatch_key", lambda op, key: key == "CPU" and _native.status().loaded
    )
    with torch.library._scoped_library("sts_kernels_pretend", "DEF") as library:
        registrations = _registry._Registrations(library)
        monkeypatch.setattr(_registry, "NAMESPACE", "sts_kernels_pretend")
        monkeypatch.setattr(_registry, "ops", torch.ops.sts_kernels_pretend)
        monkeypatch.setattr(_registry, "_registrations", registrations)

        @_registry.define_op("pretend(Tensor x, Tensor? y=None) -> Tensor", fake=None, vmap=None)
        def reference(x, y=None):
            calls.append((x, y))
            return x

        _registry._warn_fallback.cache_clear()
        yield registrations.kernels["pretend"]["CompositeExplicitAutograd"], calls
    _registry._warn_fallback.cache_clear()


@pytest.mark.parametrize("position", [0, 1])
def test_fallback_on_cuda_tensors_warns_once(fallback, position):
    call, calls = fallback
    x, gpu = torch.zeros(2), torch.zeros(2).as_subclass(PretendCuda)
    arguments = (gpu,) if position == 0 else (x, gpu)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        call(x)
        call(x, None)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call(*arguments)
        call(*arguments)
    messages = [str(w.message) for w in caught]
    assert len(messages) == 1, messages
    assert "sts_kernels_pretend::pretend runs on its slow PyTorch reference for CUDA tensors: " in messages[0]
    assert _native.status().why("CUDA", has_kernel=False) in messages[0]
    assert "python -m sts_kernels info" in messages[0]
    assert len(calls) == 4


def test_cpu_calls_never_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        inputs = by_name("ragged_anchor").inputs()
        sts_kernels.repulsion_select(**inputs)


def python(code, **environment):
    """Runs `code` in its own process; returns its stdout."""
    environment = {**os.environ, **environment}
    environment["PYTHONPATH"] = os.pathsep.join(
        filter(None, [os.path.dirname(os.path.dirname(sts_kernels.__file__)), environment.get("PYTHONPATH")])
    )
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_import_pulls_in_nothing_heavy():
    code = """
        import sys
        import torch
        before = set(sys.modules)
        import sts_kernels
        new = {name.partition(".")[0] for name in set(sys.modules) - before}
        print(*sorted(new - sys.stdlib_module_names - {"torch"}))
    """
    assert python(code) == "sts_kernels"


def test_disabled_library_leaves_the_reference():
    code = """
        import torch, sts_kernels
        from sts_kernels import _native, _registry
        print(_native.status().reason)
        print({op.backend("CPU") for op in _registry.OPS.values() if not op.triton})
        print(sts_kernels.repulsion_select(torch.arange(9.0)[None, :, None], 3).tolist())
    """
    lines = python(code, STS_KERNELS_DISABLE="1").splitlines()
    assert lines == ["STS_KERNELS_DISABLE=1 is set", "{'reference'}", "[[4, 0, 8]]"]
