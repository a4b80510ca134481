"""What the build makes: the library's dependencies and symbols, wheels, and what is said where something is missing."""

import functools
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import sts_kernels
from sts_kernels import _native

ROOT = Path(__file__).parents[1]
CHECK_CUBINS = ROOT / ".ci/check_cubins.py"
# What any C++ library needs of the system.
SYSTEM = re.compile(r"lib(stdc\+\+|m|gcc_s|c|dl|rt|pthread)\.so|ld-linux")
NO_NVCC = {"CUDACXX": "/nowhere/nvcc"}


@pytest.fixture(scope="module")
def library() -> Path:
    if not _native.LIBRARY.exists():
        pytest.skip(f"no compiled library to look at: {_native.status().reason}")
    if shutil.which("readelf") is None:
        pytest.skip("needs readelf (binutils)")
    return _native.LIBRARY


@functools.cache
def readelf(*args) -> str:
    return subprocess.run(["readelf", "-W", *args], check=True, capture_output=True, text=True).stdout


def dynamic(library: Path, tag: str) -> list[str]:
    return re.findall(rf"\({tag}\).*\[(.+)\]", readelf("-d", str(library)))


def symbols(library: Path) -> list[tuple[str, str, bool]]:
    """(name, binding, defined here) of the dynamic symbols."""
    rows = [line.split() for line in readelf("--dyn-syms", str(library)).splitlines()]
    return [(r[7].partition("@")[0], r[4], r[6] != "UND") for r in rows if len(r) > 7 and r[0] != "Num:"]


def test_library_needs_libtorch_and_the_system_only(library):
    needed = dynamic(library, "NEEDED")
    assert [name for name in needed if not SYSTEM.match(name)] == ["libtorch.so"]
    assert not dynamic(library, "RPATH")
    assert not dynamic(library, "RUNPATH")


def test_library_exports_nothing(library):
    # Not even the static CUDA runtime, whose symbols torch's own one would take over.
    assert [name for name, _, defined in symbols(library) if defined] == []


def test_stream_symbol_is_weak(library):
    """CPU-only torch lacks it, and has to be able to load the library."""
    streams = [row for row in symbols(library) if row[0] == "aoti_torch_get_current_cuda_stream"]
    if not _native.status().build["cuda"]:
        pytest.skip("the library was built without CUDA")
    assert [binding for _, binding, _ in streams] == ["WEAK"]
    cuda_only = ["torch_c10_cuda_check_msg", "aoti_torch_create_cuda_guard", "aoti_torch_create_cuda_stream_guard"]
    assert not {name for name, _, _ in symbols(library)} & set(cuda_only)


def test_library_uses_the_stable_abi_only(library):
    c_shims = re.compile(r"(aoti_)?torch_")
    of_torch = [name for name, _, defined in symbols(library) if not defined and ("torch" in name or "c10" in name)]
    assert of_torch
    assert [name for name in of_torch if not c_shims.match(name)] == []  # C++ names are mangled: _ZN2at...


