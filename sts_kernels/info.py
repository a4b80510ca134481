"""`python -m sts_kernels info`. Always prints: a probe that fails leaves its failure in its place."""

import importlib.metadata
import importlib.util
import os
import platform
import re
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

KEYS = ("CPU", "CUDA")
INDENT = 14
VARIABLES = ("TORCH_CUDA_ARCH_LIST", "CUDA_VISIBLE_DEVICES", "TRITON_INTERPRET", "OMP_NUM_THREADS", "OMP_WAIT_POLICY")


def add_arguments(parser) -> None:
    pass


def run(args) -> int:
    encoding = sys.stdout.encoding or "utf-8"
    print(report().encode(encoding, "backslashreplace").decode(encoding))
    return 0


def report() -> str:
    probes = {
        "package": package,
        "torch": torch_build,
        "triton": lambda: distribution("triton"),
        "transformers": lambda: distribution("transformers"),
        "python": lambda: f"{platform.python_version()}, {platform.platform()}",
        "gpu": gpus,
        "build": build,
        "environment": environment,
    }
    lines = [f"{name:<{INDENT}}{probe(function)}" for name, function in probes.items()]
    return "\n".join([probe(backends), "", *map(wrap, lines)])


def wrap(line: str) -> str:
    return textwrap.fill(line, 110, subsequent_indent=" " * INDENT, break_long_words=False, break_on_hyphens=False)


def probe(function: Callable[..., str], *args) -> str:
    try:
        return function(*args)
    except Exception as error:
        return failure(error)


def failure(error: Exception) -> str:
    message = str(error).strip().splitlines()
    return f"failed: {type(error).__name__}{': ' + message[0] if message else ''}"


def backends() -> str:
    """The table of ops, then what explains each backend in it."""
    try:
        from ._registry import OPS
    except Exception as error:
        return f"no op works, for the package does not load: {failure(error)}"
    width = max(map(len, OPS), default=0) + 2
    rows = [f"{'op':<{width}}" + "".join(f"{key:<11}" for key in KEYS).rstrip()]
    reasons: dict[tuple[str, str], dict[str, list[str]]] = {}
    for name, op in OPS.items():
        chosen = {key: probe(op.backend, key) for key in KEYS}
        rows.append(f"{name:<{width}}" + "".join(f"{chosen[key]:<11}" for key in KEYS).rstrip())
        for key in KEYS:
            reasons.setdefault((key, chosen[key]), {}).setdefault(probe(op.why, key), []).append(name)
    for (key, backend), ops in sorted(reasons.items()):
        for why, names in ops.items():
            which = f" ({', '.join(names)})" if len(ops) > 1 else ""
            rows.append(f"{key} {backend}: {why}{which}")
    return "\n".join(rows)


def package() -> str:
    from . import __version__

    return f"sts_kernels {__version__} in {Path(__file__).parent}"


def torch_build() -> str:
    import torch

    return f"{torch.__version__}, " + (f"CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA")


def distribution(name: str) -> str:
    """Version of an optional package, without importing it."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "installed, version unknown" if importlib.util.find_spec(name) else "not installed"


def gpus() -> str:
    import torch

    if not torch.cuda.is_available():
        return "none visible to torch; driver " + probe(driver)
    cards = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return ", ".join(f"{card.name} (sm_{card.major}{card.minor})" for card in cards) + "; driver " + probe(driver)


def driver() -> str:
    file = Path("/proc/driver/nvidia/version")
    found = re.search(r"\s(\d+\.[\d.]+)\s", file.read_text()) if file.exists() else None
    return found[1] if found else "not found"


def build() -> str:
    from . import _native

    facts = _native.status().build
    return f"{facts['summary']}; commit {facts.get('commit') or 'unknown'}" if facts else "nothing recorded: not built"


def environment() -> str:
    names = sorted(name for name in os.environ if name.startswith("STS_KERNELS_")) + list(VARIABLES)
    return ", ".join(f"{name}={os.environ[name]}" for name in names if name in os.environ) or "nothing set"
