"""Build for pip: finds torch's headers, CMake and Ninja, runs the CMake build, and tags the wheel.

Environment:
    STS_KERNELS_CUDA=auto|0|1       CUDA kernels. auto (default): if there is an nvcc. 0: none. 1: an error without nvcc
    STS_KERNELS_NATIVE=auto|0|1     library. auto (default): required on Linux, none elsewhere. 0: none. 1: required
    STS_KERNELS_TORCH_INCLUDE=DIR   the torch/include folder to compile against, instead of an installed torch's
    TORCH_CUDA_ARCH_LIST, CUDA_HOME, CUDACXX, CXX, MAX_JOBS    as in other CUDA extensions
"""

import functools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import setuptools

if int(setuptools.__version__.partition(".")[0]) < 77:  # possible only without build isolation
    raise SystemExit(f'setuptools 77 or newer is needed, found {setuptools.__version__}: pip install "setuptools>=77"')

from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build import build

ROOT = Path(__file__).resolve().parent
PRODUCTS = ("libsts_kernels.so", "build_info.json")
TORCH_FLOOR = (2, 10)
CMAKE_FLOOR = (3, 25)


def switch(name: str) -> str:
    value = os.environ.get(name) or "auto"
    if value not in ("auto", "0", "1"):
        raise SystemExit(f"{name} must be auto, 0 or 1, got {value!r}")
    return value


def interpreters() -> Iterator[tuple[str, dict]]:
    """(Python, environment) pairs that may have torch: this Python first, then guesses.

    A wrong guess is harmless: the library uses torch's stable ABI, so it compiles against the headers of any torch from
    TORCH_FLOOR on.
    """
    yield sys.executable, dict(os.environ)  # without build isolation, or with torch as an extra build requirement
    # pip isolates a build by these two variables only.
    outside = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONNOUSERSITE")}
    yield sys.executable, outside
    # uv and `python -m build` put their own virtual environment first on PATH. uv installs into the active environment,
    # else into the nearest .venv.
    here = Path(os.environ.get("PWD") or ROOT)
    local = (str(folder / ".venv/bin") for start in (here, ROOT) for folder in (start, *start.parents))
    own = {Path(sys.prefix, "bin"), Path(sys.executable).parent}
    for folder in dict.fromkeys([*os.get_exec_path(), *local]):
        python = shutil.which("python3", path=folder) or shutil.which("python", path=folder)
        if python and Path(folder) not in own:
            yield python, outside


def installed_torches() -> Iterator[Path]:
    """Folders of installed torches, found without importing them."""
    probe = "import importlib.util as u; s = u.find_spec('torch'); print(s.submodule_search_locations[0] if s else '')"
    for python, environment in interpreters():
        try:
            run = subprocess.run(
                [python, "-c", probe], env=environment, cwd=sys.prefix, capture_output=True, text=True, timeout=60
            )
        except (OSError, subprocess.TimeoutExpired):
            continue
        if run.returncode == 0 and run.stdout.strip():
            yield Path(run.stdout.strip().splitlines()[-1])  # a sitecustomize may print too


def headers_version(include: Path) -> tuple[int, ...] | None:
    """Version of torch's headers; None if they have no stable ABI."""
    try:
        text = (include / "torch/headeronly/version.h").read_text()
    except OSError:
        return None
    return tuple(int(re.search(rf"TORCH_VERSION_{part}\s+(\d+)", text)[1]) for part in ("MAJOR", "MINOR", "PATCH"))


WITHOUT_TORCH = """
Install PyTorch first, with one of:
    pip install "torch>=2.10" && pip install .
    uv pip install {requires} && uv pip install --no-build-isolation .
    pip install build {requires} && python -m build --wheel --no-isolation
Or name the headers of a torch that is elsewhere:
    STS_KERNELS_TORCH_INCLUDE=<site-packages>/torch/include pip install .
Or go without the library, on the PyTorch reference, which does the same and is far slower:
    STS_KERNELS_NATIVE=0 pip install .
""".format(requires='"torch>=2.10" "setuptools>=77" "cmake>=3.25" ninja')
WITHOUT_COMPILER = """
Install g++ (`apt-get install g++`, `dnf install gcc-c++`, `conda install -c conda-forge gxx`), or name one in CXX.
Or go without the library, on the PyTorch reference, which does the same and is far slower:
    STS_KERNELS_NATIVE=0 pip install .
"""


