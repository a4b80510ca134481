"""One thread, on which tiny models are fastest; no TF32 convolutions: an image's features would depend on its batch."""

import pytest
import torch


def pytest_pycollect_makemodule():
    """Skips before a module of this folder is imported: all modules need transformers."""
    pytest.importorskip("transformers", reason='needs transformers: pip install ".[hf]"')


@pytest.fixture(autouse=True, scope="package")
def exact_and_fast():
    threads, tf32 = torch.get_num_threads(), torch.backends.cudnn.allow_tf32
    torch.set_num_threads(1)
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.set_num_threads(threads)
    torch.backends.cudnn.allow_tf32 = tf32
