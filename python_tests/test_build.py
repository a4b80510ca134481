"""The build: the library's dependencies and symbols, wheels, and the messages where something is missing."""

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
# System libraries that any C++ library needs.
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
    # Nor the symbols of the static CUDA runtime: torch's CUDA runtime would override them.
    assert [name for name, _, defined in symbols(library) if defined] == []


def test_stream_symbol_is_weak(library):
    """A CPU-only torch lacks this symbol, and must be able to load the library."""
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
def test_check_of_the_cubins_sees_a_stack_an_early_access_and_a_missing_architecture(tmp_path):
    if shutil.which("nvcc") is None or cubins().find_cuobjdump() is None:
        pytest.skip("needs nvcc and cuobjdump")
    good = "__global__ void good(int* a) { a[threadIdx.x] += 1; }\n"
    bad = "__global__ void bad(int* a, int i) { volatile int t[9]; t[i] = 1; a[0] = t[i + 1]; }\n"
    waits = '__global__ void waits(const int* a, int* b) {{ {} asm("griddepcontrol.wait;" ::: "memory"); {} }}\n'
    load = "const int i = *a;"
    early, late = waits.format(load, "*b = i;"), waits.format("", load + " *b = i;")
    for name, source in {"good": good + late, "bad": good + bad, "early": early}.items():
        (tmp_path / f"{name}.cu").write_text(source)
        command = ["nvcc", "-c", "-gencode=arch=compute_90,code=sm_90", "-o", f"{name}.o", f"{name}.cu"]
        subprocess.run(command, cwd=tmp_path, check=True)

    def check(name, *expect):
        command = [sys.executable, CHECK_CUBINS, tmp_path / f"{name}.o", "--expect", *expect]
        run = subprocess.run(command, capture_output=True, text=True)
        return run.returncode, run.stderr

    assert check("good", "sm_90") == (0, "")
    assert check("bad", "sm_90") == (1, "error: bad on sm_90 keeps 40 bytes a thread in memory\n")
    assert check("early", "sm_90") == (1, "error: waits on sm_90 has LDG before it waits\n")
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


@pytest.fixture(scope="module")
def bare(tmp_path_factory, python_without_torch) -> dict:
    """Arguments of `build` that hide torch: python_without_torch, a PATH with only a C++ compiler, no .venv."""
    if shutil.which("c++") is None:
        pytest.skip("needs a C++ compiler")
    folder = tmp_path_factory.mktemp("path")
    (folder / "c++").symlink_to(shutil.which("c++"))
    return {"python": python_without_torch, "PATH": str(folder), "PWD": str(folder)}


def headers(folder: Path, version: str) -> Path:
    """The include folder of a fake torch, which holds only the files that the search reads."""
    file = folder / "torch/include/torch/headeronly/version.h"
    file.parent.mkdir(parents=True)
    parts = zip(("MAJOR", "MINOR", "PATCH"), version.split("."), strict=True)
    file.write_text("".join(f"#define TORCH_VERSION_{name} {number}\n" for name, number in parts))
    (folder / "torch/__init__.py").touch()
    return folder / "torch/include"


