"""farthest_select against its contract."""

import math
from itertools import product

import oracle
import pytest
import torch
from cases import CASES, by_name, normal, with_dtypes
from selection_inputs import directions, of_case, qualities, random_inputs, starts

import sts_kernels

OP = "farthest_select"
VARIANTS = ("cosine", "quality", "start", "all")


def samples(device):
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(2, 9, 5, generator=rng).to(device)
    quality, start = (make(rng, 2, 9).to(device) for make in (qualities, starts))
    index = lambda *values, dtype=torch.int64: torch.tensor(values, dtype=dtype, device=device)  # noqa: E731
    return [
        (x, 3),
        (x.bfloat16(), 9, None, None, None, "cosine"),
        (x[:, 1:], 4, index(7, 0)),
        (x.half(), 4, None, quality.half(), start.bfloat16()),
        (x[..., 1:], 4, None, None, start, "euclidean", index(9, 0, dtype=torch.int32)),
        (x, 1, index(2, 3), quality.T.contiguous().T, None, "cosine", index(4, 9)),
        (x[:0], 2),
    ]


def sized(step, device):
    batch, tokens, channels, k = 2 + step, 11 + 6 * step, 5 + 2 * step, 3 + step
    rng = torch.Generator().manual_seed(step)
    return {
        "features": torch.randn(batch, tokens, channels, generator=rng).to(device),
        "k": k,
        "anchor": torch.randint(3, (batch,), generator=rng).to(device),
        "quality": torch.rand(batch, tokens, generator=rng).to(device),
        "start": torch.rand(batch, tokens, generator=rng).to(device),
        "metric": "cosine",
        "num_tokens": torch.randint(3, tokens + 1, (batch,), generator=rng).to(device),
    }


@pytest.mark.parametrize(("case", "dtype"), with_dtypes(CASES))
def test_picks_are_greedy(backend, case, dtype):
    inputs = of_case(OP, case, "plain", 1, dtype, backend.device)
    oracle.check_farthest(backend(OP, **inputs), **inputs)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_picks_are_greedy_with_options(backend, case, variant):
    inputs = of_case(OP, case, variant, 2, case.dtypes[-1], backend.device)
    oracle.check_farthest(backend(OP, **inputs), **inputs)


@pytest.mark.parametrize("seed", range(150))
def test_random_inputs(backend, seed):
    inputs = random_inputs(OP, seed, backend.device)
    oracle.check_farthest(backend(OP, **inputs), **inputs)


def test_known_selection(backend):
    """Worked by hand on five points of a line."""
    x = torch.tensor([0.0, 1.0, 2.0, 3.0, 10.0], device=backend.device)[None, :, None]
    # Farthest from 0 is 10, then 3 (squared distance 9 to 0). Then 1 and 2 tie at 1: lowest index first.
    assert backend(OP, x, 5).tolist() == [[0, 4, 3, 1, 2]]
    anchor = torch.tensor([3], device=backend.device)
    assert backend(OP, x, 5, anchor).tolist() == [[3, 4, 0, 1, 2]]
    # Token 2 has quality 100: 100 * 1 exceeds 49, the squared distance from 3 to 10.
    quality = torch.tensor([[1.0, 1.0, 100.0, 1.0, 1.0]], device=backend.device)
    assert backend(OP, x, 5, anchor, quality).tolist() == [[3, 2, 4, 0, 1]]
    assert backend(OP, x, 2, None, quality).tolist() == [[2, 4]]
    # start: squared distances (9.5 - x)^2 to a token at 9.5 that is already kept.
    start = (9.5 - x[..., 0]).square()
    assert backend(OP, x, 3, start=start).tolist() == [[0, 3, 1]]


def test_an_extreme_pair_comes_first_under_cosine(backend):
    """Norms do not matter; a zero row has distance 2 to every token, as at a right angle."""
    angle = torch.tensor([0.0, 10.0, 80.0, 170.0]).deg2rad()
    x = torch.stack([angle.cos(), angle.sin()], 1) * torch.tensor([[1.0], [1e-20], [1e15], [3.0]])
    x = torch.cat([x, torch.zeros(2, 2)])[None].to(backend.device)
    assert backend(OP, x, 6, metric="cosine").tolist() == [[0, 3, 4, 5, 2, 1]]


