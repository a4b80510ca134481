"""dpp_select against its contract."""

import itertools
import math

import numpy as np
import oracle
import pytest
import torch
from cases import CASES, Case, by_name, duplicates, normal, with_dtypes
from methods import recipe

import sts_kernels

OP = "dpp_select"
# The brute force of the largest cases would take as long as all other cases together.
SMALL = [case for case in CASES if case.batch * case.tokens * case.k * (case.channels + case.k) <= 150e6]


def quality(batch, tokens, seed=0, kind="uniform"):
    """(B, N) float32."""
    rng = torch.Generator().manual_seed(seed)
    q = torch.rand(batch, tokens, generator=rng) + 0.05
    if kind == "equal":
        return torch.ones(batch, tokens)
    if kind == "signed":
        return q * (2 * torch.randint(2, q.shape, generator=rng) - 1)
    if kind == "steep":  # gains from 1 to 1e-8
        return torch.exp(-9.2 * q)
    if kind == "spoiled":
        q[:, ::7] = math.nan
        q[:, 3::7] = math.inf
        q[:, 5::7] = 0.0
    return q


def samples(device):
    """Argument tuples of every kind the op takes."""
    rng = torch.Generator().manual_seed(0)
    x, q = torch.randn(2, 9, 5, generator=rng).to(device), torch.rand(2, 9, generator=rng).to(device)
    counts = torch.tensor([9, 0], dtype=torch.int32, device=device)
    return [
        (x, q, 3),
        (x.half(), q.bfloat16(), 9, 0.1),
        (x[..., ::2], q.T.contiguous().T, 4, 1e-7, counts),
        (x[:, 1:].bfloat16(), q[:, 1:].half(), 8, 0.0, torch.tensor([8, 3], device=device)),
        (x[:0], q[:0], 2),
    ]


def sized(step, device):
    """All arguments by name, at sizes that grow with `step`."""
    rng = torch.Generator().manual_seed(step)
    batch, tokens = 2 + step, 11 + 6 * step
    return {
        "features": torch.randn(batch, tokens, 5 + 2 * step, generator=rng).to(device),
        "quality": torch.rand(batch, tokens, generator=rng).to(device),
        "k": 3 + step,
        "floor": 1e-6,
        "num_tokens": torch.randint(3, tokens + 1, (batch,), generator=rng).to(device),
    }


