"""What pip needs around CMakeLists.txt, which is the build: torch's headers, CMake and Ninja, a wheel tag.

Environment:
    STS_KERNELS_CUDA=auto|0|1       CUDA kernels: where there is an nvcc (default), never, or fail without one
    STS_KERNELS_NATIVE=auto|0|1     the compiled library: where torch's headers and a compiler are (default), never, or
                                    fail without them
    STS_KERNELS_TORCH_INCLUDE=DIR   the torch/include folder to compile against, instead of the installed torch's
    TORCH_CUDA_ARCH_LIST, CUDA_HOME, CUDACXX, CXX, MAX_JOBS    as in other CUDA extensions
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import setuptools
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


def installed_torch() -> Path | None:
    """The folder of the installed torch, found without importing it, also from inside pip's isolated environment."""
    # pip isolates a build by these two variables, so without them Python sees the environment that pip was called in.
    outside = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONNOUSERSITE")}
    probe = "import importlib.util as u; s = u.find_spec('torch'); print(s.submodule_search_locations[0] if s else '')"
    for env in (None, outside):
        run = subprocess.run([sys.executable, "-c", probe], env=env, cwd=sys.prefix, capture_output=True, text=True)
        if run.stdout.strip():
            return Path(run.stdout.strip())
    return None


def headers_version(include: Path) -> tuple[int, ...] | None:
    """The version of torch's headers; None where they lack the stable ABI altogether."""
    try:
        text = (include / "torch/headeronly/version.h").read_text()
    except OSError:
        return None
    return tuple(int(re.search(rf"TORCH_VERSION_{part}\s+(\d+)", text)[1]) for part in ("MAJOR", "MINOR", "PATCH"))


def torch_headers() -> tuple[Path | None, str]:
    """torch/include, or None and why there is none that serves."""
    floor = ".".join(map(str, TORCH_FLOOR))
    if given := os.environ.get("STS_KERNELS_TORCH_INCLUDE"):
        include, source = Path(given), f"STS_KERNELS_TORCH_INCLUDE={given}"
        if not include.is_dir():
            raise SystemExit(f"{source} is not a folder; it must be the torch/include folder of torch {floor} or newer")
    elif torch := installed_torch():
        include, source = torch / "include", f"the torch in {torch.parent}"
    else:
        return None, "torch is not installed in the environment of this build"
    version = headers_version(include)
    if version is None or version[:2] < TORCH_FLOOR:
        found = "is older or has no headers" if version is None else f"is {'.'.join(map(str, version))}"
        return None, f"torch {floor} or newer is needed, and {source} {found}"
    return include.resolve(), ""


def plan() -> tuple[Path | None, str]:
    """The torch headers to compile against, or None and why no library is built."""
    if switch("STS_KERNELS_NATIVE") == "0":
        return None, "STS_KERNELS_NATIVE=0"
    if sys.platform != "linux":
        return None, f"the compiled library is for Linux, and this is {sys.platform}"
    if not any(shutil.which(name) for name in (os.environ.get("CXX") or "c++", "g++", "clang++")):
        return None, "no C++ compiler was found (install g++, or set CXX)"
    return torch_headers()


def tool(name: str) -> str:
    """CMake or Ninja: the build environment's wheel, else what is on PATH."""
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


# What CMake reads once and then caches. Not CMake and Ninja themselves: pip's isolation moves them every time.
CACHED = "STS_KERNELS_CUDA TORCH_CUDA_ARCH_LIST CUDA_HOME CUDA_PATH CUDACXX CUDAHOSTCXX CXX CXXFLAGS CUDAFLAGS LDFLAGS"


def compile_library(include: Path, out: Path) -> None:
    """Configures, compiles and installs into `out`/sts_kernels, rebuilding only what changed since the last time."""
    tree = ROOT / "build" / "cmake"
    tree.mkdir(parents=True, exist_ok=True)
    settings = {name: os.environ.get(name) for name in CACHED.split()} | {
        name: shutil.which(name) for name in ("c++", "nvcc")
    }
    settings = json.dumps(settings | {"torch": [str(include), headers_version(include)]}, indent=1)
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


