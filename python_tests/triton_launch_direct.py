"""Launches of compiled Triton kernels without a GPU: a stub driver records them. A launch that skips Triton's binder
passes the arguments that `kernel[grid]` passes. test_triton_launch.py runs this file in its own process.
"""

import functools
import random
import threading
from types import SimpleNamespace

import pytest
import torch
import triton
import triton.language as tl
from attention_oracle import received_inputs, row_options
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from sts_kernels.ops import _attention_received_triton, _last_query_scores_triton, _triton_launch
from sts_kernels.ops._last_query_scores_plan import Plan
from sts_kernels.ops._triton_launch import Bound, Launcher

MODULES = (_attention_received_triton, _last_query_scores_triton)
LAUNCHERS = [value for module in MODULES for value in vars(module).values() if isinstance(value, Launcher)]
BOUND = [value for module in MODULES for value in vars(module).values() if hasattr(value, "cache_clear")]


class Notes:
    """A stub driver: a number stands for a compiled kernel's function; `launches` records all launches."""

    def __init__(self):
        self.device, self.launches, self.functions = 0, [], {}
        self.launcher_cls = lambda source, metadata: lambda *launch: self.launches.append(launch)
        self.utils = SimpleNamespace(
            load_binary=self._load,
            unload_module=lambda module: None,
            get_device_properties=lambda device: {"max_shared_mem": 227 << 10},
        )

    def _load(self, name, kernel, shared, device):
        function = self.functions.setdefault((name, kernel, device), len(self.functions) + 1)
        return object(), function, 32, 0, 1024

    def get_current_device(self):
        return self.device

    def get_current_stream(self, device):
        return 1000 + device

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_device_interface(self):
        return torch.cuda


def addresses(launch):
    """A launch without hooks, its tensors replaced by addresses: the kernel gets the same from both forms."""
    *numbers, _, _, _ = launch[:9]
    return *numbers, *(v.data_ptr() if isinstance(v, torch.Tensor) else v for v in launch[9:])


@triton.jit(do_not_specialize=("count", "stride"))
def copy_kernel(a, b, count, stride, factor, BLOCK: tl.constexpr, TWICE: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x = tl.load(a + i * stride, mask=i < count, other=0.0)
    if b is not None:
        x += tl.load(b + i, mask=i < count, other=0.0)
    tl.store(a + i, x * factor * (2 if TWICE else 1), mask=i < count)


@pytest.fixture
def notes():
    notes = Notes()
    driver.set_active(notes)
    for kernel in (copy_kernel, *(launcher.kernel for launcher in LAUNCHERS)):
        kernel.device_caches.clear()
    for function in BOUND:
        function.cache_clear()
    return notes


@pytest.fixture
def by_triton(monkeypatch):
    """The launches that went through Triton's own path."""
    taken, public = [], Bound.launch_by_triton

    def launch(self, *args):
        taken.append(args)
        return public(self, *args)

    monkeypatch.setattr(Bound, "launch_by_triton", launch)
    return taken


def copy(launcher=None, **changes):
    """(a bound copy_kernel, its tensors, its numbers), changed."""
    given = {"a": torch.zeros(64), "b": None, "count": 16, "stride": 1, "factor": 1.5, "num_warps": 4, "BLOCK": 16}
    given |= {"TWICE": False} | changes
    tensors, numbers = (tuple(given.pop(name) for name in names) for names in ("ab", ("count", "stride", "factor")))
    return (launcher or Launcher(copy_kernel)).bind(**given), tensors, numbers


def launches_of_the_ops():
    """Recorded launches of the ops, two variants of each kernel: (bound kernel, grid, tensors, numbers)."""
    recorded = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Bound, "launch", lambda *launch: recorded.append(launch))
        for dtype in (torch.float32, torch.bfloat16):
            for keys, whole in ((64, True), (4096, False)):
                query, key = torch.empty(2, 8, 64, dtype=dtype), torch.empty(2, keys, 4, 64, dtype=dtype)
                plan = Plan.of(4, 2, keys, 64, dtype.itemsize, 132)
                assert plan.whole == whole
                mask = torch.ones(2, keys, dtype=torch.bool)
                _last_query_scores_triton.scores(query, key, 0.5, mask, plan)
                offsets = torch.zeros(3, dtype=torch.int64)
                _last_query_scores_triton.scores_varlen(query, key.flatten(0, 1), offsets, keys, None, plan)
            query, key = received_inputs(2, 40, 70, 4, 2, 64, dtype)
            for kinds in ("", "weight position mask"):
                given = {"row_weight": None, "row_position": None, "key_mask": None} | row_options(2, 40, 70, kinds)
                options = (given["row_weight"], given["row_position"], given["key_mask"])
                _attention_received_triton.received(torch.empty(2, 70), query, key, None, *options, False)
    return recorded


