"""Fixtures shared by all tests: devices and backends, and skips for missing ones.

STS_KERNELS_TEST_REQUIRE is a comma-separated list. cuda: skips for lack of a GPU become failures. browser: skips for
lack of a Chromium become failures. native: a run without the compiled library fails.
"""

import os
from dataclasses import dataclass

# Must be set before torch is loaded. Otherwise the two OpenMP runtimes in a torch process spin against each other, and
# small CPU ops take milliseconds.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
import torch
from emulator import build as emulator_build
from emulator import ops as emulated_ops

import sts_kernels
from sts_kernels import _native, _registry

EMULATED_WORK = 2e6  # most elements times rows of a tensor that the emulated backend is given
REQUIRED = set(filter(None, os.environ.get("STS_KERNELS_TEST_REQUIRE", "").split(",")))


def pytest_report_header(config):
    status = _native.status()
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    lines = [
        f"sts_kernels {sts_kernels.__version__} from {os.path.dirname(sts_kernels.__file__)}; "
        f"compiled library: {'loaded' if status.loaded else status.reason}",
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, GPU: {gpu}",
    ]
    width = max(map(len, _registry.OPS))
    for name, op in _registry.OPS.items():
        lines.append(f"  {name:<{width}}  CPU: {op.backend('CPU')}, CUDA: {op.backend('CUDA')}")
    return lines


def pytest_sessionstart(session):
    if unknown := REQUIRED - {"browser", "cuda", "native"}:
        raise pytest.UsageError(f"STS_KERNELS_TEST_REQUIRE: expected browser, cuda, native, got {', '.join(unknown)}")


def cuda_or_skip() -> torch.device:
    if not torch.cuda.is_available():
        reason = f"needs a CUDA GPU: torch {torch.__version__} sees none"
        if "cuda" in REQUIRED:
            pytest.fail(f"STS_KERNELS_TEST_REQUIRE=cuda, but this test {reason}")
        pytest.skip(reason)
    return torch.device("cuda", torch.cuda.current_device())


@pytest.fixture
def cuda() -> torch.device:
    """A CUDA device; skips without one."""
    return cuda_or_skip()


@pytest.fixture(params=["cpu", "cuda"])
def device(request) -> torch.device:
    return cuda_or_skip() if request.param == "cuda" else torch.device("cpu")


@dataclass(frozen=True)
class Backend:
    """Runs an op: the reference function, the CUDA kernel in the emulator, or the public function on a device."""

    name: str
    device: torch.device

    def __call__(self, op: str, *args, **kwargs):
        if self.name == "emulated":
            if not emulated_ops.has_kernel(op):
                pytest.skip(f"no file of csrc/cuda registers a kernel of {op}")
            tensors = [a for a in (*args, *kwargs.values()) if isinstance(a, torch.Tensor) and a.dim() > 1]
            if max(a.numel() * a.shape[-2] for a in tensors) > EMULATED_WORK:
                pytest.skip("would take the emulator seconds")
            return emulated_ops.call(op, *args, **kwargs)
        call = _registry.OPS[op].reference if self.name == "reference" else getattr(sts_kernels, op)
        return call(*args, **kwargs)


@pytest.fixture(scope="session")
def emulated_library() -> None:
    """Builds and loads the emulated ops; a build that fails is not repeated for every test."""
    if missing := emulator_build.missing_tool(module=False):
        pytest.skip(missing)
    emulated_ops.load()


@pytest.fixture(params=["reference", "cpu", "emulated", "cuda"])
def backend(request) -> Backend:
    if request.param == "emulated":
        request.getfixturevalue("emulated_library")
    return Backend(request.param, cuda_or_skip() if request.param == "cuda" else torch.device("cpu"))
