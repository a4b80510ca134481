"""dedup_select against its contract. Rounds amplify rounding, so indices are compared only for exact distances."""

import numpy as np
import oracle
import pytest
import torch
from cases import CASES, FLOATING, LAYOUTS, by_name, exact, normal, with_dtypes
from methods import recipe

import sts_kernels

OP = "dedup_select"
SMALL = [case for case in CASES if 0 < case.batch * case.tokens**2 * max(case.channels, 200) <= 50e6]


def listed(batch, tokens, seed=0):
    """(B, N): all tokens in random order."""
    rng = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(tokens, generator=rng) for _ in range(batch)])


def samples(device):
    """Argument tuples of every kind the op takes."""
    x = torch.randn(2, 9, 5, generator=torch.Generator().manual_seed(0)).to(device)
    order = listed(2, 9).to(device)
    return [
        (x, order, 3),
        (x.half(), order.int(), 9, 2),
        (x[..., ::2], order[:, ::2], 1, 100),
        (x[:, 1:].bfloat16(), torch.tensor([[3, 1, 2, -1], [-1, 0, 0, 0]], device=device), 2),
        (x[:0], order[:0], 2),
    ]


def sized(step, device):
    """All arguments by name, at sizes that grow with `step`."""
    rng = torch.Generator().manual_seed(step)
    batch, tokens = 2 + step, 11 + 6 * step
    return {
        "features": torch.randn(batch, tokens, 5 + 2 * step, generator=rng).to(device),
        "order": listed(batch, tokens, step)[:, : 9 + 5 * step].contiguous().to(device),
        "keep": 3 + step,
        "step": 2 + step,
    }