INCLUDE, REASON = plan()


class BuildLibrary(setuptools.Command):
    """Builds the library, or says why not; always leaves a build_info.json that tells the same."""

    description = "build sts_kernels/libsts_kernels.so with CMake"
    user_options = []  # noqa: RUF012
    editable_mode = False  # set by `pip install -e`

    def initialize_options(self):
        self.build_lib = None

    def finalize_options(self):
        self.set_undefined_options("build", ("build_lib", "build_lib"))

    def run(self):
        package = (ROOT if self.editable_mode else Path(self.build_lib)) / "sts_kernels"
        package.mkdir(parents=True, exist_ok=True)
        if INCLUDE:
            compile_library(INCLUDE, package.parent)
            if not self.editable_mode:  # `python -m sts_kernels` in a checkout imports from there, installed or not
                for name in PRODUCTS:
                    (ROOT / "sts_kernels" / name).unlink(missing_ok=True)  # never into a file that is in use
                    shutil.copy2(package / name, ROOT / "sts_kernels" / name)
        else:
            self.without_library(package)
        info = json.loads((package / "build_info.json").read_text())
        print(f"sts_kernels {info['version']}: built {info['summary']}", flush=True)

    def without_library(self, package):
        demanded = [name for name in ("STS_KERNELS_NATIVE", "STS_KERNELS_CUDA") if switch(name) == "1"]
        if demanded:
            raise SystemExit(f"{demanded[0]}=1, but no library can be built: {REASON}")
        (package / "libsts_kernels.so").unlink(missing_ok=True)  # of an earlier build
        info = {
            "version": self.distribution.get_version(),
            "summary": f"no compiled library ({REASON})",
            "library": False,
            "reason": REASON,
            "cuda": "",
        }
        (package / "build_info.json").write_text(json.dumps(info, indent=2) + "\n")
        if switch("STS_KERNELS_NATIVE") == "auto":
            print(WITHOUT_LIBRARY.format(reason=REASON), file=sys.stderr, flush=True)

    def get_source_files(self):
        return ["CMakeLists.txt", *(str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob("*") if p.is_file())]

    def get_outputs(self):
        names = PRODUCTS if INCLUDE else PRODUCTS[1:]
        return [] if self.editable_mode else [str(Path(self.build_lib, "sts_kernels", name)) for name in names]

    def get_output_mapping(self):
        return {}


WITHOUT_LIBRARY = """
************************************************************************************************
  sts_kernels is being installed WITHOUT its compiled library:
  {reason}.

  Everything works, but on the PyTorch reference, which is far slower. For the kernels:
      pip install "torch>=2.10"        first, and have g++ (and nvcc for CUDA), then
      pip install --no-deps .          again
  Where the build environment cannot see torch (uv, `python -m build`), point it to the headers:
      STS_KERNELS_TORCH_INCLUDE=.../site-packages/torch/include
  STS_KERNELS_NATIVE=1 makes this an error, STS_KERNELS_NATIVE=0 silences it.
************************************************************************************************
"""


class Build(build):
    sub_commands = [*build.sub_commands, ("build_library", None)]  # noqa: RUF012


class Wheel(bdist_wheel):
    def get_tag(self):
        # The library knows nothing of Python: one wheel for all versions.
        return ("py3", "none", super().get_tag()[2])


class Distribution(setuptools.Distribution):
    def has_ext_modules(self):
        return INCLUDE is not None


setuptools.setup(
    packages=[*setuptools.find_packages(include=["sts_kernels*"]), "sts_kernels.pictures"],
    distclass=Distribution,
    cmdclass={"build": Build, "build_library": BuildLibrary, "bdist_wheel": Wheel},
)
