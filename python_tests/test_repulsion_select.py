"""repulsion_select against its contract."""

import itertools

import oracle
import pytest
import torch
from cases import CASES, Case, by_name, common_offset, normal, with_dtypes

import sts_kernels

OP = "repulsion_select"


def samples(device):
    x = normal(torch.Generator().manual_seed(0), 2, 9, 5).to(device)
    index = lambda *values, dtype=torch.int64: torch.tensor(values, dtype=dtype, device=device)  # noqa: E731
    return [
        (x, 3),
        (x.bfloat16(), 9, 0.1),
        (x[:, 1:], 4, 1e-6, index(7, 0)),
        (x.half()[..., 1:], 4, 1e-6, None, index(9, 0, dtype=torch.int32)),
        (x, 1, 1e-6, index(2, 3), index(4, 9)),
        (x[:0], 2),
    ]


def sized(step, device):
    batch, tokens, channels, k = 2 + step, 11 + 6 * step, 5 + 2 * step, 3 + step
    rng = torch.Generator().manual_seed(step)
    return {
        "features": normal(rng, batch, tokens, channels).to(device),
        "k": k,
        "eps": 1e-3,
        "anchor": torch.randint(3, (batch,), generator=rng).to(device),
        "num_tokens": torch.randint(3, tokens + 1, (batch,), generator=rng).to(device),
    }


@pytest.mark.parametrize(("case", "dtype"), with_dtypes(CASES))
def test_picks_are_greedy(backend, case, dtype):
    inputs = case.inputs(seed=1, dtype=dtype, device=backend.device)
    before = inputs["features"].clone()
    picks = backend(OP, **inputs)
    oracle.check_select(picks, **inputs)
    if case.picks is not None:
        assert picks.tolist() == [list(case.picks)] * case.batch
    assert torch.equal(inputs["features"].isnan(), before.isnan())
    assert torch.equal(inputs["features"].nan_to_num(), before.nan_to_num()), "the features changed"


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", ["tree", "tree_default_anchor", "tree_128", "not_finite_anchor"])
def test_ties_go_to_the_lowest_index(backend, name, seed):
    """Exact sums give exact ties, so only one answer is right."""
    case = by_name(name)
    inputs = case.inputs(seed=seed, device=backend.device)
    picks = backend(OP, **inputs).cpu()
    for b, x in enumerate(inputs["features"].cpu()):
        # Every leaf of a full tree is equally far from the mean, which is exact too.
        anchor = 0 if case.anchor is None else case.anchor[b]
        if name.startswith("tree"):
            assert picks[b].tolist() == oracle.greedy(x, case.k, case.eps, anchor)
        else:
            rest = [i for i in range(case.tokens) if not x[i].isfinite().all() and i != anchor]
            assert picks[b, -len(rest) :].tolist() == rest


@pytest.mark.parametrize("name", ["duplicates", "duplicates_channel_slice", "duplicates_channel_major"])
@pytest.mark.parametrize("seed", range(5))
def test_exact_duplicates_come_in_order_of_index(backend, name, seed):
    """Copies of a token have equal potentials at every step, so the lowest index among them always goes first."""
    inputs = by_name(name).inputs(seed=seed, device=backend.device)
    picks = backend(OP, **inputs).cpu()
    for b, x in enumerate(inputs["features"].cpu()):
        _, group = x.unique(dim=0, return_inverse=True)
        for g in range(group.max() + 1):
            members = picks[b][group[picks[b]] == g].tolist()
            # The anchor is the lowest of its group too: copies are equally far from the mean.
            assert members == sorted(members)