def environment_with(folder: Path, torch: str) -> Path:
    """The bin folder of a virtual environment with a fake torch, whose version is `torch`."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    headers(packages, torch)
    return folder / "bin"


@pytest.mark.slow
@pytest.mark.parametrize("command", ["build", "bdist_wheel"])
def test_without_torch_the_build_fails_and_says_what_to_type(tree, bare, command):
    run = build(tree, command, **bare)
    assert run.returncode != 0
    assert "Traceback" not in run.stderr
    message = run.stderr[run.stderr.index("sts_kernels: ") :]
    reason = "torch 2.10 or newer was not found in this Python, on PATH or in .venv"
    assert message.startswith(f"sts_kernels: the library cannot be built: {reason}.\n")
    assert len(message.splitlines()) <= 12
    requires = re.findall(
        r'"([^"]+)"', re.search(r"^requires = \[(.*)\]", (ROOT / "pyproject.toml").read_text(), re.M)[1]
    )
    quoted = " ".join(r if r.isalpha() else f'"{r}"' for r in requires)
    for line in (
        'pip install "torch>=2.10" && pip install .',
        f'uv pip install "torch>=2.10" {quoted} && uv pip install --no-build-isolation .',
        f'pip install build "torch>=2.10" {quoted} && python -m build --wheel --no-isolation',
        "STS_KERNELS_TORCH_INCLUDE=<site-packages>/torch/include pip install .",
        "STS_KERNELS_NATIVE=0 pip install .",
    ):
        assert f"\n    {line}\n" in message
    assert not list(tree.glob("build/lib*/sts_kernels/libsts_kernels.so"))


@pytest.mark.slow
def test_metadata_needs_no_torch(tree, bare, tmp_path):
    for command in (["egg_info"], ["dist_info", "--output-dir", str(tmp_path)], ["sdist", "--dist-dir", str(tmp_path)]):
        run = build(tree, *command, **bare)
        assert run.returncode == 0, run.stderr
    assert (tmp_path / f"sts_kernels-{sts_kernels.__version__}.tar.gz").exists()


@pytest.mark.slow
@pytest.mark.parametrize("switch", ["STS_KERNELS_NATIVE", "STS_KERNELS_CUDA"])
def test_a_demand_that_cannot_be_met_is_named(tree, bare, switch):
    run = build(tree, "build", **bare, **{switch: "1"})
    assert run.returncode != 0
    assert f"{switch}=1, but the library cannot be built: torch 2.10 or newer was not found" in run.stderr
    if switch == "STS_KERNELS_CUDA":
        run = build(tree, "build", STS_KERNELS_CUDA="1", STS_KERNELS_NATIVE="0")
        assert run.stderr.strip() == "STS_KERNELS_CUDA=1, but the library cannot be built: STS_KERNELS_NATIVE=0."


@pytest.mark.slow
def test_without_a_compiler_the_build_fails_and_says_what_to_type(tree, tmp_path):
    for environment in ({"PATH": str(tmp_path), "CXX": ""}, {"CXX": "/nowhere/g++ -m64"}):
        run = build(tree, "build", **environment)
        assert run.returncode != 0
        assert "sts_kernels: the library cannot be built: no C++ compiler was found (looked for " in run.stderr
        assert "apt-get install g++" in run.stderr
        assert "STS_KERNELS_NATIVE=0 pip install ." in run.stderr


@pytest.mark.slow
def test_elsewhere_than_on_linux_there_is_only_the_reference(tree, python_without_torch):
    program = (
        "import sys, setuptools, setuptools.command.bdist_wheel; sys.platform = 'darwin'; __file__ = 'setup.py'; "
        "sys.argv = 'setup.py -q build --build-lib mac'.split(); exec(open('setup.py').read())"
    )
    run = subprocess.run([python_without_torch, "-c", program], cwd=tree, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    recorded = json.loads((tree / "mac/sts_kernels/build_info.json").read_text())
    assert recorded["reason"] == "the compiled library is for Linux, and this is darwin"


@pytest.mark.slow
def test_torch_is_found_in_the_environment_that_is_installed_into(tree, bare, tmp_path):
    """uv and `python -m build` run the build in another Python. The target environment is on PATH, or uv's .venv."""
    (tmp_path / "project/below").mkdir(parents=True)
    active = environment_with(tmp_path / "active", torch="2.98.0")
    local = environment_with(tmp_path / "project/.venv", torch="2.97.0")
    old = environment_with(tmp_path / "old", torch="2.9.1")
    ahead = f"{bare['python'].parent}{os.pathsep}{old}{os.pathsep}{active}{os.pathsep}{bare['PATH']}"
    for changes, found in (
        ({"PATH": ahead}, active),  # an older torch, and the build's own Python, are skipped
        ({"PWD": str(tmp_path / "project/below")}, local),
    ):
        run = build(tree, "build_library", **bare | changes)
        (packages,) = found.parent.glob("lib/python*/site-packages")
        version = "2.98.0" if found == active else "2.97.0"
        assert f"headers of torch {version} in {packages}/torch/include\n" in run.stdout
        assert "cmake was not found" in run.stderr  # so it was about to build
    run = build(tree, "build_library", **bare | {"PATH": f"{old}{os.pathsep}{bare['PATH']}"})
    assert re.search(r"torch 2.10 or newer is needed, and the torch in \S+/old/lib/\S+ is 2.9.1\.$", run.stderr, re.M)


@pytest.mark.slow
@pytest.mark.parametrize("python", ["#!/bin/sh\nexit 3\n", "#!/bin/sh\necho /nowhere/torch\n", "no program\n"])
def test_a_wrong_guess_breaks_nothing(tree, bare, tmp_path, python):
    (tmp_path / "python3").write_text(python)
    (tmp_path / "python3").chmod(0o755)
    good = environment_with(tmp_path / "good", torch="2.98.0")
    run = build(tree, "build_library", **bare | {"PATH": os.pathsep.join([str(tmp_path), str(good), bare["PATH"]])})
    assert "headers of torch 2.98.0 in " in run.stdout


@pytest.mark.slow
def test_old_torch_is_named(tree, tmp_path):
    include = headers(tmp_path, "2.9.1")
    for environment in ({}, {"STS_KERNELS_NATIVE": "1"}):
        run = build(tree, "build_library", STS_KERNELS_TORCH_INCLUDE=str(include), **environment)
        assert run.returncode != 0
        assert f"torch 2.10 or newer is needed, and STS_KERNELS_TORCH_INCLUDE={include} is 2.9.1" in run.stderr


@pytest.mark.slow
def test_old_setuptools_is_named(tree, tmp_path):
    (tmp_path / "setuptools.py").write_text("__version__ = '65.5.0'")
    program = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); __file__ = 'setup.py'; exec(open('setup.py').read())"
    run = subprocess.run([sys.executable, "-c", program], cwd=tree, capture_output=True, text=True)
    assert run.stderr == 'setuptools 77 or newer is needed, found 65.5.0: pip install "setuptools>=77"\n'


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
        data = ("libsts_kernels.so", "build_info.json", "py.typed", "explore.html")
        assert binary - pictures == {f"sts_kernels/{n}" for n in data}
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
    """pip's build isolation would download another torch, with gigabytes of CUDA."""
    text = (ROOT / "pyproject.toml").read_text()
    requires = re.search(r"^requires = \[(.*)\]", text, re.M)[1]
    assert sorted(re.findall(r'"(\w+)', requires)) == ["cmake", "ninja", "setuptools"]


def test_the_version_stands_in_two_places():
    """Static in pyproject.toml for uv, and in the package for a checkout."""
    assert re.search(r'^version = "(.+?)"', (ROOT / "pyproject.toml").read_text(), re.M)[1] == sts_kernels.__version__
