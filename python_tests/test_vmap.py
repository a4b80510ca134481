"""torch.vmap over all ops: any tensors mapped, at any axis, nested; against a loop over the mapped axis."""

import itertools

import pytest
import torch
from op_inputs import OPS, cloned, outputs, results, sized, tensors, written

import sts_kernels

LANES = 3


def lanes(op, count=LANES, device="cpu"):
    """Arguments of equal sizes whose tensors all have a leading axis of `count`."""
    several = [sized(op, 0, device) for _ in range(count)]
    for seed, arguments in enumerate(several[1:], 1):
        for value in tensors(arguments).values():  # other valid values per lane
            if value.is_floating_point():
                value.copy_(torch.randn(value.shape, generator=torch.Generator().manual_seed(seed)).square())
            elif value.dtype == torch.int64:
                value.copy_((value + seed) % 3)
            elif value.dtype == torch.bool:
                value.copy_(value.roll(seed, 1))
    tokens = several[0].get("num_tokens")
    for seed, arguments in enumerate(several):
        if "num_tokens" in arguments:
            arguments["num_tokens"] = torch.where(torch.arange(len(tokens), device=device) == 0, 3 + seed, tokens)
        if "cu_seqlens" in arguments:
            arguments["cu_seqlens"][1] -= seed
        if "max_seqlen" in arguments:
            arguments["max_seqlen"] = 100
    return {
        name: torch.stack([each[name] for each in several]) if isinstance(value, torch.Tensor) else value
        for name, value in several[0].items()
    }


def subsets(op):
    names = list(tensors(sized(op, 0)))
    for count in range(1, len(names) + 1):
        for mapped in itertools.combinations(names, count):
            if written(op) is None or written(op) in mapped:
                yield pytest.param(op, mapped, id=f"{op}-{'-'.join(mapped)}")


def stacked(each):
    """The outputs of several calls, each output stacked."""
    return [torch.stack(values) for values in zip(*map(outputs, each), strict=True)]


def loop(op, call, arguments, mapped):
    """`results` of each lane, stacked."""
    each = [
        results(op, call, {name: v[lane] if name in mapped else v for name, v in arguments.items()})
        for lane in range(LANES)
    ]
    return [torch.stack(values) for values in zip(*each, strict=True)]


def mapped_call(op, arguments, dims):
    """`results` under vmap, with the mapped axis of each tensor at `dims`."""
    names = list(tensors(arguments))
    constants = {name: value for name, value in arguments.items() if name not in names}
    moved = {
        name: arguments[name].movedim(0, dims[name]).contiguous().clone() if name in dims else arguments[name]
        for name in names
    }
    call = lambda *values: getattr(sts_kernels, op)(**dict(zip(names, values, strict=True)), **constants)  # noqa: E731
    out = outputs(torch.vmap(call, in_dims=tuple(dims.get(name) for name in names))(*moved.values()))
    if written(op):
        out.append(moved[written(op)].movedim(dims[written(op)], 0))
    return out


@pytest.mark.parametrize(("op", "mapped"), [case for op in OPS for case in subsets(op)])
def test_any_tensors_at_any_axis(device, op, mapped):
    every = lanes(op, device=device)
    arguments = {n: v if n in mapped or not isinstance(v, torch.Tensor) else v[0] for n, v in every.items()}
    want = loop(op, getattr(sts_kernels, op), arguments, mapped)
    for axis in (0, -1, 1):
        got = mapped_call(op, arguments, {name: min(axis, arguments[name].ndim - 1) for name in mapped})
        for a, b in zip(got, want, strict=True):
            assert a.dtype == b.dtype
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("op", OPS)
def test_no_lanes(device, op):
    arguments = lanes(op, device=device)
    want = results(
        op, getattr(sts_kernels, op), {n: v[0] if n in tensors(arguments) else v for n, v in arguments.items()}
    )
    none = {name: value[:0] if name in tensors(arguments) else value for name, value in arguments.items()}
    for got, one in zip(mapped_call(op, none, dict.fromkeys(tensors(none), 0)), want, strict=True):
        assert got.shape == (0, *one.shape)
        assert got.dtype == one.dtype


