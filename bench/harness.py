"""Declares a benchmark, and runs its cases into CSV rows.

bench/<op>.py holds `BENCH = Bench(...)` for each op of the registry. The providers "native" and "reference" exist for
every op; a benchmark adds baselines.
"""

import importlib
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

import sts_kernels
from sts_kernels._registry import OPS, Op

from . import record, timing


@dataclass(frozen=True, eq=False)
class Case:
    """One shape of an op. group: the set of cases that --shapes selects. shape: values of the CSV's shape columns."""

    group: str
    shape: dict[str, int]
    dtype: torch.dtype = torch.float32
    data: str = "gaussian"
    cuda_only: bool = False
    lengths: tuple[int, ...] = ()  # tokens of each packed item
    budgets: tuple[int, ...] = ()

    def __post_init__(self):
        assert not set(self.shape) - set(record.SHAPE), f"shape columns are {record.SHAPE}"

    def __getitem__(self, name: str) -> int:
        return self.shape[name]

    def columns(self) -> dict:
        return {"group": self.group, **self.shape, "dtype": str(self.dtype).removeprefix("torch."), "data": self.data}

    def __str__(self):
        shape = " ".join(f"{name}={value}" for name, value in self.shape.items())
        return f"{self.group}: {shape} {self.columns()['dtype']} {self.data}"


@dataclass(frozen=True)
class Cost:
    """Lower bound for any implementation: bytes moved (inputs read once, outputs written once) and flops."""

    bytes: int
    flops: int

    def floor(self, peaks: dict, dtype: torch.dtype) -> tuple[float, str, str]:
        """Roofline: (min us, name of the limit, its ceiling), from the measured ceilings `peaks`."""
        memory, compute = self.bytes / peaks["copy"] * 1e6, self.flops / peaks[dtype] * 1e6
        if memory >= compute:
            return memory, "memory", f"{peaks['copy'] / 1e9:.4g} GB/s"
        return compute, "compute", f"{peaks[dtype] / 1e12:.4g} TFLOP/s"


@dataclass(frozen=True)
class Provider:
    """One implementation of the op. `bind(case, inputs)` returns a call without arguments to check and time."""

    name: str
    bind: Callable[[Case, dict], Callable[[], Any]]
    fits: Callable[[Case, torch.device], bool] = lambda case, device: True
    syncs: bool = False  # synchronises with the device, so CUDA graph capture is impossible
    compiles: bool = False  # uses torch.compile; runs only with --compile


@dataclass(frozen=True)
class Bench:
    op: str
    cases: list[Case]
    make_inputs: Callable[[Case, torch.device], dict]  # the op's keyword arguments, the same for all providers
    cost: Callable[[Case], Cost]
    check: Callable[[Case, dict, Any], None]  # raises AssertionError if the output is wrong
    baselines: list[Provider] = field(default_factory=list)
    reference_syncs: bool = False

    def providers(self, device: torch.device) -> list[Provider]:
        op: Op = OPS[self.op]
        backend = op.backend(device.type.upper())
        ours = [Provider("reference", lambda case, inputs: partial(op.reference, **inputs), syncs=self.reference_syncs)]
        if backend != "reference":
            public = getattr(sts_kernels, self.op)
            ours.insert(0, Provider(backend, lambda case, inputs: partial(public, **inputs)))
        return ours + self.baselines


def discover() -> dict[str, Bench | None]:
    """Op name -> benchmark, or None if the op has none."""

    def find(name):
        module = f"{__package__}.{name.rstrip('_')}"
        return importlib.import_module(module).BENCH if importlib.util.find_spec(module) else None

    return {name: find(name) for name in OPS}


@dataclass(frozen=True)
class Effort:
    """How long to measure. Every round times every provider, so that noise affects all alike."""

    seconds: float  # per case and clock, all providers together
    rounds: tuple[int, int]  # min, max
    slow_seconds: float  # a slower call is timed by the first clock only, and its case in 3 rounds


NORMAL = Effort(seconds=4.0, rounds=(7, 100), slow_seconds=1.0)
QUICK = Effort(seconds=0.5, rounds=(3, 20), slow_seconds=0.3)


