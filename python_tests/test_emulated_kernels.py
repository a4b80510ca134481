"""The CUDA kernels and their launchers, compiled for the CPU and run there: against the oracle, under several
schedules, under the sanitizers (ThreadSanitizer checks for races between CUDA threads), and as mutants that the checks
must catch.
"""

import re
from collections import Counter

import numpy as np
import pytest
import torch
from cases import CASES, VARLEN_CASES, by_name, with_dtypes
from emulator import build, calls, mutants, operations, ops, primitives, smoke
from emulator.mutants import MUTANTS, ORDERS

from sts_kernels import _registry

MISSING = build.missing_tool()
pytestmark = pytest.mark.skipif(bool(MISSING), reason=MISSING)

PRIMITIVES = [] if MISSING else primitives.calls()
QUICK = [] if MISSING else operations.quick()
NONSENSE = [] if MISSING else operations.nonsense()
AFFORDABLE = [case for case in (*CASES, *VARLEN_CASES) if operations.work(case) <= 3e6]


@pytest.fixture(scope="session")
def emulated():
    return build.module()


@pytest.fixture(params=ORDERS)
def order(request, monkeypatch):
    monkeypatch.setenv("STS_EMULATE_ORDER", request.param)
    return request.param


# ---- Results -----------------------------------------------------------------------------------------------------


def test_every_kernel_is_called(emulated):
    questions = "selection_plan|exact_centre|phases_begun|barriers_passed|driver_questions"
    launchers = {name for name in emulated.kernels() if not re.search(questions, name)}
    assert launchers == {call.kernel for call in (*PRIMITIVES, *QUICK)}


@pytest.mark.timeout(900)
def test_every_cu_file_registers_its_ops(emulated_library):
    """The backend `emulated` skips an op without a kernel. These ops have one."""
    for file in (build.CSRC / "cuda").glob("*.cu"):
        names = [name for name in _registry.OPS if name.removesuffix("_varlen").rstrip("_") == file.stem]
        assert names, file
        assert all(map(ops.has_kernel, names)), names


@pytest.mark.parametrize("call", PRIMITIVES, ids=str)
def test_primitive(emulated, order, call):
    calls.run_in(emulated, call)


@pytest.mark.parametrize(("case", "dtype"), with_dtypes(AFFORDABLE))
def test_case(emulated, monkeypatch, case, dtype):
    for i, call in enumerate(operations.of_case(case, dtype)):
        monkeypatch.setenv("STS_EMULATE_ORDER", ORDERS[(i + len(case.name)) % len(ORDERS)])
        calls.run_in(emulated, call)


@pytest.mark.parametrize("wgmma", [1, 0])
@pytest.mark.parametrize(("case", "dtype"), with_dtypes([case for case in AFFORDABLE if case in VARLEN_CASES]))
def test_packed_items_have_the_bits_of_padded_ones(emulated, case, dtype, wgmma):
    """Equal bits of the picks and of the row minima of the weights, which clusters use."""
    inputs, way = case.inputs(dtype=dtype), {"item_blocks": 4, "lookahead": 8, "wgmma": wgmma}
    notes = np.zeros(len(inputs["features"]), np.uint32)
    call = operations.repulsion_select_varlen(case.name, **inputs, **way, notes=notes)
    *_, packed_least, packed = calls.run_in(emulated, call)
    starts, places = inputs["cu_seqlens"].tolist(), inputs["cu_budgets"].tolist()
    for b, budget in enumerate(case.budgets):
        if budget:
            rows = slice(starts[b], starts[b + 1])
            anchor = None if inputs["anchor"] is None else inputs["anchor"][b : b + 1]
            tokens = inputs["features"][None, rows]
            call = operations.repulsion_select(
                case.name, tokens, budget, case.eps, anchor, notes=notes[None, rows], **way
            )
            *_, least, picks = calls.run_in(emulated, call)
            assert np.array_equal(packed[places[b] : places[b + 1]], picks[0])
            assert budget == 1 or np.array_equal(packed_least[rows], least[0])  # a single pick needs no weights


def bits(array):
    """The bytes of `array`, with one NaN for all."""
    if array.dtype.kind == "f":
        array = np.where(np.isnan(array), array.dtype.type(np.nan), array)
    return array.tobytes()


