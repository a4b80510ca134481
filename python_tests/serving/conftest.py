"""Tiny models are fastest on one thread. The engine's own tests run where STS_KERNELS_TEST_VLLM=1 is set."""

import os

import pytest
import torch

ENGINE = os.environ.get("STS_KERNELS_TEST_VLLM") == "1"


def pytest_pycollect_makemodule():
    """Skips before a module of this folder is imported: all modules need transformers."""
    pytest.importorskip("transformers", reason='needs transformers: pip install ".[hf]"')


@pytest.fixture(autouse=True, scope="package")
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def engine():
    """Skips unless STS_KERNELS_TEST_VLLM=1 is set and vllm is installed."""
    if not ENGINE:
        pytest.skip("runs vLLM's engine: bench/serving_check.sh, or STS_KERNELS_TEST_VLLM=1 where vllm is installed")
    pytest.importorskip("vllm")
