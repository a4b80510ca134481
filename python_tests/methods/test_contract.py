"""The contract of every selection, whatever the method's signals. A new method is tested by its name alone."""

import math

import pytest
import torch

from sts_kernels import _checks, _native, methods
from sts_kernels.methods import Method, Selection

from .contract import ARGUMENTS, COUNTS, ITEM, SELECTING, alone, packed, parts, signals

VARLEN = ("adavtp", "fastervlm_divprune", "sts")  # methods that select packed items by a varlen op


def same(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    return (a is None) == (b is None) and (a is None or torch.equal(a, b))


@pytest.mark.parametrize("k", [1, 5, 16, ITEM])
@pytest.mark.parametrize("name", SELECTING)
def test_picks_are_distinct_and_in_range(name, k, device):
    method = methods.create(name)
    given, counts = signals(method, device=device), torch.tensor(COUNTS, device=device)
    selection = method.select(k=k, num_tokens=counts, **given)
    assert selection.order.shape == (len(COUNTS), k)
    assert selection.order.dtype == torch.int64
    assert selection.order.device.type == device.type
    for row, count in zip(selection.order.tolist(), COUNTS, strict=True):
        kept = row[: min(k, count)]
        assert len(set(kept)) == len(kept)
        assert all(0 <= i < count for i in kept)
        assert row[len(kept) :] == [-1] * (k - len(kept))
    assert method.merges == (selection.assignment is not None)
    if selection.assignment is not None:
        assert selection.assignment.shape == (len(COUNTS), ITEM)
        assert selection.assignment.dtype == torch.int64
        slots = torch.minimum(counts, torch.tensor(k, device=device))[:, None]
        assert ((selection.assignment >= -1) & (selection.assignment < slots)).all()
        absent = torch.arange(ITEM, device=device) >= counts[:, None]
        assert (selection.assignment[absent] == -1).all()
    if selection.weight is not None:
        assert selection.weight.shape == (len(COUNTS), ITEM)
        assert selection.weight.dtype == torch.float32


@pytest.mark.parametrize("name", SELECTING)
def test_an_item_is_the_same_in_any_batch_padded_or_packed(name, device):
    """Bit-equal, whatever the padding holds; an item of n tokens is as with k = min(k, n)."""
    method, k = methods.create(name), 16
    given, lengths = signals(method, device=device), list(COUNTS)
    for item, count in enumerate(COUNTS):
        for value_name, value in given.items():
            if value_name != "text":
                value[item, count:] = math.nan if item % 2 else 1e4
    padded = method.select(k=k, num_tokens=torch.tensor(COUNTS, device=device), **given)
    budgets = [min(k, count) for count in COUNTS]
    flat = method.select_packed(lengths, budgets, **packed(given, lengths))
    orders, assignments, weights = [], [], []
    for item, (count, budget) in enumerate(zip(COUNTS, budgets, strict=True)):
        if not count:
            continue
        own = alone(method, given, item, count, budget)
        assert torch.equal(padded.order[item, :budget], own.order[0])
        for field in ("assignment", "weight"):
            batched, single = getattr(padded, field), getattr(own, field)
            assert same(None if batched is None else batched[item, :count], None if single is None else single[0])
        orders.append(own.order[0])
        assignments.append(own.assignment)
        weights.append(own.weight)
    assert torch.equal(flat.order, torch.cat(orders))
    for got, single in ((flat.assignment, assignments), (flat.weight, weights)):
        assert same(got, None if single[0] is None else torch.cat([part[0] for part in single]))


@pytest.mark.parametrize("name", SELECTING)
def test_packed_items_of_any_budget(name, device):
    """Equal items, unequal ones, and items that keep nothing or everything."""
    method = methods.create(name)
    given = signals(method, device=device)
    for lengths, budgets in (
        ([9, 9, 9], [4, 4, 4]),
        ([9, 12, 9, 0, 12], [4, 0, 4, 0, 12]),
        ([5, 5], [0, 0]),
        ([], []),
        ([30, 7], [1, 6]),
    ):
        rows = {
            n: v[: len(lengths)] if n == "text" else parts(v, lengths) if lengths else v[0, :0]
            for n, v in given.items()
        }
        got = method.select_packed(lengths, budgets, **rows)
        assert got.order.shape == (sum(budgets),)
        own = [
            alone(method, given, i, n, b).order[0] for i, (n, b) in enumerate(zip(lengths, budgets, strict=True)) if b
        ]
        assert got.order.tolist() == [index for order in own for index in order.tolist()]
        if got.assignment is not None:
            assert got.assignment.shape == (sum(lengths),)
            kept_nothing = torch.repeat_interleave(torch.tensor(budgets) == 0, torch.tensor(lengths)).to(device)
            assert (got.assignment[kept_nothing] == -1).all()


@pytest.mark.parametrize("name", [name for name in SELECTING if methods.create(name).nested])
def test_fewer_picks_are_the_first_of_more(name, device):
    method = methods.create(name)
    given, counts = signals(method, device=device), torch.tensor(COUNTS, device=device)
    whole = method.select(k=ITEM, num_tokens=counts, **given).order
    for k in (1, 2, 13, 39):
        assert torch.equal(method.select(k=k, num_tokens=counts, **given).order, whole[:, :k])


@pytest.mark.parametrize("name", SELECTING)
def test_values_that_are_no_numbers_come_last(name, device):
    method = methods.create(name)
    if not method.signals & {"features", "attention", "keys"}:
        pytest.skip(f"{name} looks at no value")
    given, bad = signals(method, device=device), [0, 7, 8, ITEM - 1]
    for value_name, value in given.items():
        if value_name != "text":
            value[:, bad] = torch.tensor([math.nan, math.inf, -math.inf, math.nan], device=device).view(
                1, 4, *[1] * (value.ndim - 2)
            )
    for k in (1, ITEM - 4, ITEM):
        order = method.select(k=k, **given).order
        assert not torch.isin(order[:, : ITEM - 4].cpu(), torch.tensor(bad)).any()
        assert all(len(set(row)) == k for row in order.tolist())


@pytest.mark.parametrize("name", SELECTING)
def test_any_dtype_and_stride(name, device):
    """A 16-bit input selects as its float32 copy, a strided one as its contiguous copy. No output requires grad."""
    method = methods.create(name)
    given = signals(method, device=device)
    for dtype in (torch.float16, torch.bfloat16):
        rounded = {n: v.to(dtype) for n, v in given.items()}
        wide = method.select(k=9, **{n: v.float() for n, v in rounded.items()})
        assert torch.equal(method.select(k=9, **rounded).order, wide.order)
    want = method.select(k=9, **given).order
    strided = {n: v.transpose(0, 1).contiguous().transpose(0, 1).requires_grad_() for n, v in given.items()}
    got = method.select(k=9, **strided)
    assert torch.equal(got.order, want)
    assert not any(v is not None and v.requires_grad for v in (got.order, got.assignment, got.weight))
    if "features" in given:
        transposed = {**given, "features": given["features"].mT.contiguous().mT}
        assert torch.equal(method.select(k=9, **transposed).order, want)


class Readbacks(torch.utils._python_dispatch.TorchDispatchMode):
    """Records the ops that would make the host wait for a GPU: reads of values, and of sizes that depend on values."""

    NAMES = ("_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "equal", "unique", "unique_dim")

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        indexed = name in ("index", "index_put", "index_put_") and any(
            i is not None and i.dtype == torch.bool for i in args[1]
        )
        if name in self.NAMES or indexed:
            self.found.append(name)
        return func(*args, **(kwargs or {}))


def run_all_ways(method: Method, given: dict, counts: torch.Tensor) -> None:
    lengths = list(COUNTS)
    features = torch.zeros(len(COUNTS), ITEM, 8, device=counts.device)
    methods.merge(features, method.select(k=16, num_tokens=counts, **given))
    for budgets in ([16, 16, 1, 0, 9, 16], [min(5, n) for n in lengths]):
        rows = {n: v if n == "text" else v.flatten(0, 1)[: sum(lengths)] for n, v in given.items()}
        selection = method.select_packed(lengths, budgets, **rows)
        methods.merge_packed(features.flatten(0, 1)[: sum(lengths)], selection, lengths, budgets)


@pytest.mark.parametrize("name", SELECTING)
def test_nothing_is_read_back(name, monkeypatch):
    """On meta tensors every read of a value fails. On the CPU a dispatch mode records the reads; the checks of values
    that only the CPU makes are off."""
    method = methods.create(name)
    given = signals(method)
    with torch.device("meta"):
        counts = torch.empty(len(COUNTS), dtype=torch.int64)
    run_all_ways(method, {n: v.to("meta") for n, v in given.items()}, counts)
    monkeypatch.setattr(_checks, "values_readable", lambda value: False)
    with Readbacks() as readbacks:
        run_all_ways(method, given, torch.tensor(COUNTS))
    if name not in VARLEN or _native.status().loaded:  # the references of varlen ops read their offsets
        assert not readbacks.found


@pytest.mark.parametrize("name", SELECTING)
def test_nothing_syncs(name, cuda):
    """No selection raises under CUDA's sync debug mode. adavtp runs without erank, whose eigenvalues sync in torch."""
    method = methods.create(name, **({"complexity": "entropy"} if name == "adavtp" else {}))
    given, counts = signals(method, device=cuda), torch.tensor(COUNTS, device=cuda)
    run_all_ways(method, given, counts)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run_all_ways(method, given, counts)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", SELECTING)
def test_the_gpu_picks_what_the_cpu_picks(name, cuda):
    method = methods.create(name)
    given, counts = signals(method), torch.tensor(COUNTS)
    want = method.select(k=16, num_tokens=counts, **given).order
    got = method.select(k=16, num_tokens=counts.to(cuda), **{n: v.to(cuda) for n, v in given.items()}).order
    assert torch.equal(got.cpu(), want)
    counts[1], counts[2] = -1, ITEM + 1  # out of range: a GPU does not check counts, and the item's output is -1
    got = method.select(k=16, num_tokens=counts.to(cuda), **{n: v.to(cuda) for n, v in given.items()}).order.cpu()
    want[[1, 2]] = -1
    assert torch.equal(got, want)


@pytest.mark.parametrize("name", SELECTING)
def test_counts_out_of_range_that_nobody_reads(name, monkeypatch):
    """Without the check of counts, as on a GPU: the output of such an item is -1, other items do not change."""
    method = methods.create(name)
    given, counts = signals(method), torch.tensor(COUNTS)
    want = method.select(k=16, num_tokens=counts, **given).order
    counts[1], counts[2] = -1, ITEM + 1
    want[[1, 2]] = -1
    monkeypatch.setattr(_checks, "values_readable", lambda value: False)
    assert torch.equal(method.select(k=16, num_tokens=counts, **given).order, want)


@pytest.mark.parametrize(
    ("picked", "error", "match"),
    [
        (None, TypeError, "own.pick: must return a Selection, got NoneType"),
        (torch.zeros(2, 3), TypeError, "own.pick: must return a Selection, got Tensor"),
        (Selection(torch.zeros(2, 3)), TypeError, "own.pick: order must be int64, got float32"),
        (Selection(torch.arange(3)), ValueError, r"own.pick: order must have shape \(B, k\), got \(3,\)"),
        (Selection(torch.ones(2, 4).long()), ValueError, r"\(B, k\) = \(2, 3\), got \(2, 4\)"),
        (Selection(torch.tensor([[0, 1, 2], [2, 0, 2]])), ValueError, r"0 to 4 in item 1, got \[2, 0, 2\]"),
        (Selection(torch.tensor([[0, 1, 2], [2, 0, 5]])), ValueError, r"0 to 4 in item 1, got \[2, 0, 5\]"),
        (Selection(torch.tensor([[0, -1, 2], [2, 0, 1]])), ValueError, "distinct tokens of 0 to 4 in item 0"),
        (
            Selection(torch.arange(3).expand(2, 3), torch.zeros(2, 5).long()),
            ValueError,
            "must have no assignment, for merges is False",
        ),
    ],
)
def test_what_pick_returns_is_checked(picked, error, match):
    class Own(Method):
        name, signals = "own", frozenset({"features"})

        def pick(self, pool):
            return picked

    with pytest.raises(error, match=match):
        Own().select(k=3, features=torch.rand(2, 5, 4))


def test_the_class_names_a_method_without_a_name():
    class Own(Method):
        pass

    class Named(Own):
        name = "named"

    assert (Own.name, Named.name) == ("Own", "named")
    with pytest.raises(TypeError, match="Own: budget must be a Budget"):
        Own().plan(128, 32)


@pytest.mark.parametrize(
    ("attribute", "value", "match"),
    [
        ("site", "projector", "Own: site must be 'encoder' or 'projected' or None, got 'projector'"),
        ("scope", "tile", "Own: scope must be 'image' or 'crop', got 'tile'"),
        ("positions", "new", "Own: positions must be 'original' or 'contiguous', got 'new'"),
        ("encoder_attention", "first", "Own: encoder_attention must be 'features' or 'last', got 'first'"),
        ("signals", frozenset({"feature"}), "Own: signals must be a frozenset of features, attention, .*'feature'"),
        ("signals", ("features",), "Own: signals must be a frozenset of features, attention, "),
    ],
)
def test_class_attributes_are_checked(attribute, value, match):
    with pytest.raises(ValueError, match=match):
        type("Own", (Method,), {"name": "own", attribute: value})


@pytest.mark.parametrize("name", SELECTING)
def test_bad_arguments(name):
    method = methods.create(name)
    given = signals(method)
    counts = torch.tensor(COUNTS)
    for change, error, match in (
        ({"k": 0}, ValueError, f"{name}: k must be between 1 and 40 .the number of tokens., got 0"),
        ({"k": ITEM + 1}, ValueError, f"{name}: k must be between 1 and 40"),
        ({"k": 2.0}, TypeError, f"{name}: k must be an int, got float"),
        ({"num_tokens": counts[:2]}, ValueError, rf"{name}: num_tokens must have shape \(B,\) = \(6,\), got \(2,\)"),
        ({"num_tokens": counts.float()}, TypeError, f"{name}: num_tokens must be int64, int32, got float32"),
        ({"num_tokens": counts + 1}, ValueError, rf"{name}: num_tokens\[0\] must be between 0 and 40, .*got 41"),
        ({"scores": torch.rand(6, 39)}, ValueError, f"{name}: (scores|features|keys) must have shape"),
        ({"scores": torch.rand(6)}, ValueError, rf"{name}: scores must have shape \(B, N\), got \(6,\)"),
        ({"scores": counts}, TypeError, f"{name}: scores must be .*, got int64"),
        ({"features": [1.0]}, TypeError, f"{name}: features must be a tensor of shape .*, got list"),
        ({"text": torch.rand(5, 3, 24)}, ValueError, f"{name}: text must have shape .*B = .6"),
    ):
        with pytest.raises(error, match=match):
            method.select(**{"k": 3, "num_tokens": counts, **given, "features": torch.rand(6, ITEM, 4), **change})
    for signal in method.signals:
        with pytest.raises(ValueError, match=f"{name}: {ARGUMENTS[signal]} must be a tensor of shape .*, got None"):
            method.select(k=3, **{**given, ARGUMENTS[signal]: None})
        with pytest.raises(ValueError, match=f"{name}: {ARGUMENTS[signal]} must be a tensor of shape .*, got None"):
            method.select_packed([ITEM], [3], **{**packed(given, [ITEM]), ARGUMENTS[signal]: None})
    with pytest.raises(ValueError, match=f"{name}: "):
        method.select(k=3)
    rows = {n: v[:2] if n == "text" else v.flatten(0, 1)[:30] for n, v in given.items()}
    for lengths, budgets, error, match in (
        ([10, 20], [3, 21], ValueError, rf"{name}: budgets\[1\] must be at most 20, the item's tokens, got 21"),
        ([10, 20], [3], ValueError, f"{name}: budgets must have one number for each of the 2 items, got 1"),
        ([10, -1], [3, 0], ValueError, f"{name}: lengths must be at least 0, got -1"),
        ([10, 20.0], [3, 0], TypeError, f"{name}: lengths must be an int, got float"),
        (torch.tensor([10, 20]), [3, 0], TypeError, f"{name}: lengths must be a list of ints, got Tensor"),
        ([10, 19], [3, 4], ValueError, f"{name}: .* must have 29 rows, the sum of lengths, got"),
    ):
        with pytest.raises(error, match=match):
            method.select_packed(lengths, budgets, **rows)


def test_signals_are_not_needed_where_values_are_not_looked_at():
    for name in ("random", "uniform"):
        method = methods.create(name)
        want = method.select_packed([7, 5], [3, 2], features=torch.zeros(12, 1)).order
        assert torch.equal(method.select_packed([7, 5], [3, 2]).order, want)
