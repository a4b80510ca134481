"""suppress_select against its contract."""

import math

import oracle
import pytest
import torch
from cases import CASES, by_name, normal, with_dtypes
from selection_inputs import of_case, random_inputs, ranks, taus

import sts_kernels

OP = "suppress_select"


def samples(device):
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(2, 9, 5, generator=rng).to(device)
    rank, tau = ranks(rng, 2, 9).to(device), taus(rng, 2, 9).to(device)
    counts = torch.tensor([9, 0], dtype=torch.int32, device=device)
    return [
        (x, rank, tau, 3),
        (x.half(), rank.int(), tau.bfloat16(), 9, counts),
        (x[..., 1:], rank.T.contiguous().T, tau, 4, counts.long()),
        (x[:0], rank[:0], tau[:0], 2),
    ]


def sized(step, device):
    batch, tokens, channels, k = 2 + step, 11 + 6 * step, 5 + 2 * step, 3 + step
    rng = torch.Generator().manual_seed(step)
    return {
        "features": torch.randn(batch, tokens, channels, generator=rng).to(device),
        "rank": ranks(rng, batch, tokens).to(device),
        "tau": taus(rng, batch, tokens).to(device),
        "k": k,
        "num_tokens": torch.randint(3, tokens + 1, (batch,), generator=rng).to(device),
    }


@pytest.mark.parametrize(("case", "dtype"), with_dtypes(CASES))
def test_picks_are_a_walk(backend, case, dtype):
    inputs = of_case(OP, case, seed=1, dtype=dtype, device=backend.device)
    oracle.check_suppress(backend(OP, **inputs), **inputs)


@pytest.mark.parametrize("seed", range(150))
def test_random_inputs(backend, seed):
    inputs = random_inputs(OP, seed, backend.device)
    oracle.check_suppress(backend(OP, **inputs), **inputs)


def at_angles(*degrees, device="cpu"):
    angle = torch.tensor(degrees, dtype=torch.float64).deg2rad()
    return torch.stack([angle.cos(), angle.sin()], 1)[None].float().to(device)


def below_angle(degrees):
    """The tau that suppresses tokens within `degrees`."""
    return 1 - math.cos(math.radians(degrees))


def test_known_selection(backend):
    """Worked by hand on angles of 0, 10, 25, 40, 90 degrees, each of which suppresses tokens within 20 degrees."""
    x = at_angles(0.0, 10.0, 25.0, 40.0, 90.0, device=backend.device)
    tau = torch.full((1, 5), below_angle(20), device=backend.device)
    rank = torch.tensor([[0, 1, 2, 3, 4]], device=backend.device)
    # 0 suppresses 10, 25 suppresses 40; then the suppressed tokens follow by rank.
    assert backend(OP, x, rank, tau, 5).tolist() == [[0, 2, 4, 1, 3]]
    rank = torch.tensor([[4, 2, 3, 1, 0]], device=backend.device)
    # 90, then 40, which suppresses 25, then 10, which suppresses 0.
    assert backend(OP, x, rank, tau, 5).tolist() == [[4, 3, 1, 2, 0]]


def test_the_threshold_is_the_picks_own(backend):
    x = at_angles(0.0, 10.0, 20.0, 30.0, device=backend.device)
    rank = torch.arange(4, device=backend.device)[None]
    tau = torch.tensor([[below_angle(5), below_angle(15), 2.0, 2.0]], device=backend.device)
    assert backend(OP, x, rank, tau, 4).tolist() == [[0, 1, 3, 2]]


def test_suppressed_tokens_suppress_only_when_picked(backend):
    """Token 0 suppresses token 1, whose wide tau does not count; token 1 is picked last."""
    x = at_angles(0.0, 10.0, 40.0, 70.0, device=backend.device)
    rank = torch.arange(4, device=backend.device)[None]
    tau = torch.tensor([[below_angle(20), 2.0, 0.0, 0.0]], device=backend.device)
    assert backend(OP, x, rank, tau, 4).tolist() == [[0, 2, 3, 1]]


def test_nothing_is_suppressed_at_the_threshold_itself(backend):
    """2 - 2 cosine < 2 tau is strict: equal tokens at tau = 0, and right angles, exactly 2, at tau = 1."""
    x = torch.tensor([[[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 2.0]]], device=backend.device)
    rank = torch.arange(4, device=backend.device)[None]
    for tau, want in ((0.0, [0, 1, 2, 3]), (1e-6, [0, 2, 1, 3]), (1.0, [0, 2, 1, 3]), (1.001, [0, 1, 2, 3])):
        every = torch.full((1, 4), tau, device=backend.device)
        assert backend(OP, x, rank, every, 4).tolist() == [want]


def test_a_zero_row_has_cosine_0(backend):
    x = torch.tensor([[[1.0, 0.0], [0.0, 0.0], [0.0, 0.0], [1.0, 0.1]]], device=backend.device)
    rank = torch.arange(4, device=backend.device)[None]
    for tau, want in ((0.9, [0, 1, 2, 3]), (1.1, [0, 1, 2, 3]), (0.0, [0, 1, 2, 3])):
        every = torch.full((1, 4), tau, device=backend.device)
        assert backend(OP, x, rank, every, 4).tolist() == [want]
    only_zero = torch.tensor([[0.0, 1.1, 0.0, 0.0]], device=backend.device)
    assert backend(OP, x, rank + torch.tensor([[9, 0, 0, 0]], device=x.device), only_zero, 2).tolist() == [[1, 2]]


