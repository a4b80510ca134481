"""`pytest bench`: checks every provider of every op on small shapes, and the harness. --benchmark-only times them."""

import csv
import importlib
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sts_kernels._registry import OPS as OPS_TABLE

from . import __main__ as cli
from . import backends, harness, inputs, plot, prefill, record, repulsion_select, serving, timing, waiting, ways

BENCHES = {name: bench for name, bench in harness.discover().items() if bench}
SMALL = {"B": 2, "N": 96, "C": 64, "K": 12, "S": 50, "Hq": 4, "Hkv": 2, "D": 64}
PACKED = {"lengths": (40, 7, 96), "budgets": (10, 1, 24)}
NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


def small_case(bench, dtype):
    """A case with the shape columns of the bench's own cases, at tiny sizes."""
    like = bench.cases[0]
    if not like.lengths:
        return harness.Case("small", {name: SMALL[name] for name in like.shape}, dtype)
    lengths, budgets = PACKED.values()
    sizes = {"B": len(lengths), "N": max(lengths), "T": sum(lengths), "K": sum(budgets), "C": SMALL["C"]}
    return harness.Case("small", {name: sizes[name] for name in like.shape}, dtype, **PACKED)


def outputs(out):
    return out if isinstance(out, tuple) else (out,)


def provided():
    for device in ("cpu", "cuda"):
        for name, bench in BENCHES.items():
            for provider in bench.providers(torch.device(device)):
                if not provider.compiles:
                    marks = NEEDS_GPU if device == "cuda" else ()
                    yield pytest.param(device, bench, provider, id=f"{device}-{name}-{provider.name}", marks=marks)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("device", "bench", "provider"), list(provided()))
def test_provider(benchmark, device, bench, provider, dtype):
    device = torch.device(device)
    case = small_case(bench, dtype)
    given = bench.make_inputs(case, device)
    call = provider.bind(case, given)
    bench.check(case, given, call())

    def settled():
        call()
        if device.type == "cuda":
            torch.cuda.synchronize()

    benchmark.group = f"{bench.op} {dtype} {device}"
    benchmark(settled)


def test_providers_know_the_lengths_of_a_padded_batch():
    bench, cpu = BENCHES["repulsion_select"], torch.device("cpu")
    case = repulsion_select.ragged_case("small", (40, 96), 64, 12)
    given = bench.make_inputs(case, cpu)
    given["features"][0, 40:] = math.nan
    for provider in bench.providers(cpu):
        if not provider.compiles:
            bench.check(case, given, provider.bind(case, given)())
    assert bench.cost(case).bytes < bench.cost(repulsion_select.case_of("small", 2, 96, 64, 12)).bytes


@pytest.mark.parametrize("bench", BENCHES.values(), ids=BENCHES)
def test_check_notices_a_wrong_result(bench):
    case = small_case(bench, torch.float32)
    given = bench.make_inputs(case, torch.device("cpu"))
    right = next(p for p in bench.providers(torch.device("cpu")) if p.name == "reference").bind(case, given)()
    wrong = [each.flip(-1) + 1 for each in outputs(right)]
    with pytest.raises(AssertionError):
        bench.check(case, given, tuple(wrong) if isinstance(right, tuple) else wrong[0])


@pytest.mark.parametrize("bench", BENCHES.values(), ids=BENCHES)
def test_cost_counts_inputs_and_outputs_once(bench):
    case = small_case(bench, torch.float16)
    given = bench.make_inputs(case, torch.device("cpu"))
    inputs = [value.nbytes for value in given.values() if isinstance(value, torch.Tensor)]
    call = next(p for p in bench.providers(torch.device("cpu")) if p.name == "reference").bind(case, given)
    output = sum(each.nbytes for each in outputs(call()))
    cost = bench.cost(case)
    assert max(inputs) <= cost.bytes <= 2 * (sum(inputs) + output)
    assert cost.flops > 0