@pytest.mark.parametrize("op", OPS)
def test_nested(device, op):
    """The inner vmap maps all tensors, the outer vmap the first only, which is the mutated tensor if there is one."""
    inner = lanes(op, device=device)
    names = list(tensors(inner))
    constants = {name: value for name, value in inner.items() if name not in names}
    call = lambda *values: getattr(sts_kernels, op)(**dict(zip(names, values, strict=True)), **constants)  # noqa: E731
    first = torch.stack([inner[names[0]], inner[names[0]].flip(0)])
    rest = [inner[name] for name in names[1:]]
    want = stacked([torch.vmap(call)(each.clone(), *rest) for each in first])
    outer_dims = (0, *[None] * len(rest))
    got = outputs(torch.vmap(torch.vmap(call), in_dims=outer_dims)(first.clone(), *rest))
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-7)
    swapped = torch.vmap(torch.vmap(call, in_dims=outer_dims), in_dims=(1, *[0] * len(rest)))(first.clone(), *rest)
    torch.testing.assert_close(outputs(swapped), [w.transpose(0, 1) for w in want], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("op", OPS)
def test_raw_op(device, op):
    """torch.ops with optional arguments left out."""
    arguments = lanes(op, device=device)
    schema = getattr(torch.ops.sts_kernels, op).default._schema
    needed = [arguments[a.name] for a in schema.arguments if not a.has_default_value()]
    ints = [value for value in needed if not isinstance(value, torch.Tensor)]
    given = [value for value in needed if isinstance(value, torch.Tensor)]
    raw = getattr(torch.ops.sts_kernels, op)
    got = outputs(torch.vmap(lambda *values: raw(*values, *ints))(*cloned(dict(enumerate(given))).values()))
    want = stacked([raw(*(value[lane].clone() for value in given), *ints) for lane in range(LANES)])
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("op", [op for op in OPS if written(op)])
def test_what_is_written_to_must_be_mapped(op):
    arguments = lanes(op)
    name = written(op)
    arguments[name] = arguments[name][0]
    before = arguments[name].clone()
    dims = {other: 0 for other in tensors(arguments) if other != name}
    names = list(tensors(arguments))
    call = lambda *values: getattr(sts_kernels, op)(*values)  # noqa: E731
    with pytest.raises(ValueError, match=f"{op}: {name} is written to, so vmap must map it"):
        torch.vmap(call, in_dims=tuple(dims.get(n) for n in names))(*(arguments[n] for n in names))
    assert torch.equal(arguments[name], before)


def test_overlapping_lanes_are_refused():
    arguments = lanes("repulsion_step_")
    shared = torch.zeros_like(arguments["potential"][:1]).expand_as(arguments["potential"])
    with pytest.raises(ValueError, match="potential must have memory of its own"):
        torch.vmap(sts_kernels.repulsion_step_)(shared, arguments["features"], arguments["picked"])
    assert (shared == 0).all()


@pytest.mark.parametrize(
    ("op", "name", "value"),
    [
        ("repulsion_select", "anchor", 99),
        ("repulsion_select", "num_tokens", 99),
        ("dpp_select", "num_tokens", 99),
        ("dedup_select", "order", 99),
        ("farthest_select", "anchor", 99),
        ("suppress_select", "num_tokens", 99),
        ("knn_density", "num_tokens", 99),
        ("nearest", "num_keys", 99),
        ("repulsion_step_", "picked", 99),
        ("repulsion_select_varlen", "cu_seqlens", 10**6),
        ("repulsion_select_varlen", "cu_budgets", 10**6),
        ("repulsion_select_varlen", "anchor", 99),
        ("farthest_select_varlen", "anchor", 99),
        ("farthest_select_varlen", "cu_seqlens", 10**6),
        ("suppress_select_varlen", "cu_budgets", 10**6),
        ("last_query_scores_varlen", "cu_seqlens", 10**6),
    ],
)
def test_values_out_of_range_are_errors_in_any_lane(op, name, value):
    arguments = lanes(op)
    arguments[name][1, 1] = value
    with pytest.raises(ValueError, match=rf"{op}: {name}\b"):
        mapped_call(op, arguments, dict.fromkeys(tensors(arguments), 0))
    if name.startswith("cu_"):  # rows past a lane's last offset do not go to the next lane
        arguments = lanes(op)
        arguments[name][1, -1] -= 1
        with pytest.raises(ValueError, match=rf"{op}: {name} must rise from 0"):
            mapped_call(op, arguments, dict.fromkeys(tensors(arguments), 0))


def test_compiled(device):
    features = torch.randn(LANES, 2, 9, 4, device=device)
    select = torch.vmap(lambda x: sts_kernels.repulsion_select(x, 3))
    torch._dynamo.reset()
    got = torch.compile(select, backend="eager", fullgraph=True)(features)
    assert torch.equal(got, select(features))