@pytest.mark.parametrize(("case", "dtype"), with_dtypes(SMALL))
def test_exact_distances_give_the_same_tokens(backend, case, dtype):
    """Shapes and layouts of `cases`, with exact distances: the unit rows are integers over 256."""
    x = exact(torch.Generator().manual_seed(1), case.batch, case.tokens, case.channels).to(dtype)
    if case.tokens > 9:
        x[:, 1::9] = 0.0
        x[:, 2::11] = x[:, 3:4]
    features = case.layout(x.to(backend.device))
    order = listed(case.batch, case.tokens, 1)
    if case.num_tokens is not None:
        order[torch.arange(case.tokens) >= torch.tensor(case.num_tokens)[:, None]] = -1
    order = order.to(backend.device, case.index_dtype)
    before = features.clone(), order.clone()
    for keep, step in ((max(1, case.tokens // 3), 8), (1, 1 + case.tokens // 10)):
        kept = backend(OP, features, order, keep, step)
        oracle.check_dedup(kept, features, order, keep, step)
    assert torch.equal(features, before[0])
    assert torch.equal(order, before[1])


def test_distances_of_24_bits(backend):
    """Integer rows of norm 2048: squared distances of unit rows are multiples of 2^-22, exact in float32."""
    rng = np.random.RandomState(0)
    rows = []
    while len(rows) < 300:
        row = rng.randint(-300, 301, 40)
        rest = 2048**2 - int((row**2).sum())
        a = rng.randint(0, int(max(rest, 1) ** 0.5) + 1)
        tail = _three_squares(rest - a * a) if rest >= a * a else None
        if tail:
            rows.append([*row, a, *tail])
    x = torch.tensor(rows, dtype=torch.float32, device=backend.device)[None]
    order = listed(1, 300, 2).to(backend.device)
    for keep, step in ((20, 8), (7, 1), (100, 30)):
        oracle.check_dedup(backend(OP, x, order, keep, step), x, order, keep, step)


def _three_squares(total):
    for b in range(int(total**0.5), -1, -1):
        for c in range(int((total - b * b) ** 0.5), -1, -1):
            d = round((total - b * b - c * c) ** 0.5)
            if d * d == total - b * b - c * c:
                return b, c, d
            if c * c * 2 < total - b * b:
                break
    return None


# Cases in which the official code's float32 and float64 runs agree, or in which it raises (our generalisation).
STABLE = [
    case
    for case in recipe.cases("vispruner")
    if case["important_ratio"] < 1 and case.get("float32_overlap", case["keep"]) == case["keep"] and case["N"] <= 100
]


@pytest.mark.parametrize("case", STABLE, ids=recipe.label)
def test_official_tokens(backend, case):
    rs = recipe.start(case)
    make = recipe.normal if case["recipe"] == "normal" else recipe.clustered
    x, heads = recipe.tensors(case, make(rs, 1, case["N"], case["C"]), recipe.positive(rs, 1, case["heads"], case["N"]))
    scores = heads[0].double().mean(0)
    order = scores.argsort(descending=True, stable=True)
    important = int(case["keep"] * case["important_ratio"])
    want = case["kept"] if "kept" in case else case["reference"]
    rest = order[None, important:].to(backend.device)
    kept = backend(OP, x.to(backend.device), rest, case["keep"] - important)
    assert sorted([*order[:important].tolist(), *kept[0].tolist()]) == want


@pytest.mark.parametrize("dtype", FLOATING)
def test_not_finite_tokens_go_first(backend, dtype):
    x = exact(torch.Generator().manual_seed(3), 3, 60, 32).to(dtype)
    x[0, ::4] = torch.nan
    x[1, 1:50] = torch.inf
    x[2] = -torch.inf
    x, order = x.to(backend.device), listed(3, 60, 3).to(backend.device)
    shorter = order.clone()
    shorter[:, 50], shorter[1:, 52:] = -1, 7  # a list ends at its first -1
    for keep in (1, 11, 12, 44, 45, 46, 49, 51, 60):
        for given in (order, shorter):
            oracle.check_dedup(backend(OP, x, given, keep), x, given, keep)


def test_known_rounds(backend):
    """Worked out by hand: angles of unit vectors, one removal per round."""
    degrees = torch.tensor([0.0, 1.0, 10.0, 40.0, 90.0])
    x = torch.stack([torch.cos(torch.deg2rad(degrees)), torch.sin(torch.deg2rad(degrees))], 1)[None].to(backend.device)
    order = torch.tensor([[0, 1, 2, 3, 4]], device=backend.device)
    # Even places hold 0, 2, 4: the closest odd token is 1, 9, 50 degrees away. 0 is removed; list: 2, 4, then 1, 3.
    assert backend(OP, x, order, 4, 1).tolist() == [[2, 4, 1, 3]]
    # Even 2, 1; odd 4, 3: the closest is 30 and 39 degrees away. 2 is removed.
    assert backend(OP, x, order, 3, 1).tolist() == [[1, 4, 3]]


def test_nothing_to_remove(backend):
    x = normal(torch.Generator().manual_seed(4), 3, 20, 8).to(backend.device)
    order = listed(3, 20, 4).to(backend.device)
    assert torch.equal(backend(OP, x, order, 20), order)
    ends = order.clone()
    ends[1, 5], ends[2, 0] = -1, -1
    kept = backend(OP, x, ends, 7)
    assert kept[1].tolist() == [*order[1, :5].tolist(), -1, -1]
    assert (kept[2] == -1).all()


def test_all_equal_and_all_zero_rows_tie_by_place(backend):
    """Every round removes the first even places of the list."""
    for x in (torch.ones(1, 33, 4), torch.zeros(1, 33, 4)):
        order = listed(1, 33, 5)
        zero = torch.zeros(33, 33)
        want = oracle.dedup_rounds(zero, order[0].tolist(), 5, 4)
        assert backend(OP, x.to(backend.device), order.to(backend.device), 5, 4)[0].tolist() == want


def test_a_token_listed_twice_counts_as_two(backend):
    x = exact(torch.Generator().manual_seed(6), 1, 10, 16).to(backend.device)
    order = torch.tensor([[3, 3, 1, 7, 3, 0, 0, 9]], device=backend.device)
    for keep in (1, 3, 6):
        oracle.check_dedup(backend(OP, x, order, keep, 1), x, order, keep, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_input_same_output_whatever_the_batch(backend, dtype):
    features = by_name("5x127x64_k40").features(seed=2, dtype=dtype, device=backend.device)
    order = listed(5, 127, 2).to(backend.device)
    first = backend(OP, features, order, 16)
    assert torch.equal(backend(OP, features, order, 16), first)
    for b in range(5):
        assert torch.equal(backend(OP, features[b : b + 1], order[b : b + 1], 16)[0], first[b])
    oracle.check_dedup(first, features, order, 16, exact=False)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__)
def test_layouts_change_nothing(backend, layout):
    x = normal(torch.Generator().manual_seed(7), 2, 50, 24)
    order = listed(2, 50, 7).to(backend.device)
    want = backend(OP, x.to(backend.device), order, 9)
    assert torch.equal(backend(OP, layout(x.to(backend.device)), order, 9), want)
    assert torch.equal(backend(OP, x.to(backend.device), order.T.contiguous().T, 9), want)


def test_many_items(backend):
    features = exact(torch.Generator().manual_seed(8), 1, 9, 16).expand(300, 9, 16).to(backend.device)
    order = listed(300, 9, 8).to(backend.device)
    oracle.check_dedup(backend(OP, features, order, 4, 2), features, order, 4, 2)


@pytest.mark.parametrize(
    ("name", "value", "error", "says"),
    [
        ("order", [[1]], TypeError, "list"),
        ("order", torch.zeros(2, 4), TypeError, "float32"),
        ("order", torch.zeros(4, dtype=torch.int64), ValueError, "(4,)"),
        ("order", torch.zeros(3, 4, dtype=torch.int64), ValueError, "(3, 4)"),
        ("order", torch.zeros(2, 8193, dtype=torch.int64), ValueError, "(2, 8193)"),
        ("order", torch.tensor([[0, 1, 2, 6], [0, 1, 2, 3]]), ValueError, "6"),
        ("order", torch.tensor([[0, 1, 2, 3], [0, -2, 2, 3]]), ValueError, "-2"),
        ("keep", 0, ValueError, "0"),
        ("keep", 5, ValueError, "5"),
        ("keep", 1.0, TypeError, "float"),
        ("step", 0, ValueError, "0"),
        ("step", None, TypeError, "NoneType"),
        ("features", torch.ones(2, 6, 0), ValueError, "(2, 6, 0)"),
    ],
)
def test_errors_name_the_argument(name, value, error, says):
    order = torch.tensor([[0, 1, 2, 3], [3, 2, 1, 0]])
    given = {"features": torch.ones(2, 6, 3), "order": order, "keep": 2, "step": 8, name: value}
    with pytest.raises(error, match=f"^dedup_select: {name}.* got .*{says.replace('(', '.').replace(')', '.')}"):
        sts_kernels.dedup_select(**given)


@pytest.mark.parametrize("bad", [-2, 60, 2**40, -(2**63)])
def test_orders_that_make_no_sense_on_a_gpu(cuda, bad):
    x = exact(torch.Generator().manual_seed(9), 3, 60, 16).to(cuda)
    order = listed(3, 60, 9).to(cuda)
    order[1, 17] = bad
    kept = sts_kernels.dedup_select(x, order, 5)
    assert (kept[1] == -1).all()
    good = torch.tensor([0, 2], device=cuda)
    oracle.check_dedup(kept[good], x[good], order[good], 5)


def test_the_oracle_judges():
    x, order = exact(torch.Generator().manual_seed(10), 1, 60, 16), listed(1, 60, 10)
    kept = sts_kernels.dedup_select(x, order, 9)
    oracle.check_dedup(kept, x, order, 9)
    with pytest.raises(AssertionError):
        oracle.check_dedup(kept.flip(1), x, order, 9)
