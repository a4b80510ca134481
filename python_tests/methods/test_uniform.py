"""Uniform: exactly K tokens, evenly spread."""

import torch

from sts_kernels import methods


def test_every_k_of_n(device):
    uniform = methods.create("uniform")
    for tokens in (1, 2, 7, 30):
        for k in range(1, tokens + 1):
            order = uniform.select(k=k, features=torch.empty(1, tokens, 1, device=device)).order[0]
            assert order.tolist() == [i * tokens // k for i in range(k)]
            gaps = order.diff()
            assert not gaps.numel() or (gaps.min() >= 1 and gaps.max() - gaps.min() <= 1)


def test_each_item_by_its_own_count(device):
    counts = torch.tensor([8, 4, 3, 1, 0], device=device)
    order = methods.create("uniform").select(k=4, features=torch.empty(5, 8, 1, device=device), num_tokens=counts).order
    assert order.tolist() == [[0, 2, 4, 6], [0, 1, 2, 3], [0, 1, 2, -1], [0, -1, -1, -1], [-1, -1, -1, -1]]