@dataclass
class Run:
    """One run of the benchmarks on a device: clocks, ceilings and failures."""

    device: torch.device
    effort: Effort
    environment: dict
    peaks: dict
    clocks: list
    failures: list[str] = field(default_factory=list)

    def rows(self, bench: Bench, case: Case, providers: list[Provider]) -> Iterator[dict]:
        """Checks and times one case; yields its rows, clock by clock. Failures are reported, not raised."""
        if any(provider.compiles for provider in providers):
            torch._dynamo.reset()  # compile each case for its own shape: no recompile-limit fallback
        inputs = bench.make_inputs(case, self.device)
        calls = {}
        for provider in providers:
            if provider.fits(case, self.device):
                label = f"{bench.op}, {provider.name}, {case}"
                call = self._attempt(label, self._checked, bench, case, inputs, provider)
                if call is not None:
                    calls[provider] = call
        slow = set()
        for clock in self.clocks:
            prepared = {}
            for provider, call in calls.items():
                if provider in slow or (provider.syncs and clock.mode == "graph"):
                    continue
                label = f"{bench.op}, {provider.name}, {clock.mode}, {case}"
                ready = self._attempt(label, clock.prepare, call)
                if ready is not None:
                    prepared[provider] = ready
                    if ready.once_us > self.effort.slow_seconds * 1e6:
                        slow.add(provider)
            yield from self._timed(bench, case, clock, prepared)

    def _checked(self, bench, case, inputs, provider):
        call = provider.bind(case, inputs)
        bench.check(case, inputs, call())
        return call

    def _attempt(self, label, function, *args):
        try:
            return function(*args)
        except torch.OutOfMemoryError:
            print(f"left out, too little memory: {label}")
            torch.cuda.empty_cache()
        except Exception as error:
            self.failures.append(f"{label}: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
            print(f"FAILED {self.failures[-1]}")
        return None

    def _timed(self, bench, case, clock, prepared):
        if not prepared:
            return
        low, high = self.effort.rounds
        slowest = max(ready.once_us for ready in prepared.values())
        per_round = {p: max(1, min(5, int(slowest / max(ready.once_us, 1)))) for p, ready in prepared.items()}
        round_us = sum(prepared[p].once_us * n for p, n in per_round.items())
        rounds = min(high, max(low, int(self.effort.seconds * 1e6 / max(round_us, 1))))
        if slowest > self.effort.slow_seconds * 1e6:
            rounds = 3
        samples = {provider: [] for provider in prepared}
        for _ in range(rounds):
            for provider, ready in prepared.items():
                samples[provider] += ready.samples(per_round[provider])
        cost = bench.cost(case)
        floor, bound, peak = cost.floor(self.peaks, case.dtype)
        for provider, taken in samples.items():
            p20, p50, p80 = timing.percentiles(taken)
            yield {
                **self.environment,
                **case.columns(),
                "op": bench.op,
                "provider": provider.name,
                "mode": clock.mode,
                "cold_l2": int(clock.cold),
                "p20_us": f"{p20:.2f}",
                "p50_us": f"{p50:.2f}",
                "p80_us": f"{p80:.2f}",
                "samples": len(taken),
                "bytes": cost.bytes,
                "flops": cost.flops,
                "bound": bound,
                "peak": peak,
                "percent_of_peak": f"{100 * floor / p50:.1f}",
            }


def start(device: torch.device, effort: Effort, dtypes: set[torch.dtype], commit: str | None) -> tuple[Run, list[dict]]:
    """A `Run`, and the rows of its measured ceilings."""
    environment = record.environment(device, commit)
    peaks = timing.peaks(device, dtypes)
    rows = [
        {
            **environment,
            "op": "peak",
            "provider": "copy" if name == "copy" else "matmul",
            "dtype": "" if name == "copy" else str(name).removeprefix("torch."),
            "peak": f"{value / 1e9:.4g} GB/s" if name == "copy" else f"{value / 1e12:.4g} TFLOP/s",
        }
        for name, value in peaks.items()
    ]
    return Run(device, effort, environment, peaks, timing.clocks(device)), rows