class Plan(NamedTuple):
    include: Path | None  # torch headers to compile against; None: no library
    reason: str = ""  # why there is no include folder
    remedy: str = ""  # commands that fix it


def torch_headers() -> Plan:
    """The torch/include folder to compile against, or why none was found."""
    floor = ".".join(map(str, TORCH_FLOOR))
    if given := os.environ.get("STS_KERNELS_TORCH_INCLUDE"):
        if not Path(given).is_dir():
            raise SystemExit(
                f"STS_KERNELS_TORCH_INCLUDE={given} is not a folder; it must be the torch/include folder of torch "
                f"{floor} or newer"
            )
        found = [(Path(given), f"STS_KERNELS_TORCH_INCLUDE={given}")]
    else:
        found = ((torch / "include", f"the torch in {torch.parent}") for torch in installed_torches())
    reason = f"torch {floor} or newer was not found in this Python, on PATH or in .venv"
    for number, (include, source) in enumerate(found):
        version = headers_version(include)
        if version and version[:2] >= TORCH_FLOOR:
            return Plan(include.resolve())
        if number == 0:
            what = f"is {'.'.join(map(str, version))}" if version else "is older or has no headers"
            reason = f"torch {floor} or newer is needed, and {source} {what}"
    return Plan(None, reason, WITHOUT_TORCH)


@functools.cache
def plan() -> Plan:
    if switch("STS_KERNELS_NATIVE") == "0":
        return Plan(None, "STS_KERNELS_NATIVE=0")
    if sys.platform != "linux":
        return Plan(None, f"the compiled library is for Linux, and this is {sys.platform}")
    compilers = shlex.split(os.environ.get("CXX", ""))[:1] or ["c++", "g++", "clang++"]
    if not any(map(shutil.which, compilers)):
        return Plan(None, f"no C++ compiler was found (looked for {', '.join(compilers)})", WITHOUT_COMPILER)
    return torch_headers()


def demanded() -> str:
    """Start of the error for a missing library; "" if the build may go without one."""
    for name in ("STS_KERNELS_NATIVE", "STS_KERNELS_CUDA"):
        if switch(name) == "1":
            return f"{name}=1, but "
    return "sts_kernels: " if sys.platform == "linux" and switch("STS_KERNELS_NATIVE") == "auto" else ""


def tool(name: str) -> str:
    """Path of CMake or Ninja: from the build environment's wheel, else from PATH."""
    try:
        module = __import__(name)
        folder = module.CMAKE_BIN_DIR if name == "cmake" else module.BIN_DIR
    except (ImportError, AttributeError):
        folder = None
    path = shutil.which(name, path=folder) if folder else None
    path = path or shutil.which(name)
    if path is None:
        raise SystemExit(f"{name} was not found: `pip install {name}`, or build without --no-build-isolation")
    if name == "cmake":
        text = subprocess.run([path, "--version"], capture_output=True, text=True).stdout
        found = tuple(map(int, re.search(r"(\d+)\.(\d+)", text).groups()))
        if found < CMAKE_FLOOR:
            raise SystemExit(f"cmake 3.25 or newer is needed, and {path} is {found[0]}.{found[1]}: `pip install cmake`")
    return path


# Variables that CMake reads once and caches: a change needs --fresh. The paths of CMake and Ninja are not among them:
# pip's isolation moves both on every build.
CACHED = "STS_KERNELS_CUDA TORCH_CUDA_ARCH_LIST CUDA_HOME CUDA_PATH CUDACXX CUDAHOSTCXX CXX CXXFLAGS CUDAFLAGS LDFLAGS"