@pytest.mark.parametrize("call", QUICK, ids=str)
def test_neither_schedule_nor_device_nor_old_memory_changes_a_bit(emulated, monkeypatch, call):
    first = None
    settings = zip(ORDERS, (4, 1, 3, 5), (2, 2, 1, 3), (255, 0, 128, 32), strict=True)
    for schedule, multiprocessors, resident, fill in settings:
        monkeypatch.setenv("STS_EMULATE_ORDER", schedule)
        monkeypatch.setenv("STS_EMULATE_FILL", str(fill))
        monkeypatch.setenv("STS_EMULATE_SMS", str(multiprocessors))
        monkeypatch.setenv("STS_EMULATE_BLOCKS_PER_SM", str(resident))
        outputs = [bits(array) for array in calls.run_in(emulated, call)]
        first = first or outputs
        assert outputs == first


def test_a_second_call_asks_the_driver_nothing(emulated):
    """Launchers cache what they query: a query of the driver takes longer than a launch."""
    asked = Counter()
    for call in {(call.kernel, call.way): call for call in QUICK}.values():
        calls.run_in(emulated, call)
        before = emulated.run("driver_questions")
        calls.run_in(emulated, call)
        asked[call.kernel] += emulated.run("driver_questions") - before
    assert not +asked


@pytest.mark.parametrize("call", NONSENSE, ids=str)
def test_nonsense_in_device_memory(emulated, call):
    calls.run_in(emulated, call)


# ---- Errors of the emulator --------------------------------------------------------------------------------------


def f16(*shape):
    return np.zeros(shape, np.float16)


def f32(*shape):
    return np.zeros(shape, np.float32)


def i32(*shape):
    return np.zeros(shape, np.int32)


@pytest.mark.parametrize(
    ("kernel", "args", "error", "message"),
    [
        ("nothing", (), ValueError, "no kernel is called nothing"),
        ("primitive_to_float16", (1,), ValueError, "takes 3 arguments, got 1"),
        ("primitive_to_float16", (f32(8), f32(8), 8), ValueError, "argument 0 must be an array of 2-byte"),
        ("primitive_to_float16", (f16(16)[::2], f32(8), 8), ValueError, "argument 0 must be a contiguous array"),
        ("primitive_to_float16", (f16(8), f32(8), 1.5), ValueError, "argument 2 must be an integer"),
        ("primitive_turn", (f32(999), i32(9), 9, 1, 1), RuntimeError, "too many blocks in cooperative launch"),
        ("primitive_collectives", (i32(1), i32(8), i32(1), 1025), RuntimeError, "invalid configuration argument"),
        # Errors in a kernel: half a warp at a full-warp shuffle, a misaligned vector load.
        ("primitive_collectives", (i32(16), i32(8, 16), i32(1), 16), RuntimeError, "__shfl_sync: the mask names"),
        ("primitive_to_float32", ((f32(9), 1), f32(8), 8), RuntimeError, "misaligned address"),
    ],
)
def test_refused(emulated, kernel, args, error, message):
    with pytest.raises(error, match=message):
        emulated.run(kernel, *args)
    calls.run_in(emulated, PRIMITIVES[-1])  # the module still works


def test_settings_that_make_no_sense(emulated, monkeypatch):
    monkeypatch.setenv("STS_EMULATE_ORDER", "backwards")
    with pytest.raises(ValueError, match="STS_EMULATE_ORDER: expected fwd, rev or a number, got 'backwards'"):
        calls.run_in(emulated, PRIMITIVES[-1])


# ---- Sanitizers and mutants --------------------------------------------------------------------------------------


SCHEDULES = {"address": ("fwd", "1"), "thread": ("fwd", "rev", "2")}


def sanitized():
    """Parameters of test_sanitizer. Kernels of float16 are those of bfloat16 but for conversions, and marked as the
    mutants are."""
    for kernel in sorted({call.kernel for call in (*PRIMITIVES, *QUICK)}):
        half = kernel.endswith("_float16")
        yield pytest.param(kernel, marks=pytest.mark.mutants if half else pytest.mark.slow)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("kernel", list(sanitized()))
@pytest.mark.parametrize(("sanitizer", "schedule"), [(s, order) for s, orders in SCHEDULES.items() for order in orders])
def test_sanitizer(sanitizer, schedule, kernel, tmp_path):
    """Every call under one schedule of each sanitizer."""
    program, schedules = build.program(sanitizer), SCHEDULES[sanitizer]
    nonsense = NONSENSE if sanitizer == "address" else []  # its budgets overlap, so items race for output slots
    chosen = [call for call in (*PRIMITIVES, *QUICK, *nonsense) if call.kernel == kernel]
    chosen = chosen[schedules.index(schedule) :: len(schedules)] or chosen
    calls.run_program([str(program)], chosen, tmp_path, timeout=800, env={"STS_EMULATE_ORDER": schedule})