def test_known_selection(backend):
    """Worked by hand on five points of a line."""
    x = torch.tensor([0.0, 1.0, 2.0, 3.0, 10.0], device=backend.device)[None, :, None]
    # The mean is 3.2, so 3 is the anchor. Farthest from it is 10, then 0: U(0) = 1/9 + 1/100, U(1) = 1/4 + 1/81. Then
    # U(1) = 1/4 + 1/81 + 1 is less than U(2) = 1 + 1/64 + 1/4.
    assert backend(OP, x, 5).tolist() == [[3, 4, 0, 1, 2]]
    anchor = torch.tensor([1], device=backend.device)
    assert backend(OP, x, 5, anchor=anchor).tolist() == [[1, 4, 3, 0, 2]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_equals_brute_force_where_margins_are_wide(backend, dtype):
    """Points of well-separated scales: every margin is wider than the tolerance, so the indices must match."""
    rng = torch.Generator().manual_seed(5)
    matched = 0
    for _ in range(20):
        x = (normal(rng, 1, 24, 3) * 3).round().to(dtype)
        anchor = torch.randint(24, (1,), generator=rng)
        want = oracle.greedy(x[0], 8, 1e-6, anchor.item())
        potential = oracle.weights(x[0, want[:-1]], x[0], 1e-6).cumsum(0)
        for t in range(7):
            potential[t, want[: t + 1]] = torch.inf
        least = potential.topk(2, dim=1, largest=False).values
        if (least[:, 1] <= (1 + oracle.REGRET) * least[:, 0]).any():
            continue
        matched += 1
        got = backend(OP, x.to(backend.device), 8, anchor=anchor.to(backend.device))
        assert got[0].tolist() == want
    assert matched >= 5, "too few inputs have wide margins for this test to say anything"


@pytest.mark.parametrize("name", ["5x127x64_k40", "near_duplicates", "not_finite", "ragged", "large_eps"])
def test_prefix(backend, name):
    """The first k' picks equal the picks of a call with k'."""
    case = by_name(name)
    inputs = case.inputs(seed=2, device=backend.device)
    full = backend(OP, **inputs)
    for k in (1, 2, 7, 31, 32, 33, case.k - 1):
        assert torch.equal(backend(OP, **{**inputs, "k": k}), full[:, :k]), f"k = {k}"


@pytest.mark.parametrize("name", ["5x127x64_k40", "near_duplicates", "not_finite", "ragged", "wide", "common_offset"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_input_same_output(backend, name, dtype):
    inputs = by_name(name).inputs(seed=2, dtype=dtype, device=backend.device)
    first = backend(OP, **inputs)
    for _ in range(3):
        assert torch.equal(backend(OP, **inputs), first)


@pytest.mark.parametrize("name", ["2x257x1000_k33", "1x9001x5_k40", "near_duplicates", "common_offset_4096"])
def test_number_of_threads_does_not_matter(name):
    inputs = by_name(name).inputs(seed=3)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = sts_kernels.repulsion_select(**inputs)
        torch.set_num_threads(3)
        three = sts_kernels.repulsion_select(**inputs)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(one, three)


@pytest.mark.parametrize(
    "name",
    ["5x127x64_k40", "2x257x1000_k33", "near_duplicates", "not_finite_1000", "ragged", "common_offset", "anchor"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_items_do_not_know_of_each_other(backend, name, dtype):
    """An item's picks do not depend on the other items or on its place in the batch."""
    case = by_name(name)
    inputs = case.inputs(seed=4, dtype=dtype, device=backend.device)
    batch = backend(OP, **inputs)
    for b in range(case.batch):
        item = {n: v[b : b + 1] if isinstance(v, torch.Tensor) else v for n, v in inputs.items()}
        assert torch.equal(backend(OP, **item), batch[b : b + 1])
    order = torch.arange(case.batch - 1, -1, -1, device=backend.device)
    flipped = {n: v[order] if isinstance(v, torch.Tensor) else v for n, v in inputs.items()}
    assert torch.equal(backend(OP, **flipped), batch[order])


def test_many_items(backend):
    """More items than a GPU has SMs, of different lengths."""
    counts = [(7 * b) % 41 for b in range(300)]
    case = Case("many", 300, 40, 6, 5, num_tokens=tuple(counts))
    inputs = case.inputs(seed=6, device=backend.device)
    oracle.check_select(backend(OP, **inputs), **inputs)


@pytest.mark.parametrize("name", ["ragged", "ragged_anchor", "ragged_common_offset", "ragged_not_finite"])
def test_padding_does_not_count(backend, name):
    """A ragged item is picked like the same tokens without their padding."""
    case = by_name(name)
    inputs = case.inputs(seed=7, device=backend.device)
    picks = backend(OP, **inputs)
    for b, count in enumerate(case.num_tokens):
        if count:
            k = min(count, case.k)
            anchor = None if inputs["anchor"] is None else inputs["anchor"][b : b + 1]
            alone = backend(OP, inputs["features"][b : b + 1, :count].contiguous(), k, case.eps, anchor)
            assert torch.equal(picks[b, :k], alone[0])


@pytest.mark.parametrize("name", ["token_slice", "channel_slice", "channel_major", "channel_stride", "token_major"])
def test_layout_does_not_matter(backend, name):
    """A strided view gives the picks of its contiguous copy."""
    inputs = by_name(name).inputs(seed=8, device=backend.device)
    picks = backend(OP, **inputs)
    assert torch.equal(picks, backend(OP, **{**inputs, "features": inputs["features"].contiguous()}))


def test_permutation_at_k_equals_n(backend):
    inputs = by_name("1x1225x64_k1225").inputs(seed=9, dtype=torch.float16, device=backend.device)
    picks = backend(OP, **inputs)
    assert torch.equal(picks.sort().values[0].cpu(), torch.arange(1225))


def test_anchor_is_kept_even_if_not_finite(backend):
    """A given anchor is always the first pick. A non-finite anchor repels none: the lowest finite index is next."""
    x = torch.randn(1, 9, 4, device=backend.device)
    x[0, 6, 2] = torch.nan
    x[0, 0, 1] = torch.inf
    picks = backend(OP, x, 9, anchor=torch.tensor([6], device=backend.device))[0].tolist()
    assert picks[0] == 6
    assert picks[1] == 1
    assert picks[-1] == 0
    assert sorted(picks) == list(range(9))


def test_default_anchor_ignores_tokens_that_are_not_finite(backend):
    """Two non-finite tokens, whose finite channels would shift the mean, do not count in it."""
    x = torch.tensor([0.0, 1.0, 2.0, 50.0, 51.0], device=backend.device)[None, :, None].expand(1, 5, 2).clone()
    x[0, 3, 0], x[0, 4, 0] = torch.nan, torch.inf
    assert backend(OP, x, 1).tolist() == [[1]]


@pytest.mark.parametrize("value", [1.9, 3.3, 1000.1])
def test_the_mean_of_many_tokens_is_accurate(backend, value):
    """Few tokens at relative distances of up to 3e-5 from all others, which are equal: the pick shows the mean."""
    x = torch.full((1, 131072, 8), value, device=backend.device)
    x[0, :61] *= 1 + torch.linspace(-3e-5, 3e-5, 61, device=backend.device)[:, None]
    pick = backend(OP, x, 1)[0, 0]
    assert ((x[0, pick].double() / x[0, -1].double() - 1).abs() <= 3e-6).all()


def test_eps_decides_between_duplicates_and_neighbours(backend):
    """Tokens 0 and 1 are copies; with a large eps the copy repels less than many distant tokens do."""
    x = torch.tensor([0.0, 0.0, 1.0, 1.1, 1.2], device=backend.device)[None, :, None]
    anchor = torch.tensor([0], device=backend.device)
    assert backend(OP, x, 5, 1e-6, anchor)[0, -1] == 1
    for eps in (1e-6, 0.1, 1.0, 10.0):
        oracle.check_select(backend(OP, x, 5, eps, anchor), x, 5, eps, anchor)
    assert backend(OP, x, 5, 10.0, anchor).tolist() != backend(OP, x, 5, 1e-6, anchor).tolist()


def test_step_loop_is_the_same_algorithm(backend):
    """A loop of repulsion_step_ fulfils the contract of repulsion_select."""
    names = ["2x31x3_k31", "near_duplicates", "not_finite"]
    for name, dtype in itertools.product(names, [torch.float32, torch.bfloat16]):
        case = by_name(name)
        inputs = case.inputs(seed=10, dtype=dtype, device=backend.device)
        token = backend(OP, inputs["features"], 1)[:, 0]
        potential = torch.zeros(case.batch, case.tokens, device=backend.device)
        picks = [token]
        for _ in range(case.k - 1):
            token = backend("repulsion_step_", potential, inputs["features"], token, case.eps)
            picks.append(token)
        oracle.check_select(torch.stack(picks, 1), **inputs)


def test_raw_op_is_the_public_function(device):
    for case in (by_name("ragged_anchor"), by_name("5x127x64_k40"), by_name("tree")):
        inputs = case.inputs(seed=11, device=device)
        want = sts_kernels.repulsion_select(**inputs)
        assert torch.equal(torch.ops.sts_kernels.repulsion_select(**inputs), want)
        assert torch.equal(torch.ops.sts_kernels.repulsion_select.default(*inputs.values()), want)
    x = common_offset(torch.Generator().manual_seed(0), 2, 20, 8).to(device)
    want = sts_kernels.repulsion_select(x, 6, 1e-6, None, None)
    assert torch.equal(torch.ops.sts_kernels.repulsion_select(x, 6), want), "the schema's defaults differ"