def test_divprune_is_the_cosine_metric_with_its_anchor(device):
    """As the docstring says it: the first pick of the paper is not the op's default."""
    x = normal(torch.Generator().manual_seed(2), 3, 40, 8).to(device)
    anchor = sts_kernels.nearest(x, x, exclude_self=True)[1].argmin(1)
    want = sts_kernels.methods.create("divprune").select(k=9, features=x).order
    assert torch.equal(sts_kernels.farthest_select(x, 9, anchor, metric="cosine"), want)
    assert not torch.equal(sts_kernels.farthest_select(x, 9, metric="cosine"), want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_equals_brute_force_where_margins_are_wide(backend, dtype, metric):
    rng = torch.Generator().manual_seed(5)
    matched = 0
    for _ in range(20):
        x = (normal(rng, 1, 24, 3) * 3).round().to(dtype)
        d = oracle.measured(x[0], x[0], metric)
        nearest, picks, clear = torch.full((24,), math.inf, dtype=torch.float64), [0], True
        for _ in range(6):
            nearest = torch.minimum(nearest, d[picks[-1]])
            nearest[picks] = -1
            best = nearest.topk(2).values
            clear &= bool(best[0] > 1.01 * best[1])
            picks.append(nearest.argmax().item())
        if clear:
            matched += 1
            assert backend(OP, x.to(backend.device), 7, metric=metric)[0].tolist() == picks
    assert matched >= 3, "too few inputs have wide margins for this test to say anything"


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_exact_duplicates_come_in_order_of_index(backend, metric):
    x = by_name("duplicates").features(seed=3)
    if metric == "cosine":  # norms scaled by powers of 2 leave unit rows equal
        x = x * 2.0 ** torch.arange(x.shape[1])[:, None].remainder(5)
    picks = backend(OP, x.to(backend.device), x.shape[1], metric=metric).cpu()
    for b in range(len(x)):
        unit = x[b] / x[b].abs().amax(1, keepdim=True)
        _, group = unit.unique(dim=0, return_inverse=True)
        for g in range(group.max() + 1):
            members = picks[b][group[picks[b]] == g].tolist()
            assert members == sorted(members)


def test_a_start_is_what_earlier_picks_leave(backend):
    """Selecting 30 equals selecting 10, then 20 with `start` = the distances to those 10."""
    x = torch.randn(2, 90, 16, generator=torch.Generator().manual_seed(4)).to(backend.device)
    whole = backend(OP, x, 30)
    rows = torch.arange(2, device=x.device)[:, None]
    start = torch.cdist(x, x[rows, whole[:, :10]], compute_mode="donot_use_mm_for_euclid_dist").square().amin(-1)
    start.scatter_(1, whole[:, :10], -1.0)
    assert torch.equal(backend(OP, x, 20, start=start), whole[:, 10:])


def test_what_is_not_usable_comes_last(backend):
    nan, inf = math.nan, math.inf
    x = torch.randn(1, 9, 4, generator=torch.Generator().manual_seed(6))
    x[0, 1, 2], x[0, 5, 0] = nan, inf
    quality = torch.tensor([[1.0, 1, -1, 1, nan, 1, 1, inf, 1]])
    start = torch.tensor([[4.0, 4, 4, -1, 4, 4, inf, 4, nan]])
    x, quality, start = (t.to(backend.device) for t in (x, quality, start))
    picks = backend(OP, x, 9, None, quality, start)[0].tolist()
    assert picks == [6, 0, 1, 2, 3, 4, 5, 7, 8]
    anchor = torch.tensor([1], device=backend.device)  # a NaN pick lowers no distance
    assert backend(OP, x, 3, anchor, quality, start)[0].tolist() == [1, 6, 0]


def test_quality_times_distance_may_overflow_or_vanish(backend):
    """Values beyond float32's range tie; a quality of 0 makes all values 0."""
    x = torch.tensor([0.0, 1.0, 2.0, 3.0], device=backend.device)[None, :, None]
    huge = torch.full((1, 4), 3e38, device=backend.device)
    assert backend(OP, x * 1e10, 4, quality=huge).tolist() == [[0, 1, 2, 3]]
    assert backend(OP, x, 4, quality=huge * 0).tolist() == [[0, 1, 2, 3]]
    # An infinite start: qualities above 1 tie in the first pick, lower ones do not.
    far = torch.full((1, 4), math.inf, device=backend.device)
    for quality, first in (([1.0, 2.0, 5.0, 3.0], 1), ([0.5, 0.2, 1.0, 0.9], 2)):
        quality = torch.tensor([quality], device=backend.device)
        assert backend(OP, x, 1, start=far, quality=quality).tolist() == [[first]]
    zeros = torch.zeros(1, 4, device=backend.device)
    assert backend(OP, x, 4, start=zeros, quality=huge).tolist() == [[0, 1, 2, 3]]


@pytest.mark.parametrize(("variant", "dtype"), list(product(VARIANTS, [torch.float32, torch.bfloat16])), ids=str)
def test_prefix(backend, variant, dtype):
    """The first k' picks equal the picks of a call with k'."""
    for name in ("5x127x64_k40", "near_duplicates", "ragged"):
        case = by_name(name)
        inputs = of_case(OP, case, variant, 2, dtype, backend.device)
        full = backend(OP, **inputs)
        for k in (1, 2, 17, case.k - 1):
            assert torch.equal(backend(OP, **{**inputs, "k": k}), full[:, :k]), f"k = {k}"


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", ["5x127x64_k40", "2x257x1000_k33", "near_duplicates", "not_finite_1000", "ragged"])
def test_items_do_not_know_of_each_other(backend, name, variant):
    """An item's picks do not depend on the other items, on its place in the batch, or on the run."""
    case = by_name(name)
    inputs = of_case(OP, case, variant, 4, torch.float32, backend.device)
    batch = backend(OP, **inputs)
    assert torch.equal(backend(OP, **inputs), batch)
    for b in range(case.batch):
        item = {n: v[b : b + 1] if isinstance(v, torch.Tensor) else v for n, v in inputs.items()}
        assert torch.equal(backend(OP, **item), batch[b : b + 1])
    order = torch.arange(case.batch - 1, -1, -1, device=backend.device)
    flipped = {n: v[order] if isinstance(v, torch.Tensor) else v for n, v in inputs.items()}
    assert torch.equal(backend(OP, **flipped), batch[order])


@pytest.mark.parametrize("name", ["2x257x1000_k33", "1x9001x5_k40", "near_duplicates", "1x1225x64_k1225"])
@pytest.mark.parametrize("variant", ["plain", "all"])
def test_number_of_threads_does_not_matter(name, variant):
    inputs = of_case(OP, by_name(name), variant, 3)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = sts_kernels.farthest_select(**inputs)
        torch.set_num_threads(3)
        three = sts_kernels.farthest_select(**inputs)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(one, three)


@pytest.mark.parametrize("name", ["token_slice", "channel_slice", "channel_major", "channel_stride", "token_major"])
@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_layout_does_not_matter(backend, name, metric):
    """Strided views of features and per-token values give the picks of their contiguous copies."""
    case = by_name(name)
    inputs = of_case(OP, case, "all", 8, device=backend.device)
    inputs["metric"] = metric
    want = backend(OP, **{**inputs, "features": inputs["features"].contiguous()})
    assert torch.equal(backend(OP, **inputs), want)
    for n in ("quality", "start"):
        inputs[n] = inputs[n].T.contiguous().T
    assert torch.equal(backend(OP, **inputs), want)


def test_16_bit_numbers_for_each_token(backend):
    """16-bit quality and start give the picks of their float32 copies."""
    for dtype in (torch.float16, torch.bfloat16):
        inputs = of_case(OP, by_name("5x127x64_k40"), "all", 9, device=backend.device)
        narrow = {n: inputs[n].to(dtype) for n in ("quality", "start")}
        wide = {n: v.float() for n, v in narrow.items()}
        assert torch.equal(backend(OP, **{**inputs, **narrow}), backend(OP, **{**inputs, **wide}))


def test_lengths_do_not_matter_under_cosine(backend):
    rng = torch.Generator().manual_seed(10)
    x = normal(rng, 2, 100, 24)
    picks = backend(OP, x.to(backend.device), 60, metric="cosine")
    stretched = x * 2.0 ** torch.randint(-60, 60, (2, 100, 1), generator=rng)
    assert torch.equal(backend(OP, stretched.to(backend.device), 60, metric="cosine"), picks)
    few = directions(rng, 2, 100, 24).to(backend.device)
    oracle.check_farthest(backend(OP, few, 100, metric="cosine"), few, 100, metric="cosine")


def test_raw_op_is_the_public_function(device):
    inputs = of_case(OP, by_name("ragged_anchor"), "all", 11, device=device)
    want = sts_kernels.farthest_select(**inputs)
    assert torch.equal(torch.ops.sts_kernels.farthest_select(**inputs), want)
    x = normal(torch.Generator().manual_seed(0), 2, 20, 8).to(device)
    want = sts_kernels.farthest_select(x, 6, None, None, None, "euclidean", None)
    assert torch.equal(torch.ops.sts_kernels.farthest_select(x, 6), want), "the schema's defaults differ"
