"""`python -m bench.breakdown`: where the time of a selection goes, for the two main shapes.

On a GPU kernel by kernel, as torch.profiler sees them; on a CPU function by function, from the samples of `perf`, which
needs Linux and a library that was not stripped. Prints a Markdown table.
"""

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import torch

import sts_kernels

from . import backends, inputs, timing

SHAPES = [(576, 192), (2880, 480)]
LIBRARY = "libsts_kernels.so"
# The first pattern that a function's name matches says what it does.
CPU_PARTS = [
    (r"cpu::isa::sqdist\b", "distances"),
    (r"to_repulsion", "1 / (d + eps)"),
    (r"add_then_lowest", "adding a row, next pick"),
    (r"add_row|all_finite|cpu::isa::lowest\b", "first pick"),
    (r"to_point", "widening the picked rows"),
    (r"with_team.*_FUN", "threads waiting for each other"),
    (r"", "bookkeeping"),
]


def part_of(function):
    return next(part for pattern, part in CPU_PARTS if re.search(pattern, function))


def call_of(tokens, picks, dtype, device):
    x = inputs.features(1, tokens, 1024, dtype, device)
    return lambda: sts_kernels.repulsion_select(x, picks)


def on_cuda(tokens, picks, dtype):
    """(microseconds a call, {kernel: microseconds})"""
    call, count = call_of(tokens, picks, dtype, torch.device("cuda")), 50
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(count):
            call()
        torch.cuda.synchronize()
    parts = Counter()
    for event in profile.key_averages():
        if event.device_type != torch.autograd.DeviceType.CUDA:
            continue
        kernel = re.sub(r"^void |<.*|\(.*", "", event.key.replace("(anonymous namespace)::", ""))
        parts[kernel] += event.self_device_time_total / count
    return sum(parts.values()), parts


def on_cpu(tokens, picks, dtype):
    """(microseconds a call, {part: percent of all threads' time})"""
    with tempfile.NamedTemporaryFile() as samples:
        child = [sys.executable, "-m", "bench.breakdown", "--loop", str(tokens), str(picks), str(dtype)[6:]]
        child += ["--threads", str(torch.get_num_threads())]
        record = ["perf", "record", "-q", "-e", "cpu-clock", "-F", "9999", "-o", samples.name, "--", *child]
        here = Path(__file__).resolve().parents[1]
        total = float(subprocess.run(record, check=True, capture_output=True, text=True, cwd=here).stdout)
        report = ["perf", "report", "-i", samples.name, "--stdio", "-q", "--percentage", "relative", "--dsos", LIBRARY]
        report += ["-F", "overhead,symbol", "-t", ";"]
        lines = subprocess.run(report, check=True, capture_output=True, text=True).stdout.splitlines()
    parts = Counter()
    for line in lines:
        share, _, name = line.partition(";")
        if name:
            parts[part_of(name)] += float(share.strip(" %"))
    return total, parts


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m bench.breakdown", description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cuda", "cpu"))
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "float16", "bfloat16"))
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    parser.add_argument("--loop", nargs=3, help=argparse.SUPPRESS)
    backends.add_argument(parser)
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.loop:
        tokens, picks, dtype = args.loop
        call = call_of(int(tokens), int(picks), getattr(torch, dtype), torch.device("cpu"))
        call()
        timed = timing.HostClock(torch.device("cpu")).prepare(call)
        print(timing.percentiles(timed.samples(max(10, int(3e6 / timed.once_us))))[1])
        return
    if args.device == "cpu" and not shutil.which("perf"):
        parser.error("needs perf: install linux-perf (Debian), linux-tools (Ubuntu) or perf (Fedora)")

    backends.stop_unless_compiled(torch.device(args.device), ["repulsion_select"], args.allow_reference)
    measure = on_cuda if args.device == "cuda" else on_cpu
    columns = [measure(*shape, getattr(torch, args.dtype)) for shape in SHAPES]
    names = dict.fromkeys(name for _, parts in columns for name, _ in parts.most_common())
    print(f"| {args.dtype} | " + " | ".join(f"{n} / {k}" for n, k in SHAPES) + " |\n|---|" + "---|" * len(SHAPES))
    print("| a call, us | " + " | ".join(f"{total:.0f}" for total, _ in columns) + " |")
    for name in names:
        shares = (parts[name] / sum(parts.values()) for _, parts in columns)
        print(f"| {name} | " + " | ".join(f"{share:.1%}" for share in shares) + " |")


if __name__ == "__main__":
    main()