def test_library_runs_on_the_oldest_supported_torch(library):
    audit = shutil.which(
        "torch-abi-audit", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    )
    if audit is None:
        pytest.skip("needs torch-abi-audit (`pip install torch-abi-audit`)")
    run = subprocess.run([audit, str(library), "--check", "torch", "--json"], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    (found,) = (part["torch"] for part in json.loads(run.stdout)["bundled_libs"])
    assert found["stable"]
    assert found["unknown_shim_symbols"] == []
    assert found["min_torch_version"] == "2.10.0"


def test_build_info_describes_the_library(library):
    build = _native.status().build
    assert build["version"] == sts_kernels.__version__
    assert build["library"] is True
    assert build["torch_target"] == "2.10"
    assert bool(build["cuda"]) == bool(build["architectures"])
    if build["cuda"] and importlib.util.find_spec("triton"):
        assert cubins().code_in(library) == build["architectures"]


def cubins():
    spec = importlib.util.spec_from_file_location("check_cubins", CHECK_CUBINS)
    module = sys.modules["check_cubins"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_check_of_the_cubins_sees_a_stack_and_a_missing_architecture(tmp_path):
    if shutil.which("nvcc") is None or cubins().find_cuobjdump() is None:
        pytest.skip("needs nvcc and cuobjdump")
    good = "__global__ void good(int* a) { a[threadIdx.x] += 1; }\n"
    bad = "__global__ void bad(int* a, int i) { volatile int t[9]; t[i] = 1; a[0] = t[i + 1]; }\n"
    for name, source in {"good": good, "bad": good + bad}.items():
        (tmp_path / f"{name}.cu").write_text(source)
        command = ["nvcc", "-c", "-gencode=arch=compute_90,code=sm_90", "-o", f"{name}.o", f"{name}.cu"]
        subprocess.run(command, cwd=tmp_path, check=True)

    def check(name, *expect):
        command = [sys.executable, CHECK_CUBINS, tmp_path / f"{name}.o", "--expect", *expect]
        run = subprocess.run(command, capture_output=True, text=True)
        return run.returncode, run.stderr

    assert check("good", "sm_90") == (0, "")
    assert check("bad", "sm_90") == (1, "error: bad on sm_90 keeps 40 bytes a thread in memory\n")
    for expect in (["sm_80"], ["sm_90", "compute_90"], ["sm_80", "sm_90"]):
        code, errors = check("good", *expect)
        assert code == 1
        assert errors == f"error: code for {', '.join(expect)} was expected, found sm_90\n"


# The build itself, in a copy of the source tree.


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    if importlib.util.find_spec("setuptools") is None:
        pytest.skip("needs setuptools")
    copy = tmp_path_factory.mktemp("build") / "tree"
    ignore = shutil.ignore_patterns(".*", "build", "*.egg-info", "*.so", "build_info.json", "__pycache__", "dist")
    shutil.copytree(ROOT, copy, ignore=ignore)
    return copy


def build(tree: Path, *command, python=sys.executable, **environment) -> subprocess.CompletedProcess:
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("STS_KERNELS_", "TORCH_CUDA_", "PYTHONPATH"))}
    return subprocess.run(
        [python, "setup.py", "-q", *command], cwd=tree, env=clean | environment, capture_output=True, text=True
    )


def info(tree: Path) -> dict:
    return json.loads(next(tree.glob("build/lib*/sts_kernels/build_info.json")).read_text())


@pytest.mark.slow
def test_cuda_on_demand_fails_without_nvcc(tree):
    run = build(tree, "build_library", STS_KERNELS_CUDA="1", **NO_NVCC)
    assert run.returncode != 0
    assert "STS_KERNELS_CUDA=1, but CUDACXX=/nowhere/nvcc is not there" in run.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("STS_KERNELS_CUDA", "yes", "STS_KERNELS_CUDA must be auto, 0 or 1, got 'yes'"),
        ("STS_KERNELS_NATIVE", "2", "STS_KERNELS_NATIVE must be auto, 0 or 1, got '2'"),
        ("STS_KERNELS_TORCH_INCLUDE", "/nowhere", "STS_KERNELS_TORCH_INCLUDE=/nowhere is not a folder"),
    ],
)
def test_wrong_environment_is_refused(tree, variable, value, message):
    run = build(tree, "build_library", **{variable: value})
    assert run.returncode != 0
    assert message in run.stderr
    assert "Traceback" not in run.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("architectures", "message"),
    [
        ("Hopper", "expected entries like 8.0, 9.0a or 10.0+PTX, got"),
        ("8.0 99.0", "does not know 99.0"),
        ("7.0", "names nothing from 8.0"),
    ],
)
def test_wrong_architectures_are_refused(tree, architectures, message):
    if shutil.which("nvcc") is None:
        pytest.skip("needs nvcc")
    run = build(tree, "build_library", STS_KERNELS_CUDA="1", TORCH_CUDA_ARCH_LIST=architectures)
    assert run.returncode != 0
    assert message in " ".join(run.stderr.split())


@pytest.fixture(scope="module")
def python_without_torch(tmp_path_factory) -> Path:
    """The interpreter of a virtual environment that has setuptools only."""
    venv = tmp_path_factory.mktemp("venv")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True)
    (packages,) = venv.glob("lib/python*/site-packages")
    installed = Path(importlib.util.find_spec("setuptools").origin).parents[1]
    for name in ["setuptools", "_distutils_hack", *(p.name for p in installed.glob("setuptools-*.dist-info"))]:
        (packages / name).symlink_to(installed / name)
    return venv / "bin/python"