def test_floor_is_the_slower_of_memory_and_arithmetic():
    peaks = {"copy": 1e9, torch.float32: 1e12}
    assert harness.Cost(bytes=2000, flops=1000).floor(peaks, torch.float32) == (2.0, "memory", "1 GB/s")
    assert harness.Cost(bytes=2000, flops=5 * 10**6).floor(peaks, torch.float32) == (5.0, "compute", "1 TFLOP/s")


def test_percentiles():
    assert timing.percentiles([float(x) for x in range(101)]) == (20.0, 50.0, 80.0)


ARGS = [
    "--quick",
    "--op",
    "repulsion_step_",
    "--shapes",
    "main",
    "N=576",
    "B=1",
    "--dtype",
    "float32",
    "--device",
    "cpu",
    "--allow-reference",
]


@pytest.fixture
def small_peaks(monkeypatch):
    monkeypatch.setattr(timing, "peaks", lambda device, dtypes: {"copy": 1e10} | dict.fromkeys(dtypes, 1e11))


@pytest.mark.usefixtures("small_peaks")
def test_rows_are_appended_and_say_what_they_measured(tmp_path, capsys):
    path = tmp_path / "new" / "rows.csv"
    assert cli.main([*ARGS, "--csv", str(path), "--commit", "abc"]) == 0
    first = path.read_text()
    assert cli.main([*ARGS, "--csv", str(path), "--commit", "def"]) == 0
    assert path.read_text().startswith(first)
    rows = record.read(path)
    assert tuple(rows[0]) == record.COLUMNS
    timed = [row for row in rows if row["op"] == "repulsion_step_"]
    assert {row["provider"] for row in timed} >= {"reference", "plain"}
    assert {row["commit"] for row in timed} == {"abc", "def"}
    for row in timed:
        assert (row["B"], row["N"], row["C"], row["K"], row["dtype"]) == ("1", "576", "1024", "", "float32")
        assert 0 < float(row["p20_us"]) <= float(row["p50_us"]) <= float(row["p80_us"])
        assert row["mode"] == "eager"
        assert row["omp_wait_policy"]
        assert int(row["bytes"]) == 576 * (4 * 1024 + 8)


@pytest.mark.usefixtures("small_peaks")
def test_a_wrong_provider_is_not_timed(tmp_path, monkeypatch, capsys):
    bench = BENCHES["repulsion_step_"]
    wrong = harness.Provider("wrong", lambda case, given: lambda: torch.zeros(case["B"], dtype=torch.int64))
    monkeypatch.setitem(bench.__dict__, "baselines", [*bench.baselines, wrong])
    path = tmp_path / "rows.csv"
    assert cli.main([*ARGS, "--csv", str(path)]) == 1
    assert "wrong" not in {row["provider"] for row in record.read(path)}
    assert "1 FAILED" in capsys.readouterr().out


@pytest.mark.parametrize("path", sorted(record.RESULTS.glob("*.csv")), ids=lambda path: path.name)
def test_recorded_rows_have_the_columns_of_new_ones(path):
    """append() refuses a file with other columns."""
    own = {"prefill.csv": prefill.COLUMNS, "serving.csv": serving.COLUMNS, "ways.csv": ways.COLUMNS}
    assert tuple(record.read(path)[0]) == own.get(path.name, record.COLUMNS)


def test_gpu_numbers_of_the_docs_are_rows():
    """The H200 table of docs/performance.md: op and Gram loop, CUDA graph and eager, with a cold L2 cache. A cell is
    empty where there is no row."""
    rows = {
        (row["dtype"], row["B"], row["N"], row["K"], row["provider"], row["mode"]): float(row["p50_us"])
        for row in record.read(record.RESULTS / "nvidia-h200.csv")
        if (row["op"], row["C"], row["data"], row["cold_l2"]) == ("repulsion_select", "1024", "gaussian", "1")
    }
    page = (record.ROOT / "docs/performance.md").read_text()
    table = page.split("| B x N / K |")[1].split("\n\n")[0].splitlines()[2:]
    assert table
    for line in table:
        shape, *said = (cell.strip() for cell in line.strip("|").split("|"))
        sizes, _, dtype = shape.partition(", ")
        *batch, tokens = sizes.split(" / ")[0].split(" x ")
        key = dtype or "bfloat16", (batch or ["1"])[0], tokens, sizes.split(" / ")[1]
        ways = [(provider, mode) for provider in ("native", "gram loop") for mode in ("graph", "eager")]
        assert said == [str(round(rows[(*key, *way)])) if (*key, *way) in rows else "" for way in ways], shape
        assert said[0], shape


