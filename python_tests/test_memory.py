"""Peak memory that a call on the CPU adds to the process, without its result."""

import subprocess
import sys
from pathlib import Path

import pytest

from sts_kernels import _native

PROGRAM = """
import importlib, resource, sys, torch
op, backend = sys.argv[1:]
name = op + ("_reference" if backend == "reference" else "")
function = getattr(importlib.import_module("sts_kernels.ops." + op), name)
nbytes = lambda out: sum(each.nbytes for each in (out if isinstance(out, tuple) else (out,)))
def inputs(features):
    if op == "nearest":
        return features, features, "euclidean"
    if op == "scatter_mean":
        return features, torch.arange(features.shape[1])[None] % 100, 100
    return (features, 5) if op == "knn_density" else (features, 300) if op == "repulsion_select" else (features,)
used = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
function(*inputs(torch.ones(1, 400, 4)))
features = torch.randn(1, 1000, 1024)
before = used()
out = function(*inputs(features))
print((used() - before - nbytes(out)) / features.nbytes)
"""


@pytest.mark.parametrize("backend", ["reference", "native"])
@pytest.mark.parametrize("op", ["pairwise_sqdist", "repulsion_select", "scatter_mean"])
def test_no_more_than_a_few_times_the_features(op, backend):
    if backend == "native" and not _native.status().loaded:
        pytest.skip("needs the compiled library")
    command = [sys.executable, "-c", PROGRAM, op, backend]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent.parent)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < (5 if backend == "reference" else 1)


@pytest.mark.parametrize("backend", ["reference", "native"])
@pytest.mark.parametrize("op", ["nearest", "knn_density"])
def test_nothing_n_by_n(op, backend):
    """A call holds copies of both sets and blocks of pairs of a fixed size (float64 in the reference)."""
    if backend == "native" and not _native.status().loaded:
        pytest.skip("needs the compiled library")
    command = [sys.executable, "-c", PROGRAM.replace("1000, 1024", "12000, 64"), op, backend]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent.parent)
    assert done.returncode == 0, done.stderr
    matrix = 12000 / 64  # of float32, in units of the features
    assert float(done.stdout) < matrix / (2 if backend == "reference" else 20)
