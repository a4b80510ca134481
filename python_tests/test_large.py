"""Element offsets beyond 2^31. Views with huge strides reach them without touching the memory between."""

import oracle
import pytest
import torch

import sts_kernels
from sts_kernels import _registry

FAR = 2**31 + 40


def big(numel, dtype, device):
    """Uninitialised memory; on the CPU only touched pages are committed."""
    bytes_needed = numel * dtype.itemsize
    if device.type == "cuda" and torch.cuda.mem_get_info(device)[0] < 1.2 * bytes_needed:
        pytest.skip(f"needs {bytes_needed >> 30} GiB of free GPU memory")
    try:
        return torch.empty(numel, dtype=dtype, device=device)
    except RuntimeError as error:
        pytest.skip(f"needs {bytes_needed >> 30} GiB of address space: {str(error).splitlines()[0]}")


def far_view(values, stride, dim):
    """`values` laid out with `stride` elements between neighbours along `dim`, at least one of them beyond 2^31."""
    strides = list(torch.empty(values.shape, device="meta").stride())
    strides[dim] = stride
    last = sum(s * (n - 1) for s, n in zip(strides, values.shape, strict=True))
    assert last > 2**31
    return big(last + 1, values.dtype, values.device).as_strided(values.shape, strides).copy_(values)


def features(device, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(device, torch.float16)


VIEWS = {
    "items": lambda x: far_view(x, FAR, 0),
    "tokens": lambda x: far_view(x, FAR // (x.shape[1] - 1) + 1, 1),
    "channels": lambda x: far_view(x, FAR // (x.shape[2] - 1) + 1, 2),
}


@pytest.mark.parametrize("view", VIEWS)
def test_features_far_apart(backend, view):
    x = features(backend.device, 2, 9, 8)
    far = VIEWS[view](x)
    assert torch.equal(backend("repulsion_select", far, 9), backend("repulsion_select", x, 9))
    oracle.check_sqdist(backend("pairwise_sqdist", far), x)
    potential, expected = (torch.zeros(2, 9, device=backend.device) for _ in range(2))
    token = torch.tensor([8, 3], device=backend.device)
    following = backend("repulsion_step_", potential, far, token)
    assert torch.equal(following, backend("repulsion_step_", expected, x, token))
    assert torch.equal(potential, expected)


@pytest.mark.parametrize("dim", [0, 1], ids=["tokens", "channels"])
def test_packed_features_far_apart(backend, dim):
    x = features(backend.device, 12, 9)
    far = far_view(x, FAR // (x.shape[dim] - 1) + 1, dim)
    offsets = [torch.tensor(v, dtype=torch.int32, device=backend.device) for v in ((0, 5, 12), (0, 5, 10))]
    got = backend("repulsion_select_varlen", far, *offsets, 10)
    assert torch.equal(got, backend("repulsion_select_varlen", x, *offsets, 10))


def test_potential_far_apart(backend):
    x = features(backend.device, 2, 9, 8)
    token = torch.tensor([8, 3], device=backend.device)
    expected = torch.zeros(2, 9, device=backend.device)
    want = backend("repulsion_step_", expected, x, token)
    for dim in (0, 1):
        potential = far_view(torch.zeros(2, 9, device=backend.device), FAR // (1 if dim == 0 else 8) + 1, dim)
        assert torch.equal(backend("repulsion_step_", potential, x, token), want)
        assert torch.equal(potential, expected)


@pytest.mark.slow
def test_features_of_more_than_2_31_elements(cuda):
    """Only the last tokens differ; they lie beyond element 2^31."""
    if _registry.OPS["repulsion_select"].backend("CUDA") == "reference":
        pytest.skip("the reference would copy the features to float32 several times over")
    tokens, channels = 65_600, 32_768
    x = big(tokens * channels, torch.float16, cuda).view(1, tokens, channels).zero_()
    x[0, -1, -1], x[0, -2, 0] = 200.0, -100.0
    anchor = torch.zeros(1, dtype=torch.int64, device=cuda)
    want = [0, tokens - 1, tokens - 2, 1]
    assert sts_kernels.repulsion_select(x, 4, anchor=anchor).tolist() == [want]
    offsets = [torch.tensor([0, n], dtype=torch.int32, device=cuda) for n in (tokens, 4)]
    assert sts_kernels.repulsion_select_varlen(x[0], *offsets, 4, anchor=anchor).tolist() == want
    potential, token, picks = torch.zeros(1, tokens, device=cuda), anchor, [0]
    for _ in range(3):
        token = sts_kernels.repulsion_step_(potential, x, token)
        picks.append(token.item())
    assert picks == want


@pytest.mark.slow
def test_distances_of_more_than_2_31_elements(cuda):
    tokens = 46_400
    big(int(1.1 * tokens**2), torch.float32, cuda)
    x = (torch.arange(tokens, device=cuda) % 1009).float()[None, :, None] * torch.tensor([1.0, 2.0], device=cuda)
    d = sts_kernels.pairwise_sqdist(x)
    for row in (0, 1, tokens // 2, tokens - 2, tokens - 1):
        want = (x[0] - x[0, row]).square().sum(-1)
        assert torch.equal(d[0, row], want)
        assert torch.equal(d[0, :, row], want)
