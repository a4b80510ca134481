"""`python -m bench.overhead`: overhead of a call beyond its kernel, and of importing the package beyond torch.

On one thread, a batch of B tiny items takes `call + B * kernel`. So two batch sizes give both numbers.
"""

import argparse
import subprocess
import sys
from pathlib import Path

import torch

import sts_kernels

from . import backends, record, timing

ITEMS = 257
TRIALS = 7
UNWANTED = ("triton", "transformers", "matplotlib")
IMPORT = """
import torch, sys, time
before, start = set(sys.modules), time.perf_counter()
import sts_kernels
print((time.perf_counter() - start) * 1e6, *{name.split(".")[0] for name in set(sys.modules) - before})
"""


def call_samples(calls: dict, count: int = 100) -> dict[str, list[float]]:
    """us per call; the calls alternate."""
    clock = timing.HostClock(torch.device("cpu"))
    for call in calls.values():
        for _ in range(1000):
            call()
    ready = {name: clock.prepare(call) for name, call in calls.items()}
    samples = {name: [] for name in calls}
    for _ in range(count):
        for name in calls:
            samples[name] += ready[name].samples(1)
    return samples


def tiny_calls() -> dict[str, list[float]]:
    op = torch.ops.sts_kernels.repulsion_select.default
    one, many = torch.randn(1, 2, 1), torch.randn(ITEMS, 2, 1)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.inference_mode():
            samples = call_samples(
                {
                    "torch.ops call": lambda: op(one, 1),
                    "torch.ops call, 257 items": lambda: op(many, 1),
                    "Python function": lambda: sts_kernels.repulsion_select(one, 1),
                    "torch.empty": lambda: torch.empty((1, 1), dtype=torch.int64),
                }
            )
    finally:
        torch.set_num_threads(threads)
    pairs = zip(samples["torch.ops call"], samples["torch.ops call, 257 items"], strict=True)
    kernel = [(large - small) / (ITEMS - 1) for small, large in pairs]
    samples["kernel itself, 1 item"] = kernel
    samples["torch.ops call less kernel"] = [
        call - own for call, own in zip(samples["torch.ops call"], kernel, strict=True)
    ]
    return samples


def import_time() -> tuple[list[float], set[str]]:
    """us to import the package after torch, and the modules that it should not have imported."""
    times, unwanted = [], set()
    for _ in range(TRIALS):
        run = subprocess.run(
            [sys.executable, "-c", IMPORT], capture_output=True, text=True, check=True, cwd=record.ROOT
        )
        spent, *names = run.stdout.split()
        times.append(float(spent))
        unwanted |= set(names) & set(UNWANTED)
    return times, unwanted


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.overhead", description=__doc__.splitlines()[0])
    parser.add_argument("--csv", type=Path, help="append rows here (default: bench/results/<device>.csv)")
    parser.add_argument("--commit", help="what to record as commit where there is no git checkout")
    backends.add_argument(parser)
    args = parser.parse_args(argv)
    device = torch.device("cpu")
    backends.stop_unless_compiled(device, ["repulsion_select"], args.allow_reference)
    times, unwanted = import_time()
    samples = tiny_calls() | {"import beyond torch": times}
    backend = sts_kernels._registry.OPS["repulsion_select"].backend("CPU")
    print(f"repulsion_select on (1, 2, 1), k=1, one thread, backend {backend}; us")
    rows = []
    for name, taken in samples.items():
        p20, p50, p80 = timing.percentiles(taken)
        print(f"{name:<28} p20 {p20:12.3f}   p50 {p50:12.3f}   p80 {p80:12.3f}")
        rows.append(
            {
                **record.environment(device, args.commit),
                "op": "overhead",
                "provider": f"{name} ({backend})",
                "group": "overhead",
                "mode": "eager",
                "cold_l2": 0,
                "p20_us": f"{p20:.3f}",
                "p50_us": f"{p50:.3f}",
                "p80_us": f"{p80:.3f}",
                "samples": len(taken),
                "threads": 1,
            }
        )
    record.append(args.csv or record.default_csv(device), rows)
    if unwanted:
        print(f"importing sts_kernels imported {', '.join(sorted(unwanted))}")
    return 1 if unwanted else 0


if __name__ == "__main__":
    sys.exit(main())
