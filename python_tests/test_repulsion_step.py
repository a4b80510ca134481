"""repulsion_step_ against its contract."""

import math

import oracle
import pytest
import torch
from cases import CASES, LAYOUT_CASES, Case, by_name, channel_slice, normal, with_dtypes

import sts_kernels

OP = "repulsion_step_"
STEP_CASES = [case for case in CASES if case.num_tokens is None]


def samples(device):
    x = normal(torch.Generator().manual_seed(0), 2, 9, 5).to(device)
    zeros = lambda *shape: torch.zeros(*shape, device=device)  # noqa: E731
    index = lambda *values, dtype=torch.int64: torch.tensor(values, dtype=dtype, device=device)  # noqa: E731
    return [
        (zeros(2, 9), x, index(3, 8)),
        (zeros(2, 9), x.half(), index(-1, 0, dtype=torch.int32), 0.5),
        (zeros(9, 2).T, x[..., ::2], index(3, 8)),
        (zeros(0, 9), x[:0], index()),
    ]


def sized(step, device):
    batch, tokens, channels = 2 + step, 11 + 6 * step, 5 + 2 * step
    rng = torch.Generator().manual_seed(step)
    return {
        "potential": torch.rand(batch, tokens, generator=rng).to(device),
        "features": normal(rng, batch, tokens, channels).to(device),
        "picked": torch.randint(tokens, (batch,), generator=rng).to(device),
        "eps": 1e-3,
    }


def first_tokens(case, device):
    """(B,) tokens to start from, in general a different token per item."""
    return torch.tensor([(5 * b + 3) % case.tokens for b in range(case.batch)], device=device, dtype=torch.int64)


@pytest.mark.parametrize(("case", "dtype"), with_dtypes(STEP_CASES))
def test_steps(backend, case, dtype):
    """Three steps from a potential that is not zero, each judged by itself."""
    features = case.features(seed=1, dtype=dtype, device=backend.device)
    rng = torch.Generator().manual_seed(2)
    potential = torch.rand(case.batch, case.tokens, generator=rng).to(backend.device)
    token = first_tokens(case, backend.device).to(case.index_dtype)
    for _ in range(3):
        before = potential.clone()
        following = backend(OP, potential, features, token, case.eps)
        oracle.check_step(potential, following, before, features, token, case.eps)
        token = following


def strided(values, layout):
    """`values` (B, N) as a view into a larger buffer of sentinels, and the buffer."""
    batch, tokens = values.shape
    if layout == "transposed":
        buffer = torch.full((tokens + 2, batch + 3), -7.0, device=values.device)
        view = buffer[1:-1, 2 : 2 + batch].T
    elif layout == "every other":
        buffer = torch.full((batch + 1, 2 * tokens + 3), -7.0, device=values.device)
        view = buffer[:batch, 1 : 1 + 2 * tokens : 2]
    else:
        buffer = torch.full((batch + 2, tokens + 5), -7.0, device=values.device)
        view = buffer[1:-1, 3 : 3 + tokens]
    view.copy_(values)
    return view, buffer


@pytest.mark.parametrize("layout", ["padded", "transposed", "every other"])
@pytest.mark.parametrize("name", ["5x127x64_k40", "not_finite", "1x577x1024_k64", "channel_slice"])
def test_potential_may_be_a_view_and_nothing_around_it_changes(backend, name, layout):
    case = by_name(name)
    features = case.features(seed=3, device=backend.device)
    token = first_tokens(case, backend.device)
    plain = torch.zeros(case.batch, case.tokens, device=backend.device)
    view, buffer = strided(plain, layout)
    expected = backend(OP, plain, features, token)
    pointer = view.data_ptr()
    assert torch.equal(backend(OP, view, features, token), expected)
    assert view.data_ptr() == pointer
    assert torch.equal(view, plain)
    view.fill_(-7.0)
    assert (buffer == -7.0).all(), "written outside the potential"


def test_known_values(backend):
    x = torch.tensor([0.0, 1.0, 3.0], device=backend.device)[None, :, None]
    potential = torch.tensor([[0.5, 0.25, 0.125]], device=backend.device)
    token = torch.tensor([0], device=backend.device)
    assert backend(OP, potential, x, token, 1.0).tolist() == [2]
    torch.testing.assert_close(potential, torch.tensor([[math.inf, 0.75, 0.225]], device=backend.device))
    assert backend(OP, potential, x, torch.tensor([2], device=backend.device), 1.0).tolist() == [1]
    assert potential.tolist()[0][0] == potential.tolist()[0][2] == math.inf
    assert backend(OP, potential, x, torch.tensor([1], device=backend.device), 1.0).tolist() == [-1]
    assert potential.tolist() == [[math.inf] * 3]


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_minus_one_leaves_an_item_as_it_is(backend, dtype):
    features = normal(torch.Generator().manual_seed(0), 3, 33, 8).to(backend.device)
    potential = torch.rand(3, 33, generator=torch.Generator().manual_seed(1)).to(backend.device)
    before = potential.clone()
    picked = torch.tensor([4, -1, 0], dtype=dtype, device=backend.device)
    following = backend(OP, potential, features, picked)
    oracle.check_step(potential, following, before, features, picked)
    assert torch.equal(potential[1], before[1])
    assert following[1] == before[1].argmin()


