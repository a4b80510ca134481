"""Tiny models are fastest on one thread; and TF32 convolutions would make a picture's features depend on its batch."""

import pytest
import torch


def pytest_pycollect_makemodule():
    """Called before a module of this folder is imported: without transformers none can be."""
    pytest.importorskip("transformers", reason='needs transformers: pip install ".[hf]"')


@pytest.fixture(autouse=True, scope="package")
def exact_and_fast():
    threads, tf32 = torch.get_num_threads(), torch.backends.cudnn.allow_tf32
    torch.set_num_threads(1)
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.set_num_threads(threads)
    torch.backends.cudnn.allow_tf32 = tf32
