"""How a function of fixed shapes is run again and again: as it is, compiled whole, or captured in a CUDA graph.

Such a function takes no arguments: it reads buffers that keep their addresses, and what it returns is overwritten by
the next run. Graphs share one memory pool. They never run at the same time, and each holds on to its outputs, so the
memory of one graph's intermediates serves the others.
"""

import contextlib
import itertools
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Generic, TypeAlias, TypeVar

import torch

from ....methods import _packed

Out = TypeVar("Out")  # of a function, a dict of tensors
Around: TypeAlias = Callable[[], contextlib.AbstractContextManager[None]]  # makes the context in which one is called

WARM_UPS = 2  # runs before a capture: kernels are loaded, tuned and compiled, and workspaces allocated


class Inputs:
    """Host integers of fixed shapes on their way to the device: named views of one buffer, filled by one copy."""

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
            self._read.synchronize()  # the last copy out of the staging buffer
        for name, value in values.items():
            self._staging[name].copy_(value)
        self._device.copy_(self._host, non_blocking=True)
        if self._read is not None:
            self._read.record(torch.cuda.current_stream(self._device.device))


class Buffers:
    """Memory by name, as large as the largest tensor taken under it: buckets run one at a time and share it."""

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
    """Makes functions ready to run again.

    backend: None, or that of torch.compile. Whatever is on a CUDA device is captured.
    """

    def __init__(self, device: torch.device, backend: str | None):
        self.device, self.backend = device, backend
        self._pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def ready(
        self, function: Callable[[], Out], around: Around = contextlib.nullcontext, now: bool = True
    ) -> "Graph[Out]":
        """The function must be safe to run any number of times on the buffers as they are when it is prepared. now:
        prepare it at once."""
        graph = Graph(self, function, around)
        if now:
            graph.prepare()
        return graph

    def compiled(self, function: Callable[[], Out]) -> Callable[[], Out]:
        if self.backend is None:
            return function
        torch.compiler.assume_constant_result(_packed.copied)  # marked here, since this imports the compiler
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
    """`run()` gives the function's outputs, which hold until the next run. Before `prepare()` it is called as it is."""

    def __init__(self, graphs: Graphs, function: Callable[[], Out], around: Around):
        self._graphs, self._function, self._around = graphs, function, around
        self._constants: dict[Any, torch.Tensor] = {}
        self._captured: tuple[torch.cuda.CUDAGraph, Out] | None = None
        self.prepared = False

    def prepare(self) -> None:
        """Compiles it, and on a CUDA device captures it. Once."""
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
    """No gradients, and ordinary tensors: buffers outlive the inference mode of whoever calls."""
    with torch.inference_mode(False), torch.no_grad():
        yield


def _with_code_of_its_own(function: Callable[[], Out]) -> Callable[[], Out]:
    """Dynamo keeps what it compiled by code object, and only a few for each: buckets must not share one."""

    def entry() -> Out:
        return function()

    code = entry.__code__.replace(co_name=f"entry_{next(_numbers)}")
    return types.FunctionType(code, entry.__globals__, code.co_name, None, entry.__closure__)


_numbers = itertools.count()


@contextlib.contextmanager
def replaced(attributes: Sequence[tuple[torch.nn.Module, str, object]]) -> Iterator[None]:
    """Modules with other attributes of their own: a configuration, a forward."""
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