def test_infinite_potential_is_never_picked(backend):
    """A ragged batch marks padding with +inf potentials; features of padding may hold garbage."""
    case = Case("padded", 3, 40, 12, 1, num_tokens=(40, 7, 1))
    features = case.features(seed=4, device=backend.device)
    potential = torch.zeros(3, 40, device=backend.device)
    for b, count in enumerate(case.num_tokens):
        potential[b, count:] = math.inf
    token = torch.zeros(3, dtype=torch.int64, device=backend.device)
    picks = [token]
    for _ in range(39):
        token = backend(OP, potential, features, token)
        picks.append(token)
    assert (backend(OP, potential, features, token) == -1).all()
    picks = torch.stack(picks, 1)
    zeros = torch.zeros(3, dtype=torch.int64)
    oracle.check_select(picks, features, 40, anchor=zeros, num_tokens=torch.tensor(case.num_tokens))
    assert (potential == math.inf).all()


def test_ties_go_to_the_lowest_index(backend):
    """Equal potentials far apart, across the block and warp boundaries of a kernel."""
    for tokens in (5, 33, 129, 1025, 5000):
        x = torch.zeros(1, tokens, 3, device=backend.device)
        potential = torch.ones(1, tokens, device=backend.device)
        low, high = tokens // 3, tokens - 1
        potential[0, [low, tokens // 2, high]] = 0.25
        nothing = torch.tensor([-1], device=backend.device)
        assert backend(OP, potential, x, nothing).tolist() == [low]
        assert backend(OP, potential, x, torch.tensor([low], device=backend.device)).tolist() == [tokens // 2]


def test_not_finite_tokens_come_last_in_order(backend):
    features = by_name("not_finite").features(seed=5, device=backend.device)
    batch, tokens, _ = features.shape
    potential = torch.zeros(batch, tokens, device=backend.device)
    token = torch.full((batch,), 1, device=backend.device)
    picks = [token]
    for _ in range(tokens - 1):
        token = backend(OP, potential, features, token)
        picks.append(token)
    picks = torch.stack(picks, 1).cpu()
    for b in range(batch):
        bad = (~features[b].isfinite().all(-1)).nonzero()[:, 0].tolist()
        assert picks[b, -len(bad) :].tolist() == bad


def test_not_finite_token_repels_none(backend):
    x = torch.randn(1, 6, 3, generator=torch.Generator().manual_seed(0)).to(backend.device)
    x[0, 2, 1] = math.nan
    potential = torch.arange(6.0, device=backend.device)[None].clone()
    assert backend(OP, potential, x, torch.tensor([2], device=backend.device)).tolist() == [0]
    assert potential[0, [0, 1, 3, 4, 5]].tolist() == [0.0, 1.0, 3.0, 4.0, 5.0]
    assert potential[0, 2] == math.inf


@pytest.mark.parametrize(
    "case", [by_name("5x127x64_k40"), by_name("near_duplicates"), *LAYOUT_CASES[:3]], ids=lambda case: case.name
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_same_input_same_output_whatever_the_batch(backend, case, dtype):
    features = case.features(seed=6, dtype=dtype, device=backend.device)
    start = torch.rand(case.batch, case.tokens, generator=torch.Generator().manual_seed(7)).to(backend.device)
    token = first_tokens(case, backend.device)
    first = start.clone()
    following = backend(OP, first, features, token)
    for _ in range(2):
        again = start.clone()
        assert torch.equal(backend(OP, again, features, token), following)
        assert torch.equal(again, first)
    for b in range(case.batch):
        alone = start[b : b + 1].clone()
        assert torch.equal(backend(OP, alone, features[b : b + 1], token[b : b + 1])[0], following[b])
        assert torch.equal(alone[0], first[b])


def test_many_items(backend):
    case = Case("many", 300, 17, 5, 1, layout=channel_slice)
    features = case.features(seed=8, device=backend.device)
    potential = torch.zeros(300, 17, device=backend.device)
    before = potential.clone()
    token = first_tokens(case, backend.device)
    following = backend(OP, potential, features, token)
    oracle.check_step(potential, following, before, features, token)


def test_raw_op_is_the_public_function(device):
    features = by_name("5x127x64_k40").features(seed=9, device=device)
    token = torch.arange(5, device=device)
    one, two, three = (torch.zeros(5, 127, device=device) for _ in range(3))
    following = sts_kernels.repulsion_step_(one, features, token)
    assert torch.equal(torch.ops.sts_kernels.repulsion_step_(two, features, token), following)
    assert torch.equal(torch.ops.sts_kernels.repulsion_step_.default(three, features, token, eps=1e-6), following)
    assert torch.equal(one, two)
    assert torch.equal(one, three)


def test_potential_takes_no_gradient(device):
    """Features that require grad leave no autograd graph in the potential."""
    features = torch.randn(2, 9, 4, device=device, requires_grad=True)
    potential = torch.zeros(2, 9, device=device)
    sts_kernels.repulsion_step_(potential, features, torch.tensor([1, 2], device=device))
    assert not potential.requires_grad
