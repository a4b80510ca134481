"""What a call on the CPU adds to the process's memory, beside its result."""

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
arguments = (300,) if op == "repulsion_select" else ()
used = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
function(torch.ones(1, 400, 4), *arguments)
features = torch.randn(1, 1000, 1024)
before = used()
out = function(features, *arguments)
print((used() - before - out.nbytes) / features.nbytes)
"""


@pytest.mark.parametrize("backend", ["reference", "native"])
@pytest.mark.parametrize("op", ["pairwise_sqdist", "repulsion_select"])
def test_no_more_than_a_few_times_the_features(op, backend):
    if backend == "native" and not _native.status().loaded:
        pytest.skip("needs the compiled library")
    command = [sys.executable, "-c", PROGRAM, op, backend]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent.parent)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < (4 if backend == "reference" else 1)
