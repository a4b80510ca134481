"""Reads the machine code in a compiled library, without a GPU: architectures, and registers and memory of each kernel.

    python .ci/check_cubins.py LIBRARY [--expect sm_80 sm_90 ...]

Exit status 1 if the architectures are not the expected ones, if a kernel spills registers or uses stack memory, or if
one that may start early (programmatic dependent launch) accesses memory before it waits for the launch ahead.
Needs cuobjdump (of the CUDA toolkit, or of the triton wheel).
"""

import argparse
import importlib.util
import json
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, order=True)
class Kernel:
    name: str
    code: str  # sm_80, ...
    registers: int
    shared: int  # bytes of static shared memory; dynamic shared memory is extra
    stack: int  # bytes per thread: spilled registers, and arrays that are indexed at run time
    local: int

    @property
    def spills(self) -> bool:
        return bool(self.stack or self.local)


def newest_last(code: str):
    kind, arch = code.split("_")
    return kind != "sm", int(re.match(r"\d+", arch)[0]), arch


def find_cuobjdump() -> str | None:
    spec = importlib.util.find_spec("triton")
    bundled = Path(spec.origin).with_name("backends") / "nvidia/bin/cuobjdump" if spec else None
    return shutil.which("cuobjdump") or (str(bundled) if bundled and bundled.exists() else None)


def cuobjdump(*args) -> str:
    return subprocess.run([find_cuobjdump(), *args], check=True, capture_output=True, text=True).stdout


def code_in(library: Path) -> list[str]:
    """Architectures of the library's code: sm_80, ... for machine code, compute_100 for PTX."""
    listing = cuobjdump("-lelf", "-lptx", str(library))
    found = re.findall(r"\.sm_(\w+)\.(cubin|ptx)", listing)
    return sorted({f"{'sm' if kind == 'cubin' else 'compute'}_{arch}" for arch, kind in found}, key=newest_last)


def kernels_in(library: Path) -> list[Kernel]:
    kernels, code = set(), ""
    text = cuobjdump("-res-usage", str(library))
    names = iter(demangled(re.findall(r"^ Function (\S+):", text, re.M)))
    for line in text.splitlines():
        if line.startswith("arch = "):
            code = line.removeprefix("arch = ")
        elif line.startswith(" Function "):
            name = next(names)
        elif usage := re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", line):
            registers, stack, shared, local = map(int, usage.groups())
            kernels.add(Kernel(name, code, registers, shared, stack, local))
    return sorted(kernels)


# Accesses of global memory, generic ones included.
ACCESS = re.compile(r"(?:@!?U?P\d+ )?(LDG|STG|LD|ST|LDGSTS|RED|REDG|ATOM|ATOMG|UTMALDG|UBLKCP)\b")


def early_accesses(library: Path) -> list[str]:
    """Accesses of global memory above ACQBULK, the machine code of griddepcontrol.wait.

    The source has none (ptx.cuh: await_predecessor), but the compiler moves loads by __ldg across the wait: they
    promise that nobody writes to the memory.
    """
    found, code, symbol, accesses = [], "", "", []
    with subprocess.Popen([find_cuobjdump(), "-sass", str(library)], stdout=subprocess.PIPE, text=True) as run:
        for line in run.stdout:
            if "code for sm_" in line:
                code = line.split()[-1]
            elif "Function : " in line:
                symbol, accesses = line.split()[-1], []
            elif instruction := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;", line):
                if instruction[1].startswith("ACQBULK"):
                    found += [f"{demangled([symbol])[0]} on {code} has {a} before it waits" for a in accesses]
                elif access := ACCESS.match(instruction[1]):
                    accesses.append(access[1])
    if run.returncode:
        raise subprocess.CalledProcessError(run.returncode, run.args)
    return found


def demangled(symbols: list[str]) -> list[str]:
    """Names with template arguments, without parameters, return type and namespace."""
    if not symbols:
        return []
    run = subprocess.run(["c++filt", "-p"], input="\n".join(symbols), check=True, capture_output=True, text=True)
    return [re.sub(r"^void |\(anonymous namespace\)::|sts::", "", name) for name in run.stdout.splitlines()]


def print_table(kernels: list[Kernel]) -> None:
    """One line per kernel: registers, static shared memory, and the stack if it is not empty."""
    cells = {}
    for k in kernels:
        cells.setdefault(k.name, {})[k.code] = f"{k.registers} {k.shared}" + f" STACK {k.stack + k.local}" * k.spills
    columns = sorted({k.code for k in kernels}, key=newest_last)
    width = max(map(len, cells), default=0)
    print("registers and bytes of static shared memory:".ljust(width), *(f"{c:>16}" for c in columns))
    for name, row in cells.items():
        print(name.ljust(width), *(f"{row.get(c, '-'):>16}" for c in columns))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("library", type=Path)
    parser.add_argument(
        "--expect", nargs="+", help="default: the architectures in the build_info.json beside the library"
    )
    args = parser.parse_args()
    if find_cuobjdump() is None:
        print("cuobjdump was not found: install the CUDA toolkit, or `pip install triton`", file=sys.stderr)
        return 1
    build = json.loads(args.library.with_name("build_info.json").read_text()) if not args.expect else {}
    expected = sorted(args.expect or build["architectures"], key=newest_last)
    found, kernels = code_in(args.library), kernels_in(args.library)

    print_table(kernels)

    problems = [f"code for {', '.join(expected)} was expected, found {', '.join(found) or 'none'}"] * (
        found != expected
    )
    problems += [] if kernels else ["no kernel was found"]
    problems += [
        f"{k.name} on {k.code} keeps {k.stack + k.local} bytes a thread in memory" for k in kernels if k.spills
    ]
    problems += early_accesses(args.library)
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    print(f"{len(kernels)} kernels, code for {', '.join(found)}, {len(problems)} problems")
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main())
