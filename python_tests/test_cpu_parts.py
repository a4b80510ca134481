"""Parts of the host code that op tests cannot reach on every machine: races of threads, other vector widths."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).resolve().parent
CSRC = HERE.parent / "csrc"
TORCH = Path(torch.__file__).parent / "include"
COMPILER = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not COMPILER, reason="there is no C++ compiler: install g++, or set CXX"),
]
# Lanes -> torch's name of the CPU capability, compiler options. A CPU with AVX512 runs all widths.
WIDTHS = {
    4: ("DEFAULT", ()),
    8: ("AVX2", ("-mavx2", "-mfma", "-mf16c")),
    16: ("AVX512", ("-march=x86-64-v4",)),
}


def run(folder, *source_and_options):
    program = folder / "program"
    options = ["-std=c++17", "-O2", "-g", "-pthread", f"-I{CSRC}", f"-I{TORCH}", "-fno-sanitize-recover=all"]
    subprocess.run([COMPILER, *options, *source_and_options, "-o", program], check=True)
    done = subprocess.run([program], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("sanitizer", ["thread", "address,undefined"])
def test_team_runs_every_row_once(tmp_path, sanitizer):
    run(tmp_path, f"-fsanitize={sanitizer}", HERE / "cpu_team.cpp")


@pytest.mark.parametrize("sanitizer", ["thread", "address,undefined"])
def test_the_driver_is_asked_once(tmp_path, sanitizer):
    run(tmp_path, f"-fsanitize={sanitizer}", HERE / "plan_cache.cpp")


@pytest.mark.parametrize("lanes", WIDTHS)
def test_math_of_every_width(tmp_path, lanes):
    needs, options = WIDTHS[lanes]
    has = torch.backends.cpu.get_cpu_capability()
    if lanes > 4 and has not in (needs, "AVX512"):
        pytest.skip(f"this processor has no vectors of {lanes} floats: torch calls it {has}")
    width = (f"-DSTS_CPU_LANES={lanes}", *options)
    run(tmp_path, "-fsanitize=address,undefined", *width, CSRC / "cpu" / "vector_math.cpp", HERE / "vector_math.cpp")
