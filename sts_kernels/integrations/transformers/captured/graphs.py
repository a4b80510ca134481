"""Runs a function of fixed shapes repeatedly: as it is, compiled whole, or captured in a CUDA graph.

Such a function takes no arguments and reads buffers with fixed addresses. The next run overwrites its outputs. Graphs
share one memory pool: they never run at the same time, and each keeps its outputs alive. So graphs reuse the memory of
each other's intermediates.
"""

import contextlib
import itertools
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Generic, TypeAlias, TypeVar

import torch

from ....methods import _packed

Out = TypeVar("Out")  # output of a function: a dict of tensors
Around: TypeAlias = Callable[[], contextlib.AbstractContextManager[None]]  # makes the context manager around a call

WARM_UPS = 2  # runs before a capture: they load, tune and compile kernels, and allocate workspaces


class Inputs:
    """Named int64 inputs of fixed shapes: views of one device buffer, which one copy from the host fills."""

    def __init__(self, shapes: dict[str, tuple[int, ...]], device: torch.device):
        pinned = device.type == "cuda"
        sizes = [torch.Size(shape).numel() for shape in shapes.values()]
        with torch.inference_mode(False):
            self._device = torch.zeros(sum(sizes), dtype=torch.int64, device=device)
            self._host = torch.zeros(sum(sizes), dtype=torch.int64, pin_memory=pinned, device="cpu")
        self._read = torch.cuda.Event() if pinned else None
        self.tensors = _views(self._device, shapes, sizes)
        self._staging = _views(self._host, shapes, sizes)

    def load(self, values: dict[str, torch.Tensor]) -> None:
        if self._read is not None:
            self._read.synchronize()  # wait for the last copy out of the staging buffer
        for name, value in values.items():
            self._staging[name].copy_(value)
        self._device.copy_(self._host, non_blocking=True)
        if self._read is not None:
            self._read.record(torch.cuda.current_stream(self._device.device))


class Buffers:
    """Memory by name, as large as the largest tensor taken under that name. Buckets run one at a time and share it."""

    def __init__(self, like: torch.Tensor):
        self._like = like
        self._flat: dict[tuple[str, int], torch.Tensor] = {}

    def take(self, name: tuple[str, int], shape: tuple[int, ...]) -> torch.Tensor:
        size = torch.Size(shape).numel()
        if name not in self._flat or self._flat[name].numel() < size:
            self._flat[name] = self._like.new_zeros(size)
        return self._flat[name][:size].view(shape)


def _views(flat: torch.Tensor, shapes: dict[str, tuple[int, ...]], sizes: list[int]) -> dict[str, torch.Tensor]:
    return {name: part.view(shapes[name]) for name, part in zip(shapes, flat.split(sizes), strict=True)}


class Graphs:
    """Makes a `Graph` of a function.

    backend: that of torch.compile, or None for no compilation. On a CUDA device every function is captured.
    """

    def __init__(self, device: torch.device, backend: str | None):
        self.device, self.backend = device, backend
        self._pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def ready(
        self, function: Callable[[], Out], around: Around = contextlib.nullcontext, now: bool = True
    ) -> "Graph[Out]":
        """-> a Graph, prepared at once if `now`.

        Preparing may run the function several times on the buffers as they are then; the function must allow that.
        """
        graph = Graph(self, function, around)
        if now:
            graph.prepare()
        return graph

    def compiled(self, function: Callable[[], Out]) -> Callable[[], Out]:
        if self.backend is None:
            return function
        torch.compiler.assume_constant_result(_packed.copied)  # not at import: it imports the compiler
        return torch.compile(_with_code_of_its_own(function), fullgraph=True, dynamic=False, backend=self.backend)

    def captured(self, run: Callable[[], Out]) -> tuple[torch.cuda.CUDAGraph, Out]:
        """-> the graph and its outputs."""
        stream, current = self._stream, torch.cuda.current_stream(self.device)
        assert stream is not None  # on a CUDA device
        stream.wait_stream(current)
        with torch.cuda.device(self.device):
            with torch.cuda.stream(stream):
                for _ in range(WARM_UPS):
                    run()
            current.wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, self._pool, stream, capture_error_mode="thread_local"):
                outputs = run()
        return graph, outputs


class Graph(Generic[Out]):
    """`run()` returns the function's outputs, valid until the next run. Before `prepare()`, it calls the function as it
    is."""

    def __init__(self, graphs: Graphs, function: Callable[[], Out], around: Around):
        self._graphs, self._function, self._around = graphs, function, around
        self._constants: dict[Any, torch.Tensor] = {}
        self._captured: tuple[torch.cuda.CUDAGraph, Out] | None = None
        self.prepared = False

    def prepare(self) -> None:
        """Compiles the function and, on a CUDA device, captures it. Later calls do nothing."""
        if self.prepared:
            return
        self._function = self._graphs.compiled(self._function)
        if self._graphs.device.type == "cuda":
            with self._inside():
                self._captured = self._graphs.captured(self._function)
        self.prepared = True

    def run(self) -> Out:
        if self._captured is not None:
            graph, outputs = self._captured
            graph.replay()
            return outputs
        with self._inside():
            return self._function()

    @contextlib.contextmanager
    def _inside(self) -> Iterator[None]:
        with quietly(), self._around(), _packed.constants(self._constants):
            yield


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Neither gradients nor inference mode: buffers outlive the caller's inference mode."""
    with torch.inference_mode(False), torch.no_grad():
        yield


def _with_code_of_its_own(function: Callable[[], Out]) -> Callable[[], Out]:
    """Wraps a function in its own code object. Dynamo caches compiled code by code object, a limited number for each,
    so buckets must not share one."""

    def entry() -> Out:
        return function()

    code = entry.__code__.replace(co_name=f"entry_{next(_numbers)}")
    return types.FunctionType(code, entry.__globals__, code.co_name, None, entry.__closure__)


_numbers = itertools.count()


@contextlib.contextmanager
def replaced(attributes: Sequence[tuple[torch.nn.Module, str, object]]) -> Iterator[None]:
    """Sets instance attributes of modules, such as `config` or `forward`, and restores them on exit."""
    before = [(module, name, vars(module).get(name, _NOTHING)) for module, name, _ in attributes]
    try:
        for module, name, value in attributes:
            vars(module)[name] = value
        yield
    finally:
        for module, name, value in before:
            if value is _NOTHING:
                vars(module).pop(name, None)
            else:
                vars(module)[name] = value


_NOTHING = object()
