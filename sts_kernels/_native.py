"""Loads the compiled library and records the result."""

import functools
import importlib.metadata
import json
import os
import shlex
import sys
import urllib.parse
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ._errors import REQUIREMENTS, install

LIBRARY = Path(__file__).with_name("libsts_kernels.so")
BUILD_INFO = Path(__file__).with_name("build_info.json")
ROOT = Path(__file__).parents[1]  # of a checkout; site-packages once installed
TORCH_FLOOR = (2, 10)


@dataclass(frozen=True)
class Status:
    loaded: bool
    reason: str  # why it is not loaded; "" if loaded
    build: dict[str, Any] = field(default_factory=dict)  # build_info.json: torch headers, CUDA, architectures, compiler
    remedy: str = ""  # command that makes it load; "" if none does, or if it is left out on purpose
    chosen: bool = False  # left out on purpose

    def why(self, key: str, has_kernel: bool = True) -> str:
        """Why tensors of dispatch key `key` are, or are not, served by the compiled library.

        has_kernel: whether an op has a kernel for `key`.
        """
        if not self.loaded:
            return self.reason
        if key == "CUDA" and not self.build.get("cuda"):
            return f"the compiled library was built without CUDA ({self.build.get('reason') or 'reason not recorded'})"
        return "the compiled library is loaded" if has_kernel else "the compiled library has no kernel for it"

    def remedies(self) -> list[str]:
        """Commands after which the compiled library serves all tensors of this machine."""
        if not self.loaded:
            return [self.remedy] if self.remedy else []
        if self.build.get("cuda") or not torch.cuda.is_available():
            return []
        return [f"for the CUDA kernels, with nvcc 12.1 or newer: {rebuild('STS_KERNELS_CUDA=1')}"]


@functools.cache
def status() -> Status:
    """Loads the library on the first call. Schemas must be defined by then."""
    status = load()
    if not status.loaded and not status.chosen:  # nothing else shows the slow reference
        advice = f". To fix it: {status.remedy}" if status.remedy else ""
        message = f"sts_kernels runs on its slow PyTorch reference: {status.reason}{advice}"
        warnings.warn(message, RuntimeWarning, stacklevel=3)  # at the user's import
    return status


def build_info() -> dict[str, Any]:
    """Contents of build_info.json; {} if it cannot be read."""
    try:
        recorded: dict[str, Any] = json.loads(BUILD_INFO.read_text())
    except (OSError, ValueError):
        return {}
    return recorded


def load() -> Status:
    build = build_info()
    if os.environ.get("STS_KERNELS_DISABLE") == "1":
        return Status(False, "STS_KERNELS_DISABLE=1 is set", build, chosen=True)
    if not LIBRARY.exists():
        return missing(build)
    try:
        torch.ops.load_library(str(LIBRARY))
    except (OSError, RuntimeError) as error:
        cause = str(error.__cause__ or error).splitlines()[0]  # the dynamic linker's message
        reason, remedy = f"the compiled library does not load: {cause}", rebuild()
        if tuple(map(int, torch.__version__.split(".")[:2])) < TORCH_FLOOR:
            reason, remedy = f"{reason}; torch is {torch.__version__}", install("--upgrade", REQUIREMENTS["torch"])
        return Status(False, reason, build, remedy)
    return Status(True, "", build)


def missing(build: dict[str, Any]) -> Status:
    """Status of a missing library. A build on Linux makes the library, fails, or is told to leave it out."""
    if other := installed_elsewhere():
        reason = f"{LIBRARY.parent} hides the installed package in {other}, which has the compiled library"
        remedy = f"start Python in another folder than {ROOT}, or build here: {rebuild()}"
        return Status(False, reason, build, remedy)
    if build.get("reason") == "STS_KERNELS_NATIVE=0":
        return Status(False, "the package was built with STS_KERNELS_NATIVE=0", build, chosen=True)
    if sys.platform != "linux":
        return Status(False, f"the compiled library is for Linux, and this is {sys.platform}", build)
    why = f" ({build['reason']})" if build.get("reason") else ""
    return Status(False, f"the compiled library was not built{why}", build, rebuild())


def installed_elsewhere() -> Path | None:
    """Folder of another, installed copy of the package that has the library; None without one."""
    for distribution in importlib.metadata.distributions(name="sts-kernels"):
        library = Path(str(distribution.locate_file("sts_kernels"))) / LIBRARY.name
        if library.exists():
            return library.parent
    return None


def rebuild(*settings: str) -> str:
    """The shell command that rebuilds and reinstalls this package. settings: environment variables of the build."""
    options, (source, editable) = ["--no-deps", "--force-reinstall"], origin()
    if "://" in source:
        options.append("--no-cache-dir")  # pip caches wheels built from URLs
    command = install(*options, *["-e"] * editable, source or ".")
    if command.startswith("uv ") and "--python" in command:  # uv's build sees the active environment only
        include = shlex.quote(str(Path(torch.__file__).parent / "include"))
        settings = *settings, f"STS_KERNELS_TORCH_INCLUDE={include}"
    command = " ".join([*settings, command])
    return command if source else f"in a checkout, {command}"


def origin() -> tuple[str, bool]:
    """(source, editable): path or URL that pip installed from, "" if unknown; whether the install is editable."""
    try:
        direct = json.loads(importlib.metadata.distribution("sts-kernels").read_text("direct_url.json") or "{}")
    except (importlib.metadata.PackageNotFoundError, TypeError, ValueError):
        direct = {}
    url = direct.get("url", "")
    path = urllib.parse.unquote(url.removeprefix("file://"))
    if (ROOT / "setup.py").exists():
        return str(ROOT), path == str(ROOT) and bool(direct.get("dir_info", {}).get("editable"))
    if vcs := direct.get("vcs_info"):
        return f"{vcs['vcs']}+{url}@{vcs['commit_id']}", False
    return path if Path(path, "setup.py").exists() or path.endswith(".tar.gz") else "", False