def test_kernels_keep_to_what_a_launcher_expects(notes):
    """Parameters are tensors, then numbers, then constexprs; no integer is specialized."""
    launches = launches_of_the_ops()
    assert {bound.launcher for bound, *_ in launches} == set(LAUNCHERS)
    for bound, _, tensors, numbers in launches:
        parameters = bound.launcher.kernel.params
        assert len(parameters) == len(tensors) + len(numbers) + len(bound.constants)
        assert all(value is None or isinstance(value, torch.Tensor) for value in tensors)
        assert all(type(value) in (int, float) for value in numbers)
        of_numbers, constants = (
            parameters[len(tensors) :][i] for i in (slice(len(numbers)), slice(len(numbers), None))
        )
        assert {p.name for p in constants if p.is_constexpr} == set(bound.constants)
        for parameter, value in zip(of_numbers, numbers, strict=True):
            assert parameter.do_not_specialize or type(value) is float


def test_a_direct_launch_hands_over_what_triton_does(notes, by_triton):
    launches = launches_of_the_ops()
    for bound, *launch in launches:
        bound.launch(*launch)
    first, notes.launches = notes.launches, []
    compiled = len(by_triton)
    for bound, *launch in launches:
        bound.launch(*launch)
    assert len(by_triton) == compiled
    assert len({launch[4] for launch in first}) >= 2 * 6  # functions
    for by_us, by_triton_itself in zip(notes.launches, first, strict=True):
        assert addresses(by_us) == addresses(by_triton_itself)
        assert by_us[6:9] == (None, None, None)


def test_one_variant_serves_every_number_of_keys(notes, by_triton):
    query = torch.empty(1, 8, 64, dtype=torch.bfloat16)
    for keys in (5000, 5001, 7777):
        key = torch.empty(1, keys, 4, 64, dtype=torch.bfloat16)
        plan = Plan.of(4, 2, keys, 64, 2, 132)
        _last_query_scores_triton.scores(query, key, 0.5, None, plan)
    assert len(by_triton) == 2  # kernels


def test_triton_would_have_chosen_the_same_variant(notes, by_triton):
    """Random launches over everything that Triton specializes on, and over devices."""
    launcher = Launcher(copy_kernel)
    bound = functools.cache(lambda **given: launcher.bind(**given))
    rng = random.Random(0)
    memory = {dtype: torch.zeros(64, dtype=dtype) for dtype in (torch.float32, torch.float16)}
    functions = set()
    for _ in range(400):
        a, b = (memory[rng.choice(list(memory))][rng.choice([0, 1]) :] for _ in "ab")
        numbers = rng.choice([1, 16, 7]), rng.choice([1, 1 << 31]), rng.choice([1.0, 0.5])
        notes.device = rng.choice([0, 1])
        mine = bound(num_warps=rng.choice([1, 2]), BLOCK=rng.choice([16, 32]), TWICE=rng.choice([True, False]))
        grid, tensors = rng.choice([(1,), (2, 3)]), (a, rng.choice([None, b]))
        mine.launch(grid, tensors, numbers)
        copy_kernel[grid](*tensors, *numbers, **mine.constants, **mine.options)
        by_us, by_triton_itself = notes.launches[-2:]
        assert addresses(by_us) == addresses(by_triton_itself)
        functions.add(by_us[4])
    assert len(by_triton) < 350
    assert len(functions) > 50


@pytest.mark.parametrize(
    "change",
    [
        pytest.param({"a": torch.zeros(64)[1:]}, id="alignment"),
        pytest.param({"a": torch.zeros(64, dtype=torch.float16)}, id="dtype"),
        pytest.param({"b": torch.zeros(64)}, id="None"),
        pytest.param({"count": 1 << 31}, id="width"),
        pytest.param({}, id="device"),
    ],
)
def test_whatever_is_specialized_tells_variants_apart(notes, by_triton, change):
    bound, tensors, numbers = copy()
    for more in ({}, {"count": 5, "stride": 2, "factor": 0.25}) * 2:
        bound.launch((1,), *copy(**more)[1:])
    assert len(by_triton) == 1
    _, tensors, numbers = copy(**change)
    notes.device = int(not change)
    for _ in range(2):
        bound.launch((1,), tensors, numbers)
        assert len(by_triton) == 2
        assert notes.launches[-1][3] == 1000 + notes.device


