"""`python -m bench.backends`: prints the package and the backend of each op that a benchmark would time.

Every benchmark prints this first. A benchmark stops if an op has compiled code but the reference would be timed. The
usual cause: a checkout without a built library shadows an installed package with one.
"""

import argparse
import json
import os
import shlex
import sys
from collections.abc import Iterable
from pathlib import Path

import torch

import sts_kernels
from sts_kernels import _native
from sts_kernels._registry import OPS

from . import record

STATUS = 4  # exit status of a benchmark that stops
PACKAGE = Path(sts_kernels.__file__).resolve().parent


def describe(device: torch.device, names: Iterable[str] = OPS) -> str:
    """Two lines: the package, and the backend of each op on `device`."""
    key, status = device.type.upper(), _native.status()
    library = f"library of commit {status.build.get('commit') or 'unknown'}" if status.loaded else "no library loaded"
    return (
        f"times sts_kernels {sts_kernels.__version__} in {PACKAGE}, {library}\n"
        f"{key}: {', '.join(f'{name} {OPS[name].backend(key)}' for name in names)}"
    )


def stop_unless_compiled(device: torch.device, names: Iterable[str] = OPS, allowed: bool = False) -> None:
    """Prints the timed backends. Exits if a reference would be timed although the op has compiled code."""
    names = list(names)
    print(describe(device, names), flush=True)
    if not allowed and (why := shortfall(device, names)):
        print(why, file=sys.stderr)
        raise SystemExit(STATUS)


def shortfall(device: torch.device, names: Iterable[str]) -> str:
    """One sentence: why compiled code is missing, and the command that fixes it. "" if none is missing."""
    key = device.type.upper()
    slow = [OPS[name] for name in names if OPS[name].backend(key) == "reference"]
    slow = [op for op in slow if not op.triton or key == "CUDA"]  # a Triton op has no other CPU path
    if not slow:
        return ""
    which = f"the reference of {', '.join(op.name for op in slow)} would be timed"
    if all(op.triton for op in slow):
        return f"stopped: {which}: triton is not installed; `pip install triton`, or --allow-reference"
    reason, remedy = _missing_library(key)
    return f"stopped: {which}: {reason}; {remedy}, or --allow-reference"


def _missing_library(key: str) -> tuple[str, str]:
    """(reason why `key` has no compiled code, remedy)."""
    status = _native.status()
    remedy = f"`cd {shlex.quote(str(record.ROOT))} && pip install --no-deps .` compiles one and copies it here"
    if os.environ.get("STS_KERNELS_DISABLE") == "1":
        return "STS_KERNELS_DISABLE=1 is set", "`unset STS_KERNELS_DISABLE`"
    reason = status.why(key) if _native.LIBRARY.exists() else f"{PACKAGE} has no {_native.LIBRARY.name}"
    if found := elsewhere(key):
        theirs, ours = _build(found).get("commit") or "unknown", record.commit()
        reason += f", and this package shadows {found}, which has one (commit {theirs})"
        if theirs == ours or "unknown" in (theirs, ours):  # no other commit's library: rows record our commit
            files = [shlex.quote(str(found / name)) for name in (_native.LIBRARY.name, _native.BUILD_INFO.name)]
            remedy = f"`cp {' '.join(files)} {shlex.quote(str(PACKAGE))}` copies that library"
    return reason, remedy


def elsewhere(key: str) -> Path | None:
    """The first other sts_kernels on sys.path whose library serves `key`. Does not import it."""
    for entry in sys.path:
        package = Path(entry or ".").resolve() / "sts_kernels"
        compiled = (package / _native.LIBRARY.name).is_file() and (key == "CPU" or _build(package).get("cuda"))
        if compiled and package != PACKAGE:
            return package
    return None


def _build(package: Path) -> dict:
    """build_info.json of a package; {} if the file is missing or not JSON."""
    try:
        return json.loads((package / _native.BUILD_INFO.name).read_text())
    except (OSError, ValueError):
        return {}


def add_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--allow-reference",
        action="store_true",
        help="go on where the PyTorch reference is timed instead of compiled code that the op has",
    )


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.backends", description=__doc__.splitlines()[0].split(": ")[1]
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cuda", "cpu"))
    add_argument(parser)
    args = parser.parse_args(argv)
    stop_unless_compiled(torch.device(args.device), allowed=args.allow_reference)
    return 0


if __name__ == "__main__":
    sys.exit(main())