def compile_library(include: Path, out: Path) -> None:
    """Configures, compiles and installs into `out`/sts_kernels. Incremental."""
    version = headers_version(include)
    print(f"sts_kernels: headers of torch {'.'.join(map(str, version))} in {include}", flush=True)
    tree = ROOT / "build" / "cmake"
    tree.mkdir(parents=True, exist_ok=True)
    settings = {name: os.environ.get(name) for name in CACHED.split()} | {
        name: shutil.which(name) for name in ("c++", "nvcc")
    }
    settings = json.dumps(settings | {"torch": [str(include), version]}, indent=1)
    remembered = tree / "settings.json"
    fresh = not remembered.exists() or remembered.read_text() != settings
    remembered.unlink(missing_ok=True)

    cmake, ninja = tool("cmake"), tool("ninja")
    options = {"CMAKE_MAKE_PROGRAM": ninja, "CMAKE_BUILD_TYPE": "Release", "TORCH_INCLUDE": include}
    options["STS_KERNELS_CUDA"] = switch("STS_KERNELS_CUDA")
    configure = [cmake, "-S", ROOT, "-B", tree, "-G", "Ninja", *(f"-D{k}={v}" for k, v in options.items())]
    compile_ = [cmake, "--build", tree, "--parallel", os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)]
    install = [cmake, "--install", tree, "--prefix", out, "--strip"]
    run(configure + ["--fresh"] * fresh)
    remembered.write_text(settings)
    run(compile_)
    run(install)


def run(command: list) -> None:
    if subprocess.run(command).returncode:
        raise SystemExit(
            "sts_kernels: the compiled library could not be built, see above. "
            "STS_KERNELS_CUDA=0 leaves out the CUDA kernels, STS_KERNELS_NATIVE=0 all compiled code."
        )


class BuildLibrary(setuptools.Command):
    """Builds the library and writes build_info.json. A missing library is an error, unless `demanded` returns ""."""

    description = "build sts_kernels/libsts_kernels.so with CMake"
    user_options = []  # noqa: RUF012
    editable_mode = False  # set by `pip install -e`

    def initialize_options(self):
        self.build_lib = None

    def finalize_options(self):
        self.set_undefined_options("build", ("build_lib", "build_lib"))

    def run(self):
        include, reason, remedy = plan()
        if not include and (demand := demanded()):
            raise SystemExit(f"\n{demand}the library cannot be built: {reason}.\n{remedy}")
        package = (ROOT if self.editable_mode else Path(self.build_lib)) / "sts_kernels"
        package.mkdir(parents=True, exist_ok=True)
        if include:
            compile_library(include, package.parent)
            if not self.editable_mode:  # so that `python -m sts_kernels` in a checkout has the library
                for name in PRODUCTS:
                    (ROOT / "sts_kernels" / name).unlink(missing_ok=True)  # a process may have the old file mapped
                    shutil.copy2(package / name, ROOT / "sts_kernels" / name)
        else:
            self.without_library(package, reason)
        info = json.loads((package / "build_info.json").read_text())
        print(f"sts_kernels {info['version']}: built {info['summary']}", flush=True)

    def without_library(self, package, reason):
        (package / "libsts_kernels.so").unlink(missing_ok=True)  # left by an earlier build
        info = {
            "version": self.distribution.get_version(),
            "summary": f"no compiled library ({reason})",
            "library": False,
            "reason": reason,
            "cuda": "",
        }
        (package / "build_info.json").write_text(json.dumps(info, indent=2) + "\n")
        for name in PRODUCTS if package != ROOT / "sts_kernels" else ():  # left in the checkout by an earlier build
            (ROOT / "sts_kernels" / name).unlink(missing_ok=True)

    def get_source_files(self):
        return ["CMakeLists.txt", *(str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob("*") if p.is_file())]

    def get_outputs(self):
        names = PRODUCTS if plan().include else PRODUCTS[1:]
        return [] if self.editable_mode else [str(Path(self.build_lib, "sts_kernels", name)) for name in names]

    def get_output_mapping(self):
        return {}


class Build(build):
    # The library is built first, so that its error is the only output.
    sub_commands = [("build_library", None), *build.sub_commands]  # noqa: RUF012


class Wheel(bdist_wheel):
    def get_tag(self):
        # The library does not use Python's C API: one wheel serves all versions of Python.
        return ("py3", "none", super().get_tag()[2])


class Distribution(setuptools.Distribution):
    def has_ext_modules(self):
        return plan().include is not None


setuptools.setup(
    packages=[*setuptools.find_packages(include=["sts_kernels*"]), "sts_kernels.pictures"],
    distclass=Distribution,
    cmdclass={"build": Build, "build_library": BuildLibrary, "bdist_wheel": Wheel},
)
