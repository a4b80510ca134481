"""Runs the kernels on a GPU without torch, and judges what comes out; under compute-sanitizer and ncu too.

    cmake -S python_tests/emulator -B build/smoke -G Ninja -DSTS_KERNELS_CUDA=1 && cmake --build build/smoke
    python -m python_tests.emulator.smoke --binary build/smoke/sts_kernels_smoke --out build/smoke/run
    python -m python_tests.emulator.smoke --binary build/smoke/sts_kernels_smoke --out build/smoke/memcheck \\
        --under "compute-sanitizer --tool memcheck --error-exitcode 9"

racecheck takes much longer a call than the other tools; 92 calls reach every kernel and algorithm:

    python -m python_tests.emulator.smoke --binary build/smoke/sts_kernels_smoke --out build/smoke/racecheck \\
        --work 6e4 --per-kernel 1 --under "compute-sanitizer --tool racecheck --error-exitcode 9"

The kernel primitive_cluster needs compute capability 9.0, and primitive_hopper_matmul code for sm_90a.
Exit status 0: every result is right and the program ended well. 1: not so, and the reason is printed.
"""

import argparse
import shlex
import sys
import time
from collections import defaultdict
from pathlib import Path

from . import calls, operations, primitives


def smoke_calls(work: float, per_kernel: int | None = None) -> list[calls.Call]:
    """Every primitive, and every kernel on the cases that cost at most `work` (operations.work).

    `per_kernel`: max calls of each algorithm of a kernel; the most expensive calls are taken.
    """
    made = [*primitives.calls(), *operations.calls(work)]
    kept = defaultdict(list)
    for call in made:
        kept[call.kernel, call.way].append(call)
    return made if per_kernel is None else [call for group in kept.values() for call in group[-per_kernel:]]


def positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise ValueError
    return number


def main(arguments=None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m python_tests.emulator.smoke", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--binary", required=True, type=Path, help="sts_kernels_smoke, or its emulated twin")
    parser.add_argument("--out", required=True, type=Path, help="folder for the arguments and results; made if missing")
    parser.add_argument("--under", default="", help="a command to run the program under")
    parser.add_argument("--work", default=3e6, type=float, help="leave out cases that cost more: B * N * N * C")
    parser.add_argument("--per-kernel", type=positive, metavar="N", help="max calls of each kernel and algorithm")
    parser.add_argument("--kernels", default="", help="only kernels whose name contains this")
    parser.add_argument("--timeout", default=300, type=float, help="seconds the program may take")
    options = parser.parse_args(arguments)
    if not options.binary.is_file():
        parser.error(f"--binary: there is no {options.binary}")
    chosen = [call for call in smoke_calls(options.work, options.per_kernel) if options.kernels in call.kernel]
    if not chosen:
        parser.error(f"--kernels: no kernel's name contains {options.kernels!r}")
    options.out.mkdir(parents=True, exist_ok=True)
    command = [*shlex.split(options.under), str(options.binary.resolve())]
    start = time.perf_counter()
    try:
        calls.run_program(command, chosen, options.out, options.timeout)
    except AssertionError as error:
        print(f"FAILED: {error}", file=sys.stderr)
        return 1
    kernels = len({call.kernel for call in chosen})
    print(f"{len(chosen)} calls of {kernels} kernels are right, {time.perf_counter() - start:.1f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
