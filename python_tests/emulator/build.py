"""Builds the programs and the Python module of the emulator, with the CMake project beside this file."""

import fcntl
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path

import torch

SOURCE = Path(__file__).resolve().parent
CSRC = SOURCE.parents[1] / "csrc"
BUILDS = SOURCE.parents[1] / "build"

MODULE = "sts_kernels_emulated"
PROGRAM = "sts_kernels_smoke_emulated"
OPS = "sts_kernels_emulated_ops"
GPU_PROGRAM = "sts_kernels_smoke"


class BuildError(RuntimeError):
    """The message holds the output of the failed command."""


def missing_tool(module: bool = True) -> str:
    """What is missing to build the emulated kernels (`module`: their Python module), as a sentence; "" for nothing."""
    for name in ("cmake", "ninja"):
        if not _tool(name):
            return f"{name} is not installed: pip install {name}"
    if module and importlib.util.find_spec("pybind11") is None:
        return "pybind11 is not installed: pip install pybind11"
    if not (os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")):
        return "there is no C++ compiler: install g++, or set CXX"
    return ""


def build(folder: Path, target: str, options: Sequence[str] = ()) -> Path:
    """Configures with `options`, builds `target` in `folder`, and returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # tests may run in several processes
        make = f"-DCMAKE_MAKE_PROGRAM={_tool('ninja')}"
        _run(_tool("cmake"), "-S", SOURCE, "-B", folder, "-G", "Ninja", make, *options)
        _run(_tool("cmake"), "--build", folder, "--target", target)
    return next(path for path in folder.glob(f"{target}*") if path.is_file())


def program(sanitizer: str = "") -> Path:
    """The emulated program; `sanitizer`: address (and undefined) or thread."""
    options = (f"-DSTS_SANITIZE={sanitizer}", "-DSTS_EMULATED_MODULE=OFF")
    return build(BUILDS / f"emulator-{sanitizer or 'plain'}", PROGRAM, options)


def gpu_program() -> Path:
    """The program for a GPU; needs nvcc."""
    return build(BUILDS / "smoke", GPU_PROGRAM, ("-DSTS_KERNELS_CUDA=1",))


def module():
    """The emulator's Python module, imported."""
    path = build(BUILDS / "emulator-module", MODULE, (f"-DPython_EXECUTABLE={sys.executable}",))
    spec = importlib.util.spec_from_file_location(MODULE, path)
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def ops() -> Path:
    """The library of torch.ops.sts_kernels_emulated."""
    include = Path(torch.__file__).parent / "include"
    return build(BUILDS / "emulator-ops", OPS, (f"-DSTS_EMULATED_OPS={include}", "-DSTS_EMULATED_MODULE=OFF"))


def _tool(name: str) -> str | None:
    """From PATH, or from where pip puts programs."""
    return shutil.which(name) or shutil.which(name, path=sysconfig.get_path("scripts"))


def _run(*command) -> None:
    run = subprocess.run([str(c) for c in command], capture_output=True, text=True)
    if run.returncode:
        raise BuildError(f"{' '.join(map(str, command))} failed:\n{run.stdout[-8000:]}\n{run.stderr[-4000:]}")
