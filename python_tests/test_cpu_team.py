"""The threads that share the loops of a CPU kernel, under the sanitizers."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
COMPILER = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")


@pytest.mark.slow
@pytest.mark.skipif(not COMPILER, reason="there is no C++ compiler: install g++, or set CXX")
@pytest.mark.parametrize("sanitizer", ["thread", "address,undefined"])
def test_every_row_is_run_once(tmp_path, sanitizer):
    program = tmp_path / "cpu_team"
    options = ["-std=c++17", "-O1", "-g", "-pthread", f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all"]
    source = [f"-I{HERE.parent / 'csrc'}", str(HERE / "cpu_team.cpp"), "-o", str(program)]
    subprocess.run([COMPILER, *options, *source], check=True)
    run = subprocess.run([program], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stdout + run.stderr