@pytest.mark.slow
def test_without_torch_it_says_so_and_goes_on(tree, python_without_torch):
    run = build(tree, "build", python=python_without_torch)
    assert run.returncode == 0, run.stderr
    assert "WITHOUT its compiled library:\n  torch is not installed in the environment of this build" in run.stderr
    assert 'pip install "torch>=2.10"' in run.stderr
    assert "STS_KERNELS_TORCH_INCLUDE" in run.stderr
    assert info(tree)["library"] is False
    assert not info(tree)["cuda"]
    for switch in ("STS_KERNELS_NATIVE", "STS_KERNELS_CUDA"):
        run = build(tree, "build", python=python_without_torch, **{switch: "1"})
        assert run.returncode != 0
        assert f"{switch}=1, but no library can be built: torch is not installed" in run.stderr


@pytest.mark.slow
def test_old_torch_is_named(tree, tmp_path):
    header = tmp_path / "torch/headeronly/version.h"
    header.parent.mkdir(parents=True)
    header.write_text("#define TORCH_VERSION_MAJOR 2\n#define TORCH_VERSION_MINOR 9\n#define TORCH_VERSION_PATCH 1\n")
    run = build(tree, "build_library", STS_KERNELS_TORCH_INCLUDE=str(tmp_path), STS_KERNELS_NATIVE="1")
    assert run.returncode != 0
    assert f"torch 2.10 or newer is needed, and STS_KERNELS_TORCH_INCLUDE={tmp_path} is 2.9.1" in run.stderr


def wheel(tree: Path, out: Path, **environment) -> zipfile.ZipFile:
    run = build(tree, "bdist_wheel", "--dist-dir", str(out), **environment)
    assert run.returncode == 0, run.stdout + run.stderr
    (path,) = out.glob("*.whl")
    return zipfile.ZipFile(path)


def python_files(tree: Path) -> set[str]:
    return {str(p.relative_to(tree)) for p in (tree / "sts_kernels").rglob("*.py")}


@pytest.mark.slow
def test_wheel_serves_every_python(tree, tmp_path):
    with wheel(tree, tmp_path / "dist", STS_KERNELS_CUDA="0") as archive:
        names = set(archive.namelist())
        assert re.fullmatch(r"sts_kernels-[\d.]+-py3-none-linux_\w+\.whl", Path(archive.filename).name)
        assert {n for n in names if n.endswith(".py")} == python_files(tree)
        binary = {n for n in names if not n.endswith(".py") and ".dist-info/" not in n}
        pictures = {n for n in binary if n.startswith("sts_kernels/pictures/")}
        assert binary - pictures == {"sts_kernels/libsts_kernels.so", "sts_kernels/build_info.json"}
        assert pictures
        archive.extractall(tmp_path / "site")
    program = """
import sts_kernels, torch
from sts_kernels import _native, _registry
status = _native.status()
assert status.loaded, status
print(sts_kernels.__file__, status.build["version"], status.why("CUDA"))
assert _registry.OPS["repulsion_select"].backend("CPU") == "native"
assert sts_kernels.repulsion_select(torch.rand(1, 9, 4), 9).sort().values.tolist() == [list(range(9))]
"""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("STS_KERNELS_")}
    environment["PYTHONPATH"] = str(tmp_path / "site")
    run = subprocess.run([sys.executable, "-c", program], env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith(str(tmp_path / "site"))
    assert f" {sts_kernels.__version__} " in run.stdout
    assert "without CUDA" in run.stdout


@pytest.mark.slow
def test_wheel_without_library_is_pure_python(tree, tmp_path):
    with wheel(tree, tmp_path, STS_KERNELS_NATIVE="0") as archive:
        assert Path(archive.filename).name == f"sts_kernels-{sts_kernels.__version__}-py3-none-any.whl"
        assert not [n for n in archive.namelist() if n.endswith(".so")]
        recorded = json.loads(archive.read("sts_kernels/build_info.json"))
        assert recorded["reason"] == "STS_KERNELS_NATIVE=0"


def test_torch_is_no_build_requirement():
    """pip's isolation would fetch another torch, with gigabytes of CUDA."""
    text = (ROOT / "pyproject.toml").read_text()
    requires = re.search(r"^requires = \[(.*)\]", text, re.M)[1]
    assert sorted(re.findall(r'"(\w+)', requires)) == ["cmake", "ninja", "setuptools"]