def test_a_file_with_other_columns_is_left_alone(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("some,other,table\n")
    with pytest.raises(ValueError, match="other columns"):
        record.append(path, [])
    assert path.read_text() == "some,other,table\n"


def test_dry_run_measures_nothing(tmp_path, capsys):
    path = tmp_path / "rows.csv"
    assert cli.main([*ARGS, "--csv", str(path), "--dry-run"]) == 0
    assert "repulsion_step_  main: B=1 N=576 C=1024 float32" in capsys.readouterr().out
    assert not path.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--op", "nonsense"], "no op nonsense"),
        (["--shapes", "N=7"], "nothing to time"),
        (
            ["--op", "last_query_scores", "--providers", "triton", "--device", "cpu"],
            "no triton on cpu; there are reference",
        ),
        (["--op", "nearest", "--providers", "nothing", "--dry-run"], "no nothing on cpu; there are"),
        (["--threads", "0"], "--threads must be at least 1, got 0"),
        (["--threads", "-1"], "--threads must be at least 1, got -1"),
        (["--device", "tpu9"], "expected cpu or cuda"),
        (["--device", "meta"], "expected cpu or cuda"),
    ],
)
def test_bad_options(arguments, message, capsys):
    with pytest.raises(SystemExit) as exit_:
        cli.main(arguments)
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


