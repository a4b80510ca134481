"""`python -m bench.waiting OUT`: runs what waits for a GPU (NOTES.md), in the order of `STEPS`.

A step is stopped after its time; the others run. Each writes OUT/STEP.log, and its rows to OUT/STEP.csv. Rows do not
name their variant; the file does. The checkout is timed and must have its library. Delete a step here and in NOTES.md
once it is decided.
"""

import argparse
import importlib.util
import os
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch

from . import backends, record


@dataclass(frozen=True)
class Step:
    seconds: int
    module: str  # arguments of python -m
    environment: dict[str, str] = field(default_factory=dict)
    tool: str = ""  # runs python

    def command(self, name: str, out: Path, commit: str | None) -> list[str]:
        command = [*shlex.split(self.tool), sys.executable, "-m", *shlex.split(self.module)]
        if self.module.startswith("bench"):
            command += ["--csv", str(out / f"{name}.csv"), *(["--commit", commit] if commit else [])]
        return command


def ops_tests(seconds: int, names: str, tool: str = "", **environment: str) -> Step:
    files = " ".join(f"python_tests/test_{name}.py" for name in names.split())
    environment |= {"STS_KERNELS_TEST_REQUIRE": "cuda,native", "OMP_NUM_THREADS": "2"}
    workers = "-n 8" if importlib.util.find_spec("xdist") and not tool else ""
    return Step(seconds, f"pytest -q -m '' -k 'cuda and not emulated' {workers} {files}", environment, tool)


def rows(seconds: int, arguments: str, **environment: str) -> Step:
    # A case that starts in the last ten seconds would be stopped.
    common = f"--device cuda --quick --providers native --seconds {seconds - 10}"
    return Step(seconds, f"bench {common} --op {arguments}", environment)


STEPS = {
    "tests": ops_tests(
        200,
        "lookahead repulsion_select large repulsion_select_varlen "
        "pairwise_sqdist nearest knn_density scatter_mean dpp_select",
    ),
    "select": rows(60, "repulsion_select --shapes main batch ragged"),
    "plain": rows(40, "repulsion_select --shapes main batch", STS_KERNELS_LOOKAHEAD="1"),
    "small": rows(25, "repulsion_select --shapes sweep-N N=256"),
    "video": rows(40, "repulsion_select --shapes video"),
    "video16": rows(40, "repulsion_select --shapes video", STS_KERNELS_LOOKAHEAD="16"),
    "others": rows(70, "pairwise_sqdist repulsion_select_varlen nearest knn_density scatter_mean dpp_select"),
    "static640": Step(130, "bench.ways --model llava-next-7b --batch 1 --budget 640 --way captured static --samples 6"),
    "static16": Step(
        270, "bench.ways --model llava-1.5-7b --batch 16 --budget 128 --way captured-inductor static --samples 4"
    ),
    "memcheck": ops_tests(  # each scratch tensor is an allocation of its own
        100,
        "nearest knn_density pairwise_sqdist",
        "compute-sanitizer --tool memcheck --error-exitcode 9",
        PYTORCH_NO_CUDA_MEMORY_CACHING="1",
    ),
}


def run(name: str, out: Path, commit: str | None) -> str:
    """Runs a step, writes its log, and returns the verdict."""
    step, start = STEPS[name], time.monotonic()
    command = step.command(name, out, commit)
    print(f"{name}, at most {step.seconds} s: {shlex.join(command)}", flush=True)
    with (out / f"{name}.log").open("w") as log:
        status = subprocess.run(
            ["timeout", "-k", "5", str(step.seconds), *command],
            cwd=record.ROOT, env=os.environ | step.environment, stdin=subprocess.DEVNULL, stdout=log,
            stderr=subprocess.STDOUT,
        ).returncode  # fmt: skip
    last = (out / f"{name}.log").read_text(errors="replace").rstrip().rpartition("\n")[2]
    verdict = {0: "passed", 124: "stopped", 137: "stopped"}.get(status, f"failed, exit status {status}")
    print(f"    {verdict} after {time.monotonic() - start:.0f} s: {last[:200]}", flush=True)
    return verdict


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.waiting", description=__doc__.splitlines()[0].split(": ", 1)[1]
    )
    parser.add_argument("out", type=Path, help="folder for logs and rows")
    parser.add_argument("steps", nargs="*", metavar="STEP", help=f"default: all: {', '.join(STEPS)}")
    parser.add_argument("--commit", help="what to record as commit where there is no git checkout")
    args = parser.parse_args(argv)
    if unknown := [name for name in args.steps if name not in STEPS]:
        parser.error(f"expected {', '.join(STEPS)}, got {', '.join(unknown)}")
    if not torch.cuda.is_available():
        parser.error(f"torch {torch.__version__} sees no CUDA GPU")
    backends.stop_unless_compiled(torch.device("cuda"))
    args.out.mkdir(parents=True, exist_ok=True)
    verdicts = [run(name, args.out.resolve(), args.commit) for name in args.steps or STEPS]
    return int(set(verdicts) != {"passed"})


if __name__ == "__main__":
    sys.exit(main())
