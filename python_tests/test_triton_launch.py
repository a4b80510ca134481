"""Launches of Triton kernels that skip Triton's binder: their arguments, and their results on a GPU."""

import threading

import pytest
import torch
from attention_oracle import inputs, received_inputs
from test_last_query_scores import pytest_in_its_own_process

from sts_kernels import attention_received, last_query_scores, last_query_scores_varlen
from sts_kernels.ops import _triton_launch


def calls(device, seed=0):
    """Calls of every kernel: name -> function."""
    short = inputs(2, 40, 8, 2, 128, torch.bfloat16, device, seed)
    long = inputs(2, 5000, 8, 2, 128, torch.bfloat16, device, seed)
    query, key = long
    offsets = torch.tensor([0, 3000, 10000], device=device)
    rows = received_inputs(2, 70, 130, 4, 2, 64, torch.float16, device)
    return {
        "one launch": lambda: last_query_scores(*short),
        "two launches": lambda: last_query_scores(*long),
        "varlen": lambda: last_query_scores_varlen(query, key.flatten(0, 1), offsets, 8000),
        "received": lambda: attention_received(*rows),
    }


@pytest.fixture
def by_triton(monkeypatch):
    """The launches that went through Triton's own path."""
    taken, public = [], _triton_launch.Bound.launch_by_triton

    def launch(self, *args):
        taken.append(self.launcher.__name__)
        return public(self, *args)

    monkeypatch.setattr(_triton_launch.Bound, "launch_by_triton", launch)
    return taken


def test_without_a_gpu():
    pytest_in_its_own_process("triton_launch_direct.py", TRITON_INTERPRET="0")


def test_the_second_call_launches_directly(cuda, by_triton, monkeypatch):
    for name, call in calls(cuda).items():
        first = call()
        by_triton.clear()
        second = call()
        assert not by_triton, name
        with monkeypatch.context() as patch:
            patch.setattr(_triton_launch.Launcher, "observed", lambda self: True)
            by_kernel_grid = call()
        assert by_triton, name
        assert torch.equal(first, second), name
        assert torch.equal(first, by_kernel_grid), name


def test_in_a_cuda_graph(cuda, by_triton):
    for name, call in calls(cuda).items():
        expected = call()
        by_triton.clear()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = call()
        out.zero_()
        graph.replay()
        assert torch.equal(out, expected), name
        assert not by_triton, name


def test_threads_with_streams_of_their_own(cuda):
    given = {seed: calls(cuda, seed) for seed in range(4)}
    expected = {seed: {name: call() for name, call in own.items()} for seed, own in given.items()}
    torch.cuda.synchronize()
    wrong = []

    def body(seed):
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for _ in range(10):
                for name, call in given[seed].items():
                    got = call()
                    stream.synchronize()
                    if not torch.equal(got, expected[seed][name]):
                        wrong.append((seed, name))

    threads = [threading.Thread(target=body, args=(seed,)) for seed in given]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_each_gpu_has_its_own_kernels(cuda, by_triton):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    for name, call in calls("cuda:0").items():
        expected = call()
        other = calls("cuda:1")[name]
        assert torch.equal(other().cpu(), expected.cpu()), name
        by_triton.clear()
        assert torch.equal(other().cpu(), call().cpu()), name
        assert not by_triton, name


def test_known_versions():
    known = ["3.4.0", "3.5.1", "3.6.0", "3.7.1+git1234", "3.8.0", "3.9.0"]
    assert all(map(_triton_launch.knows, known))
    assert not any(map(_triton_launch.knows, ["2.3.1", "3.3.1", "3.10.0", "3.40.0", "4.5", "main", ""]))


@pytest.mark.parametrize(
    ("versions", "said"),
    [
        ({"triton": "3.6.0"}, "triton is installed"),
        ({"triton": "3.10.0"}, "version 3.10.0 launches kernels by kernel[grid]"),
        ({"pytorch-triton": "3.11.0+git"}, "version 3.11.0+git launches kernels by kernel[grid]"),
        ({}, "triton is installed, its version unknown"),
    ],
)
def test_info_says_how_kernels_are_launched(monkeypatch, versions, said):
    metadata = _triton_launch.importlib.metadata

    def version(name):
        if name not in versions:
            raise metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(metadata, "version", version)
    how = _triton_launch.how()
    assert how.endswith(said) if said.startswith("triton") else said in how
