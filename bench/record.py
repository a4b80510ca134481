"""CSV rows of measurements: their columns, and the append-only files."""

import csv
import os
import platform
import re
import subprocess
from datetime import datetime, timezone
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).resolve().parent / "results"
SHAPE = ("B", "N", "C", "K", "T", "S", "Hq", "Hkv", "D")
COLUMNS = (
    *("timestamp", "commit", "op", "provider", "group", *SHAPE, "dtype", "data"),
    *("mode", "cold_l2", "p20_us", "p50_us", "p80_us", "samples"),
    *("bytes", "flops", "bound", "peak", "percent_of_peak"),
    *("device", "threads", "omp_wait_policy", "torch"),
)


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        models = re.findall(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        models = []
    return f"{models[0] if models else platform.machine()} ({os.cpu_count()} CPUs)"


def default_csv(device: torch.device) -> Path:
    return RESULTS / f"{re.sub(r'[^a-z0-9]+', '-', device_name(device).lower()).strip('-')}.csv"


def commit() -> str:
    """The checkout's commit, with "-dirty" if tracked files other than results differ; "unknown" outside git."""

    def git(*args):
        return subprocess.run(["git", "-C", ROOT, *args], capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!bench/results")
        return git("rev-parse", "--short=12", "HEAD") + ("-dirty" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def environment(device: torch.device, commit_name: str | None = None) -> dict:
    """Columns shared by all rows of one run."""
    return {
        "timestamp": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit_name or commit(),
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY", ""),
        "torch": torch.__version__,
    }


def append(path: Path, rows: list[dict], columns: tuple[str, ...] = COLUMNS) -> None:
    """Appends rows to the CSV; a new file gets a header. Never rewrites existing rows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and path.stat().st_size:
        with path.open(newline="") as file:
            header = tuple(next(csv.reader(file)))
        if header != columns:
            raise ValueError(f"{path} has other columns than this version writes; give another file with --csv")
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="", lineterminator="\n")
        if file.tell() == 0:
            writer.writeheader()
        writer.writerows(rows)


def read(path: Path) -> list[dict]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))