def test_ranks_need_not_be_a_permutation(backend):
    x = at_angles(0.0, 90.0, 180.0, 270.0, 45.0, device=backend.device)
    tau = torch.full((1, 5), math.nan, device=backend.device)
    rank = torch.tensor([[7, 3, 7, 8388607, 3]], device=backend.device)
    assert backend(OP, x, rank, tau, 5).tolist() == [[1, 4, 0, 2, 3]]
    rank = torch.tensor([[-1, 3, 8388608, 2**40, 3]], device=backend.device)  # out of range: last, by index
    assert backend(OP, x, rank, tau, 5).tolist() == [[1, 4, 0, 2, 3]]


def test_tokens_that_are_not_finite_come_last_and_suppress_none(backend):
    x = at_angles(0.0, 1.0, 2.0, 90.0, device=backend.device)
    x[0, 0, 1], x[0, 2, 0] = math.nan, math.inf
    rank = torch.arange(4, device=backend.device)[None]
    tau = torch.full((1, 4), 0.5, device=backend.device)
    assert backend(OP, x, rank, tau, 4).tolist() == [[1, 3, 0, 2]]


def test_equals_brute_force(backend):
    """The walk in float64, where no distance is near its threshold."""
    rng = torch.Generator().manual_seed(7)
    matched = 0
    for _ in range(30):
        x = normal(rng, 1, 60, 3)
        rank, tau = ranks(rng, 1, 60), taus(rng, 1, 60)
        d = oracle.measured(x[0], x[0], "cosine") / 2
        if ((d / tau[0].double()[:, None] - 1).abs().fill_diagonal_(1.0) < 1e-3).any():
            continue
        matched += 1
        order = rank[0].argsort().tolist()
        picks = []
        for i in order:
            if not any(d[j, i] < tau[0, j] for j in picks):
                picks.append(i)
        picks += [i for i in order if i not in picks]
        got = backend(OP, *(t.to(backend.device) for t in (x, rank, tau)), 60)
        assert got[0].tolist() == picks
    assert matched >= 5, "too few inputs have clear thresholds for this test to say anything"


@pytest.mark.parametrize("name", ["5x127x64_k40", "near_duplicates", "ragged", "not_finite"])
def test_prefix(backend, name):
    case = by_name(name)
    inputs = of_case(OP, case, seed=2, device=backend.device)
    full = backend(OP, **inputs)
    for k in (1, 2, 15, 16, 17, case.k - 1):
        assert torch.equal(backend(OP, **{**inputs, "k": k}), full[:, :k]), f"k = {k}"


@pytest.mark.parametrize("name", ["5x127x64_k40", "2x257x1000_k33", "near_duplicates", "not_finite_1000", "ragged"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_items_do_not_know_of_each_other(backend, name, dtype):
    case = by_name(name)
    inputs = of_case(OP, case, seed=4, dtype=dtype, device=backend.device)
    batch = backend(OP, **inputs)
    assert torch.equal(backend(OP, **inputs), batch)
    for b in range(case.batch):
        item = {n: v[b : b + 1] if isinstance(v, torch.Tensor) else v for n, v in inputs.items()}
        assert torch.equal(backend(OP, **item), batch[b : b + 1])


@pytest.mark.parametrize("name", ["2x257x1000_k33", "1x9001x5_k40", "near_duplicates", "1x1225x64_k1225"])
def test_number_of_threads_does_not_matter(name):
    inputs = of_case(OP, by_name(name), seed=3)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = sts_kernels.suppress_select(**inputs)
        torch.set_num_threads(3)
        three = sts_kernels.suppress_select(**inputs)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(one, three)


@pytest.mark.parametrize("name", ["token_slice", "channel_slice", "channel_major", "channel_stride", "token_major"])
def test_layout_does_not_matter(backend, name):
    inputs = of_case(OP, by_name(name), seed=8, device=backend.device)
    want = backend(OP, **{**inputs, "features": inputs["features"].contiguous()})
    assert torch.equal(backend(OP, **inputs), want)
    for n in ("rank", "tau"):
        inputs[n] = inputs[n].T.contiguous().T
    assert torch.equal(backend(OP, **inputs), want)
    assert torch.equal(backend(OP, **{**inputs, "rank": inputs["rank"].int()}), want)


def test_raw_op_is_the_public_function(device):
    inputs = of_case(OP, by_name("ragged"), seed=11, device=device)
    want = sts_kernels.suppress_select(**inputs)
    assert torch.equal(torch.ops.sts_kernels.suppress_select(**inputs), want)
    del inputs["num_tokens"]
    inputs["features"] = inputs["features"].nan_to_num()
    want = sts_kernels.suppress_select(**inputs, num_tokens=None)
    assert torch.equal(torch.ops.sts_kernels.suppress_select(**inputs), want), "the schema's defaults differ"