def test_plot(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    rows = tmp_path / "rows.csv"
    with rows.open("w", newline="") as file:
        writer = csv.DictWriter(file, record.COLUMNS, restval="")
        writer.writeheader()
        for name in ("native", "gram loop"):
            for tokens in (576, 2880):
                shape = {"B": 1, "N": tokens, "C": 1024, "K": 192}
                row = {
                    "op": plot.OP,
                    "provider": name,
                    "group": "main",
                    "dtype": "float32",
                    "data": "gaussian",
                    **shape,
                }
                writer.writerow({**row, "mode": "eager", "cold_l2": 0, "p50_us": tokens, "threads": 2})
    picture = tmp_path / "plot.png"
    assert plot.draw(record.read(rows), picture) == 2
    assert picture.read_bytes().startswith(b"\x89PNG")
    empty = tmp_path / "empty.csv"
    empty.write_text(",".join(record.COLUMNS) + "\n")
    assert cli.main(["--plot", str(tmp_path / "none.png"), "--csv", str(empty)]) == 2
    assert cli.main(["--plot", str(tmp_path / "none.png"), "--csv", str(tmp_path / "missing.csv")]) == 2
    assert not (tmp_path / "none.png").exists()


OPS = ["repulsion_select", "last_query_scores"]


@pytest.fixture
def shadowed(tmp_path, monkeypatch):
    """The imported package has no library and shadows an installed package with one."""
    installed = tmp_path / "site packages" / "sts_kernels"
    installed.mkdir(parents=True)
    (installed / "libsts_kernels.so").touch()
    (installed / "build_info.json").write_text('{"cuda": "13.0", "commit": "abc"}')
    others = [entry for entry in sys.path if not Path(entry or ".", "sts_kernels").exists()]
    monkeypatch.setattr(sys, "path", [str(installed.parent), *others])  # the environment may have sts_kernels installed
    monkeypatch.setattr(backends._native, "LIBRARY", tmp_path / "libsts_kernels.so")
    monkeypatch.setattr(type(OPS_TABLE["repulsion_select"]), "backend", lambda op, key: "reference")
    monkeypatch.delenv("STS_KERNELS_DISABLE", raising=False)
    return installed


@pytest.mark.parametrize(
    ("commit", "remedy"),
    [
        ("abc", "`cp '{0}/libsts_kernels.so' '{0}/build_info.json' {1}` copies that library"),
        ("unknown", "`cp '{0}/libsts_kernels.so' '{0}/build_info.json' {1}` copies that library"),
        ("def", "pip install --no-deps .` compiles one and copies it here"),  # never another commit's library
    ],
)
def test_a_shadowed_library_is_named(shadowed, monkeypatch, commit, remedy):
    monkeypatch.setattr(record, "commit", lambda: commit)
    why = backends.shortfall(torch.device("cpu"), OPS)
    assert why.startswith("stopped: the reference of repulsion_select would be timed: ")  # a Triton op has no CPU code
    assert f"shadows {shadowed}, which has one (commit abc); " in why
    assert remedy.format(shadowed, backends.PACKAGE) in why
    assert why.endswith(", or --allow-reference")
    assert "\n" not in why


@pytest.mark.usefixtures("small_peaks")
def test_a_run_stops_when_its_time_is_over(tmp_path, capsys):
    assert cli.main([*ARGS, "--csv", str(tmp_path / "rows.csv"), "--seconds", "1e-9"]) == 0
    assert "1e-09 s are over; left out: " in capsys.readouterr().out


def test_only_a_library_that_serves_the_device_is_named(shadowed):
    assert backends.elsewhere("CUDA") == shadowed
    (shadowed / "build_info.json").write_text('{"cuda": ""}')
    assert backends.elsewhere("CUDA") is None
    assert backends.elsewhere("CPU") == shadowed


@pytest.mark.usefixtures("shadowed", "small_peaks")
@pytest.mark.parametrize("providers", [[], ["--providers", "native", "reference"]])
def test_the_reference_is_not_timed_unasked(tmp_path, capsys, providers):
    path = tmp_path / "rows.csv"
    arguments = [*(argument for argument in ARGS if argument != "--allow-reference"), "--csv", str(path)]
    with pytest.raises(SystemExit) as exit_:
        cli.main([*arguments, *providers])
    assert exit_.value.code == backends.STATUS
    printed = capsys.readouterr()
    assert f"in {backends.PACKAGE}, " in printed.out
    assert "CPU: repulsion_step_ reference" in printed.out
    assert printed.err.startswith("stopped: the reference of repulsion_step_ would be timed")
    assert not path.exists()
    assert cli.main([*arguments, "--providers", "reference"]) == 0
    assert cli.main([*arguments, "--allow-reference"]) == 0
    assert {row["provider"] for row in record.read(path)} >= {"reference"}


@pytest.mark.parametrize("module", ["overhead", "backends", "prefill", "decode_plans"])
def test_every_benchmark_stops(module, shadowed, tmp_path, capsys):
    main = importlib.import_module(f"bench.{module}").main
    arguments = [] if module == "overhead" else ["--device", "cpu"]
    if module in ("overhead", "prefill"):
        arguments += ["--csv", str(tmp_path / "rows.csv")]
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == backends.STATUS
    printed = capsys.readouterr()
    assert printed.out.startswith("times sts_kernels ")
    assert printed.err.startswith("stopped: the reference of ")


def test_without_triton(monkeypatch):
    monkeypatch.setattr(type(OPS_TABLE["last_query_scores"]), "backend", lambda op, key: "reference")
    why = backends.shortfall(torch.device("cuda"), ["last_query_scores"])
    assert "triton is not installed; `pip install triton`, or --allow-reference" in why
    assert backends.shortfall(torch.device("cpu"), ["last_query_scores"]) == ""


def test_a_checkout_shadows_the_installed_package(tmp_path):
    """Runs in a separate process, to test Python's real import order."""
    checkout, installed = tmp_path / "checkout", tmp_path / "installed" / "sts_kernels"
    skip = shutil.ignore_patterns("*.so", "build_info.json", "__pycache__", "results")
    for name in ("bench", "sts_kernels"):
        shutil.copytree(record.ROOT / name, checkout / name, ignore=skip)
    installed.mkdir(parents=True)
    (installed / "libsts_kernels.so").touch()
    environment = {k: v for k, v in os.environ.items() if k != "STS_KERNELS_DISABLE"}
    run = subprocess.run(
        [sys.executable, "-m", "bench.backends", "--device", "cpu"],
        cwd=checkout,
        env={**environment, "PYTHONPATH": str(installed.parent)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == backends.STATUS, run.stderr
    assert f"in {checkout}/sts_kernels, no library loaded" in run.stdout
    assert f"`cp {installed}/libsts_kernels.so {installed}/build_info.json {checkout}/sts_kernels`" in run.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_gpu_check_without_a_gpu(tmp_path):
    script = record.ROOT / "bench" / "gpu_check.sh"
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    run = subprocess.run(["bash", script, tmp_path], capture_output=True, text=True, env={**os.environ, "PATH": path})
    assert run.returncode == 3
    assert "sees no CUDA GPU" in run.stdout
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("section", ["bench", "models"])
def test_gpu_check_stops_where_the_reference_would_be_timed(tmp_path, section):
    """Without the section "build" it stops before any section. The fake python3 reports a GPU and no library."""
    python = tmp_path / "bin" / "python3"
    python.parent.mkdir()
    python.write_text('#!/bin/sh\necho "$*" >>"$CALLS"\n[ "$1" = -c ] || exit 4\n')
    python.chmod(0o755)
    environment = {"PATH": f"{python.parent}:{os.environ['PATH']}", "CALLS": str(tmp_path / "calls")}
    script = ["bash", record.ROOT / "bench" / "gpu_check.sh", tmp_path / "out"]
    run = subprocess.run(script, env={**os.environ, **environment, "STS_CHECK_SECTIONS": section}, capture_output=True)
    assert run.returncode == backends.STATUS
    assert (tmp_path / "calls").read_text().endswith("\n-m bench.backends --device cuda\n")
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("data", ["gaussian", "smooth"])
def test_features_are_laid_out_as_a_model_leaves_them(data):
    """Contiguous: some providers would copy transposed features, others would read them with strides."""
    x = inputs.features(2, 50, 16, torch.bfloat16, torch.device("cpu"), data)
    assert x.shape == (2, 50, 16)
    assert x.is_contiguous()
    assert torch.equal(x, inputs.features(2, 50, 16, torch.bfloat16, torch.device("cpu"), data))


def test_what_waits_for_a_gpu_has_valid_commands(capsys, monkeypatch):
    monkeypatch.setattr(ways, "draw", lambda rows, png: None)  # matplotlib is optional
    notes = (record.ROOT / "bench" / "NOTES.md").read_text()
    table = notes.partition("## What waits for a GPU")[2].partition("\n## ")[0]
    assert re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE) == list(waiting.STEPS)
    for step in waiting.STEPS.values():
        module, *arguments = shlex.split(step.module)
        if module == "bench":
            assert cli.main([*arguments, "--device", "cpu", "--dry-run"]) == 0
            assert ": native\n" in capsys.readouterr().out
        elif module == "bench.ways":  # parses, then would draw
            rows = str(record.ROOT / "bench" / "results" / "ways.csv")
            assert ways.main([*arguments, "--csv", rows, "--plot", "ways.png"]) == 0
        else:
            command = [sys.executable, "-m", module, *arguments, "--collect-only"]
            found = subprocess.run(command, cwd=record.ROOT, capture_output=True, text=True)
            assert found.returncode == 0, found.stdout


def test_a_step_that_waits_for_a_gpu(tmp_path, monkeypatch):
    steps = {
        "good": waiting.Step(9, "timeit -n 1 -r 1 'import os; print(os.environ[\"POINTS\"])'", {"POINTS": "16"}),
        "bad": waiting.Step(9, "timeit -n 1 -r 1 unknown"),
        "long": waiting.Step(1, "timeit -n 1 -r 1 'import time; time.sleep(60)'"),
    }
    monkeypatch.setattr(waiting, "STEPS", steps)
    assert [waiting.run(name, tmp_path, None) for name in steps] == ["passed", "failed, exit status 1", "stopped"]
    assert (tmp_path / "good.log").read_text().startswith("16\n")
    assert "unknown" in (tmp_path / "bad.log").read_text()