@pytest.mark.parametrize(("case", "dtype"), with_dtypes(SMALL))
def test_greedy_in_float64(backend, case, dtype):
    given = case.inputs(seed=1, dtype=dtype, device=backend.device)
    features, num_tokens = given["features"], given["num_tokens"]
    kind = ("uniform", "equal", "signed", "steep", "spoiled")[len(case.name) % 5]
    q = quality(case.batch, case.tokens, 1, kind).to(backend.device)
    before = features.clone(), q.clone()
    order, gain = backend(OP, features, q, case.k, 1e-7, num_tokens)
    oracle.check_dpp(order, gain, features, q, case.k, 1e-7, num_tokens)
    torch.testing.assert_close((features, q), before, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("kind", ["equal", "signed", "steep", "spoiled"])
@pytest.mark.parametrize("floor", [0.0, 1e-7, 1e-3, 0.5, 1.0])
def test_quality_and_floor(backend, kind, floor):
    features = duplicates(torch.Generator().manual_seed(2), 3, 120, 40).to(backend.device)
    features[1] = torch.randn(120, 40, generator=torch.Generator().manual_seed(3)).to(backend.device)
    features[2, ::3] = 0.0
    q = quality(3, 120, 2, kind).to(backend.device)
    order, gain = backend(OP, features, q, 90, floor)
    oracle.check_dpp(order, gain, features, q, 90, floor)


@pytest.mark.parametrize("case", recipe.cases("cdpruner"), ids=recipe.label)
def test_official_picks(backend, case):
    rs = recipe.start(case)
    make = recipe.normal if case["recipe"] == "normal" else recipe.clustered
    x = make(rs, case["batch"], case["N"], case["C"])
    image, text = recipe.normal(rs, case["batch"], case["N"], case["E"]), recipe.normal(rs, case["texts"], case["E"])
    recipe.tensors(case, x, image, text)
    unit = lambda a: a / np.linalg.norm(a.astype(np.float64), axis=-1, keepdims=True)  # noqa: E731
    relevance = -(unit(image) @ unit(text).T).mean(-1)
    q = (relevance - relevance.min() + 1e-6) / (relevance.max() - relevance.min())  # over the batch, as in their code
    item = case["item"]
    given = (
        torch.from_numpy(x[item : item + 1]).to(backend.device),
        torch.from_numpy(q[item : item + 1]).float().to(backend.device),
    )
    order, gain = backend(OP, *given, case["keep"])
    oracle.check_dpp(order, gain, *given, case["keep"])
    ranked = len(case["order"])  # the official order ends at the rank of the kernel matrix
    assert order[0, :ranked].tolist() == case["order"]
    assert gain[0].log()[:ranked].sum().item() == pytest.approx(case["log_volume"], abs=0.05) or ranked < case["keep"]


def test_known_values(backend):
    """Orthogonal rows, and one between two of them; worked out by hand."""
    x = torch.tensor([[[2.0, 0.0], [0.0, 0.5], [3.0, 3.0], [0.0, 0.0]]], device=backend.device)
    q = torch.tensor([[1.0, 2.0, 1.5, 9.0]], device=backend.device)
    order, gain = backend(OP, x, q, 4)
    # Gains 1, 4, 2.25, 0: pick 1. Then 0 has 1, 2 has 1.5^2 / 2: pick 2. Then no gain is left: by quality 3, 0.
    assert order.tolist() == [[1, 2, 3, 0]]
    torch.testing.assert_close(gain, torch.tensor([[4.0, 1.125, 0.0, 0.0]], device=backend.device))


def test_equal_gains_go_to_the_lowest_index(backend):
    """The first gains are all exactly 1, however norms are rounded, and orthogonal rows keep their gains: ties."""
    x = torch.randn(1, 40, 33, generator=torch.Generator().manual_seed(4)).to(backend.device)
    ones = torch.ones(1, 40, device=backend.device)
    assert backend(OP, x, ones, 1)[0].tolist() == [[0]]
    x = torch.zeros(1, 6, 30, device=backend.device)
    for i in range(6):
        x[0, i, 5 * i : 5 * i + 5] = torch.tensor([0.1, 0.2, 0.3, 0.7, 1.1], device=backend.device) * (i + 1)
    assert backend(OP, x, ones[:, :6], 6)[0].tolist() == [[0, 1, 2, 3, 4, 5]]


def test_beyond_the_rank_tokens_follow_by_quality(backend):
    x = torch.randn(1, 50, 6, generator=torch.Generator().manual_seed(5)).to(backend.device)
    q = quality(1, 50, 5).to(backend.device)
    q[0, 20:25] = 0.5  # ties
    order, gain = backend(OP, x, q, 50)
    assert (gain[0, :6] > 0).all()
    assert (gain[0, 6:] == 0).all()
    rest = order[0, 6:].tolist()
    assert rest == sorted(rest, key=lambda i: (-q[0, i].item(), i))
    assert sorted(order[0].tolist()) == list(range(50))


@pytest.mark.parametrize("copies", [2, 30])
def test_repeats_of_a_pick_come_last(backend, copies):
    x = torch.randn(1, 4, 64, generator=torch.Generator().manual_seed(6)).repeat(1, copies, 1).to(backend.device)
    q = torch.ones(1, 4 * copies, device=backend.device)
    order, gain = backend(OP, x, q, 4 * copies)
    assert order[0].tolist() == [*order[0, :4].tolist(), *range(4, 4 * copies)]
    assert sorted(order[0, :4].tolist()) == [0, 1, 2, 3]
    assert ((gain[0] > 0) == (torch.arange(4 * copies, device=backend.device) < 4)).all()


def test_nothing_has_a_gain(backend):
    """With zero rows, or all qualities 0, no token has a gain: the order is by quality from the start."""
    zeros = torch.zeros(1, 5, 3, device=backend.device)
    q = torch.tensor([[0.5, -1.0, 2.0, 0.5, -0.0]], device=backend.device)
    order, gain = backend(OP, zeros, q, 5)
    assert order.tolist() == [[2, 0, 3, 4, 1]]
    assert (gain == 0).all()
    order, gain = backend(OP, torch.eye(4, device=backend.device)[None], torch.zeros(1, 4, device=backend.device), 4)
    assert order.tolist() == [[0, 1, 2, 3]]
    assert (gain == 0).all()


@pytest.mark.parametrize("scale", [2.0**-100, 2.0**-60, 2.0**60, 2.0**100])
def test_scales_of_quality_and_features_do_not_matter(backend, scale):
    """Scaling by a power of two rounds nothing, and gains out of range change no pick."""
    x = normal(torch.Generator().manual_seed(7), 2, 60, 20).to(backend.device)
    q = quality(2, 60, 7, "signed").to(backend.device)
    want = backend(OP, x, q, 60)[0]
    assert torch.equal(backend(OP, x, q * scale, 60)[0], want)
    assert torch.equal(backend(OP, x * scale, q, 60)[0], want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_prefix_batch_and_repetition(backend, dtype):
    features = by_name("5x127x64_k40").features(seed=2, dtype=dtype, device=backend.device)
    q = quality(5, 127, 2).to(backend.device)
    order, gain = backend(OP, features, q, 127)
    again = backend(OP, features, q, 127)
    assert torch.equal(order, again[0])
    assert torch.equal(gain, again[1])
    for k in (1, 2, 40, 126):
        assert torch.equal(backend(OP, features, q, k)[0], order[:, :k])
    for b in range(5):
        alone = backend(OP, features[b : b + 1], q[b : b + 1], 127)
        assert torch.equal(alone[0][0], order[b])
        assert torch.equal(alone[1][0], gain[b])


@pytest.mark.parametrize("name", ["5x127x64_k40", "near_duplicates_1024", "clusters"])
def test_lookahead_changes_no_bit(monkeypatch, name):
    """The CPU computes rows ahead of their picks; with STS_KERNELS_LOOKAHEAD=1 it does not."""
    case = by_name(name)
    features, q = case.features(seed=3), quality(case.batch, case.tokens, 3)
    outputs = []
    for ahead in ("1", "2", "7", "16"):
        monkeypatch.setenv("STS_KERNELS_LOOKAHEAD", ahead)
        outputs.append(sts_kernels.dpp_select(features, q, case.k))
    for order, gain in outputs[1:]:
        assert torch.equal(order, outputs[0][0])
        assert torch.equal(gain, outputs[0][1])


@pytest.mark.parametrize("tokens", [47, 48, 49, 52, 64, 100, 128])
def test_orthogonal_rows_outnumber_the_cached_rows(backend, tokens):
    """No gain changes, so most drafted rows wait long, and the row cache of the CPU (48 rows) is full."""
    features, q = torch.eye(tokens)[None].to(backend.device), torch.ones(1, tokens).to(backend.device)
    order, gain = backend(OP, features, q, tokens)
    assert order[0].tolist() == list(range(tokens))
    assert (gain == 1).all()


def test_drafts_for_a_full_cache(backend, monkeypatch):
    """A batch of drafted rows, all of lower gain than the cached rows, must not evict its own rows.

    The first picks of three clusters leave 45 rows in the CPU's cache. The pick of the lone token drafts tokens of low
    quality, and all of these are picked, after the clusters.
    """
    own = torch.eye(64)
    features, q = torch.empty(1, 89, 64), torch.ones(1, 89)
    for i in range(48):
        features[0, i] = 0.7**0.5 * own[i // 16] + 0.3**0.5 * own[3 + i]
    features[0, 48] = own[51]
    features[0, 49:] = torch.randn(40, 64, generator=torch.Generator().manual_seed(0))
    q[0, :16], q[0, 16:32], q[0, 48], q[0, 49:] = 1.02, 1.01, 0.9, 0.3
    features, q = features.to(backend.device), q.to(backend.device)
    order, gain = backend(OP, features, q, 89)
    oracle.check_dpp(order, gain, features, q, 89)
    monkeypatch.setenv("STS_KERNELS_LOOKAHEAD", "1")
    plain = backend(OP, features, q, 89)
    assert torch.equal(plain[0], order)
    assert torch.equal(plain[1], gain)


def test_quality_of_16_bits(backend):
    features = normal(torch.Generator().manual_seed(8), 2, 40, 16).to(backend.device)
    for dtype in (torch.float16, torch.bfloat16):
        q = quality(2, 40, 8).to(backend.device, dtype)
        want = backend(OP, features, q.float(), 40)
        got = backend(OP, features, q, 40)
        assert torch.equal(got[0], want[0])
        assert torch.equal(got[1], want[1])


def test_many_items(backend):
    features = Case("many", 300, 9, 5, 1).features(seed=3, device=backend.device)
    q = quality(300, 9, 3).to(backend.device)
    oracle.check_dpp(*backend(OP, features, q, 7), features, q, 7)


@pytest.mark.parametrize(
    ("name", "value", "error", "says"),
    [
        ("quality", [[1.0]], TypeError, "list"),
        ("quality", torch.ones(2, 6, dtype=torch.float64), TypeError, "float64"),
        ("quality", torch.ones(2, 5), ValueError, "(2, 5)"),
        ("quality", torch.ones(6), ValueError, "(6,)"),
        ("k", 0, ValueError, "0"),
        ("k", 7, ValueError, "7"),
        ("k", 2.0, TypeError, "float"),
        ("floor", -0.1, ValueError, "-0.1"),
        ("floor", 1.5, ValueError, "1.5"),
        ("floor", math.nan, ValueError, "nan"),
        ("floor", "0", TypeError, "str"),
        ("floor", True, TypeError, "bool"),
        ("num_tokens", torch.tensor([6, 7]), ValueError, "7"),
        ("num_tokens", torch.tensor([-1, 3]), ValueError, "-1"),
        ("num_tokens", torch.tensor([3]), ValueError, "(1,)"),
        ("features", torch.ones(2, 0, 3), ValueError, "(2, 0, 3)"),
        ("features", torch.ones(2, 6, 3, dtype=torch.float64), TypeError, "float64"),
    ],
)
def test_errors_name_the_argument(name, value, error, says):
    given = {"features": torch.ones(2, 6, 3), "quality": torch.ones(2, 6), "k": 2, name: value}
    with pytest.raises(error, match=f"^dpp_select: {name}.* got .*{says.replace('(', '.').replace(')', '.')}"):
        sts_kernels.dpp_select(**given)


@pytest.mark.parametrize("bad", [-1, 10, 2**40])
def test_counts_that_make_no_sense_on_a_gpu(cuda, bad):
    x, q = torch.randn(3, 9, 4, device=cuda), torch.rand(3, 9, device=cuda)
    order, gain = sts_kernels.dpp_select(x, q, 5, num_tokens=torch.tensor([9, bad, 4], device=cuda))
    assert (order[1] == -1).all()
    assert (gain[1] == 0).all()
    good = torch.tensor([0, 2], device=cuda)
    oracle.check_dpp(order[good], gain[good], x[good], q[good], 5, num_tokens=torch.tensor([9, 4]))


def test_the_oracle_judges():
    """The oracle rejects swapped picks, a wrong gain, and tokens that are not in order of quality."""
    x, q = normal(torch.Generator().manual_seed(9), 1, 30, 8), quality(1, 30, 9)
    order, gain = sts_kernels.dpp_select(x, q, 20)
    oracle.check_dpp(order, gain, x, q, 20)
    for a, b in itertools.pairwise((0, 4, 12, 19)):
        swapped = order.clone()
        swapped[0, [a, b]] = order[0, [b, a]]
        with pytest.raises(AssertionError):
            oracle.check_dpp(swapped, gain, x, q, 20)
    lower = gain.clone()
    lower[0, 3] = (gain[0, 3] + gain[0, 4]) / 2
    with pytest.raises(AssertionError, match="says that"):
        oracle.check_dpp(order, lower, x, q, 20)