@pytest.fixture(scope="session")
def mutant_builds(tmp_path_factory):
    """A folder for the builds of all mutants of this process. Mutants of the same kernels share a build folder."""
    return tmp_path_factory.mktemp("mutants")


def marked(mutants):
    """Parameters of test_mutant. One mutant of each file is also slow: one that does not need ThreadSanitizer, by far
    the slowest, where there is one."""
    preferred = {m.file: m for m in sorted(mutants, key=lambda m: m.sanitizer != "thread")}
    for mutant in mutants:
        chosen = preferred[mutant.file] is mutant
        yield pytest.param(mutant, id=str(mutant), marks=[pytest.mark.slow] if chosen else [])


@pytest.mark.mutants
@pytest.mark.timeout(900)
@pytest.mark.parametrize("mutant", list(marked(MUTANTS)))
def test_mutant(mutant_builds, mutant):
    how = mutants.verdict(mutant, mutant_builds)
    assert how, "survived"
    crashed = mutant.says == mutants.WRONG and "exit status -11" in how  # by wrong indices
    assert crashed or mutant.says in how


@pytest.mark.parametrize("mutant", MUTANTS, ids=str)
def test_mutant_is_up_to_date(mutant, tmp_path):
    (source,) = build.CSRC.rglob(mutant.file)
    (tmp_path / mutant.file).write_text(source.read_text())
    mutants.apply(mutant, tmp_path)


# ---- The smoke program -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [1, 2])
def test_smoke_calls_of_each_kernel(number):
    """The calls for racecheck are few, but reach every kernel and algorithm of the full list."""
    every, few = smoke.smoke_calls(6e4), smoke.smoke_calls(6e4, number)
    groups = Counter((call.kernel, call.way) for call in every)
    assert groups.keys() == {(call.kernel, call.way) for call in smoke.smoke_calls(3e6)}
    assert Counter((call.kernel, call.way) for call in few) == {g: min(n, number) for g, n in groups.items()}
    assert sum(way.startswith("cluster") for _, way in groups) == 9  # one per rule and dtype
    assert len(few) < len(every) / 4


@pytest.mark.parametrize("text", ["0", "-1", "many"])
def test_smoke_refuses_fewer_than_one_call(tmp_path, capsys, text):
    with pytest.raises(SystemExit, match="2"):
        smoke.main(["--binary", __file__, "--out", str(tmp_path), "--per-kernel", text])
    assert f"--per-kernel: invalid positive value: '{text}'" in capsys.readouterr().err


@pytest.mark.slow
def test_smoke_command(tmp_path, capsys):
    command = ["--binary", str(build.program("address")), "--out", str(tmp_path / "run")]
    assert smoke.main([*command, "--kernels", "primitive_matmul"]) == 0
    assert "8 calls of 2 kernels are right" in capsys.readouterr().out
    assert smoke.main([*command, "--kernels", "primitive_matmul", "--timeout", "0.001"]) == 1
    assert "FAILED: still running" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        smoke.main([*command, "--kernels", "nothing"])


def test_wrong_results_are_seen(emulated):
    """The judge of each call rejects the arrays as they are before the kernel runs."""
    for call in (*QUICK, *PRIMITIVES):
        arrays = [arg.array if isinstance(arg, calls.At) else arg for arg in call.args]
        arrays = [array for array in arrays if isinstance(array, np.ndarray)]
        with pytest.raises(AssertionError):
            call.judge(*arrays)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_kernels_on_the_gpu(cuda, tmp_path):
    """The same calls on a GPU, without torch. compute-sanitizer runs this program too: bench/gpu_check.sh."""
    program = build.gpu_program()
    calls.run_program([str(program)], smoke.smoke_calls(3e6), tmp_path)


def test_call_survives_the_file():
    """encode and decode keep the bytes and shapes of a call's arrays."""
    features = by_name("channel_slice_odd").features(dtype=torch.bfloat16)
    call = operations.pairwise_sqdist("odd", features)
    data = calls.encode([call])
    assert data.startswith(b"STSCALLS")
    assert call.args[0].array.tobytes() in data
    arrays = [call.args[0].array, call.args[-1]]
    output = bytes(8) + b"".join(array.tobytes() for array in arrays)
    for got, want in zip(calls.decode([call], output)[0], arrays, strict=True):
        assert got.tobytes() == want.tobytes()
        assert got.shape == want.shape
