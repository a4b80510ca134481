"""Clocks: the host clock, and CUDA events around the replay of a CUDA graph."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch


def percentiles(samples: list[float]) -> tuple[float, float, float]:
    """p20, p50, p80."""
    at = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
    return tuple(torch.tensor(samples, dtype=torch.float64).quantile(at).tolist())


class L2Flush:
    """Flushes the L2 cache by overwriting a buffer five times its size."""

    def __init__(self, device: torch.device):
        size = 5 * torch.cuda.get_device_properties(device).L2_cache_size
        self.buffer = torch.empty(size, dtype=torch.uint8, device=device)

    def __call__(self) -> None:
        self.buffer.zero_()


class HostClock:
    """Wall time from the call until its results are ready, on an idle device."""

    mode = "eager"

    def __init__(self, device: torch.device, flush: L2Flush | None = None):
        self.cold = flush is not None
        self._flush = flush
        self._wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None

    def prepare(self, call) -> "Prepared":
        """Repeats a short call within a sample, to amortise the clock's own cost. Not with a cold cache."""
        once = self._sample(call, 1)
        inner = 1 if self.cold else max(1, int(200 / max(once, 1)))
        return Prepared(once, lambda count: [self._sample(call, inner) for _ in range(count)])

    def _sample(self, call, inner: int) -> float:
        if self._flush:
            self._flush()
        self._wait()
        start = time.perf_counter_ns()
        for _ in range(inner):
            call()
        self._wait()
        return (time.perf_counter_ns() - start) / inner / 1e3


class GraphClock:
    """Device time of one replay of the call, captured once as a CUDA graph: excludes launch overhead.

    Each replay has its own pair of events. Before the first event the stream sleeps longer than the host needs to
    launch the graph. Otherwise the time would include the device waiting for the host.
    """

    mode = "graph"
    CYCLES_PER_US = 2000  # upper bound of the clock rate

    def __init__(self, flush: L2Flush | None = None):
        self.cold = flush is not None
        self._flush = flush

    def prepare(self, call) -> "Prepared":
        torch.cuda.empty_cache()  # a graph has its own memory pool and cannot use cached blocks
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = call()
        for _ in range(2):  # the first replay uploads the graph
            start = time.perf_counter_ns()
            graph.replay()
            launch = (time.perf_counter_ns() - start) / 1e3
            torch.cuda.synchronize()
            once = (time.perf_counter_ns() - start) / 1e3
        asleep = int((20 + 2 * launch) * self.CYCLES_PER_US)

        def samples(count: int, output=output) -> list[float]:  # keeps the output's memory alive with the graph
            pairs = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(count)]
            for start, end in pairs:
                if self._flush:
                    self._flush()
                torch.cuda._sleep(asleep)
                start.record()
                graph.replay()
                end.record()
            torch.cuda.synchronize()
            return [start.elapsed_time(end) * 1e3 for start, end in pairs]

        return Prepared(once, samples)


@dataclass(frozen=True)
class Prepared:
    once_us: float  # rough time of one call
    samples: Callable[[int], list[float]]  # number of samples -> samples in us


def clocks(device: torch.device) -> list[HostClock | GraphClock]:
    """The clocks for `device`, the preferred one first."""
    if device.type == "cpu":
        return [HostClock(device)]
    flush = L2Flush(device)
    return [GraphClock(flush), GraphClock(), HostClock(device, flush)]


def peaks(device: torch.device, dtypes: set[torch.dtype]) -> dict:
    """Measures this device's ceilings: {"copy": bytes/s read and written, dtype: flop/s of a matrix product}.

    The CPU computes in float32 for every input dtype, so float32's ceiling is used for all dtypes.
    """
    cuda = device.type == "cuda"
    clock = HostClock(device)

    def best(call):
        call()
        return min(clock.prepare(call).samples(10))

    source = torch.randn((1 << 30 if cuda else 1 << 26), device=device)
    target = torch.empty_like(source)
    out = {"copy": 2 * source.nbytes / best(partial(target.copy_, source)) * 1e6}
    del source, target
    side = 8192 if cuda else 2048
    for dtype in sorted(dtypes if cuda else {torch.float32}, key=str):
        a = torch.randn(side, side, device=device).to(dtype)
        b = torch.randn(side, side, device=device).to(dtype)
        out[dtype] = 2 * side**3 / best(partial(torch.mm, a, b)) * 1e6
    if not cuda:
        out.update(dict.fromkeys(dtypes, out[torch.float32]))
    return out
