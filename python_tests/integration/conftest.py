"""Tiny models are fastest on one thread."""

import pytest
import torch


def pytest_pycollect_makemodule():
    """Called before a module of this folder is imported: without transformers none can be."""
    pytest.importorskip("transformers", reason="needs transformers: pip install 'sts-kernels[hf]'")


@pytest.fixture(autouse=True, scope="package")
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