def test_a_grid_of_one_to_three_numbers(notes):
    bound, *given = copy()
    for grid in [(5,), (5, 6), (5, 6, 7)] * 2:
        bound.launch(grid, *given)
        assert notes.launches[-1][:3] == (*grid, 1, 1)[:3]


def test_too_many_programs(notes):
    """Triton's launcher would multiply the sides in 32 bits, and launch nothing."""
    bound, *given = copy()
    for grid in [(1 << 31,), (300000, 7813), (65536, 65536)]:
        with pytest.raises(ValueError, match="programs are more than a launch may have"):
            bound.launch(grid, *given)


def test_options_reach_the_compiler(notes):
    for pdl in (False, True):
        bound, *given = copy(launch_pdl=pdl, num_warps=2)
        bound.launch((1,), *given)
        (compiled,) = bound._compiled.values()
        assert (compiled.metadata.num_warps, compiled.metadata.launch_pdl) == (2, pdl)
        assert compiled.metadata.enable_fp_fusion


@pytest.mark.parametrize("hook", ["launch_enter_hook", "launch_exit_hook", "pre_run_hooks"])
def test_a_hook_sees_every_launch(notes, by_triton, monkeypatch, hook):
    bound, *given = copy()
    bound.launch((1,), *given)
    bound.launch((1,), *given)
    assert len(by_triton) == 1
    if hook == "pre_run_hooks":
        seen = []
        monkeypatch.setattr(copy_kernel, hook, [lambda *args, **kwargs: seen.append(kwargs)])
    else:
        chain = getattr(triton.knobs.runtime, hook)
        if chain is None:  # before Triton 3.5 there is one hook
            monkeypatch.setattr(triton.knobs.runtime, hook, lambda metadata: None)
        else:
            monkeypatch.setattr(chain, "calls", [lambda metadata: None])
    for launches in (2, 3):
        bound.launch((1,), *given)
        assert len(by_triton) == launches
    if hook == "pre_run_hooks":
        assert len(seen) == 2


def test_a_refusal_to_compile_is_not_remembered(notes, monkeypatch):
    bound, *given = copy()
    monkeypatch.setattr(triton.knobs.runtime, "jit_cache_hook", lambda **kwargs: True)
    bound.launch((1,), *given)
    assert not notes.launches
    monkeypatch.setattr(triton.knobs.runtime, "jit_cache_hook", None)
    bound.launch((1,), *given)
    bound.launch((1,), *given)
    assert len(notes.launches) == 2


def test_threads_share_variants(notes):
    def fresh():
        launcher = Launcher(copy_kernel)
        return {block: copy(launcher, BLOCK=block)[0] for block in (16, 32, 64)}

    expected = {}
    for block, bound in fresh().items():
        bound.launch((1,), *copy()[1:])
        expected[block] = notes.launches[-1][4]
    shared, wrong = fresh(), []

    def body(seed):
        rng = random.Random(seed)
        for _ in range(100):
            shared[rng.choice(list(shared))].launch((seed, 1), *copy(count=seed)[1:])
        mine = [launch for launch in notes.launches if launch[0] == seed]
        wrong.extend(launch for launch in mine if launch[4] != expected[launch[-2]] or launch[11] != seed)

    threads = [threading.Thread(target=body, args=(seed,)) for seed in range(2, 8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert len(notes.launches) == 3 + 600


@pytest.mark.parametrize("version", ["3.3.1", "3.10.0", "4.0.0", "unknown"])
def test_an_unknown_version_launches_by_triton(notes, by_triton, monkeypatch, caplog, version):
    monkeypatch.setattr(triton, "__version__", version)
    with caplog.at_level("DEBUG", "sts_kernels"):
        bound, *given = copy()
    assert f"version {version} launches kernels by kernel[grid]" in caplog.text
    for launches in (1, 2):
        bound.launch((1,), *given)
        assert len(by_triton) == launches
    assert not bound._compiled


def test_this_version_is_known():
    assert _triton_launch.knows(triton.__version__)
