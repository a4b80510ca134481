"""One graph serves every size: torch.compile and torch.export, over all ops."""

import pytest
import torch
from op_inputs import OPS, assert_equal, results, sized, tensors

import sts_kernels


@pytest.fixture
def graphs():
    """A list for the graphs that torch.compile hands to its backend."""
    torch._dynamo.reset()
    yield []
    torch._dynamo.reset()


def compiled(op, graphs, **options):
    def backend(module, inputs):
        graphs.append(module)
        return module.forward

    call = getattr(sts_kernels, op)
    return torch.compile(lambda **arguments: call(**arguments), backend=backend, fullgraph=True, **options)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(("options", "most"), [({"dynamic": True}, 1), ({}, 2)], ids=["dynamic", "automatic"])
def test_compiles_once_for_every_size(device, graphs, op, options, most):
    call = compiled(op, graphs, **options)
    for step in (0, 1, 2, 3, 2):
        arguments = sized(op, step, device)
        assert_equal(results(op, call, arguments), results(op, getattr(sts_kernels, op), arguments))
    assert len(graphs) <= most


@pytest.mark.parametrize("op", OPS)
def test_compiles_once_for_every_batch(device, graphs, op):
    """Eleven batch sizes, more than the eight graphs that torch allows, take one graph."""
    call = compiled(op, graphs, dynamic=True)
    arguments = [sized(op, step, device) for step in range(11)]
    for each in arguments:
        call(**each)
    assert len(graphs) == 1


FEATURES = torch.randn(2, 9, 4, generator=torch.Generator().manual_seed(0))
BAD_NUMBERS = [
    ("repulsion_select", (FEATURES,), {"k": 0}, "k must be .*between 1 and"),
    ("repulsion_select", (FEATURES,), {"k": 10}, "k must be .*between 1 and"),
    ("repulsion_select", (FEATURES,), {"k": 3, "eps": 0.0}, "eps must be between 1e-30 and 1e"),
    ("repulsion_select", (FEATURES,), {"k": 3, "eps": 1e31}, "eps must be between 1e-30 and 1e"),
    ("dpp_select", (FEATURES, torch.ones(2, 9)), {"k": 3, "floor": 1.5}, "floor must be between 0 and 1"),
    ("last_query_scores", (FEATURES, FEATURES[:, :, None]), {"scale": 1e39}, "scale must be finite in float32"),
]


@pytest.mark.parametrize("fullgraph", [False, True])
@pytest.mark.parametrize(
    ("op", "tensors", "numbers", "message"), BAD_NUMBERS, ids=[f"{op}-{rest}" for op, _, rest, _ in BAD_NUMBERS]
)
def test_dynamic_numbers_out_of_range_are_named(op, tensors, numbers, message, fullgraph):
    """A check that fails on a dynamic number raises as in eager mode; with fullgraph=True, in Dynamo's words."""
    torch._dynamo.reset()
    call = getattr(sts_kernels, op)
    compiled = torch.compile(
        lambda *given, **rest: call(*given, **rest), backend="eager", fullgraph=fullgraph, dynamic=True
    )
    with pytest.raises(Exception if fullgraph else ValueError, match=f"{op}: {message}"):
        compiled(*tensors, **numbers)


def exported(op, **constants):
    class Module(torch.nn.Module):
        def forward(self, arguments):
            return results(op, getattr(sts_kernels, op), {**arguments, **constants})

    return Module()


@pytest.mark.parametrize("op", OPS)
def test_exports_with_every_size_dynamic(device, op):
    """All tensor sizes are dynamic; torch.export fixes int arguments."""
    constants = {name: value for name, value in sized(op, 0, device).items() if not isinstance(value, torch.Tensor)}
    small, large = (tensors(sized(op, step, device)) for step in (0, 3))
    if op.endswith("_select_varlen"):  # total_k is fixed, so cu_budgets must end there
        large = {**large, "cu_budgets": (large["cu_budgets"] * 0 + constants["total_k"]).index_fill(0, zero(device), 0)}
    if "max_seqlen" in constants:
        constants["max_seqlen"] = 1000
    shapes = {
        name: {
            dim: torch.export.Dim.DYNAMIC if small[name].shape[dim] != large[name].shape[dim] else None
            for dim in range(small[name].ndim)
        }
        for name in small
    }
    module = exported(op, **constants)
    program = torch.export.export(module, (small,), dynamic_shapes=(shapes,)).module()
    for arguments in (small, large):
        assert_equal(program(arguments), module(arguments))


def zero(device):
    return torch.zeros(1, dtype=torch.int64, device=device)


def test_exports_with_named_sizes(device):
    """Dims as users name them: B from 2 up, and a fixed k."""
    batch, tokens, keys = torch.export.Dim("B", min=2), torch.export.Dim("N", min=9), torch.export.Dim("S")
    for op, constants, small, large, shapes in (
        ("repulsion_select", {"k": 8}, {"features": (2, 30, 16)}, {"features": (7, 12, 16)}, [{0: batch, 1: tokens}]),
        (
            "last_query_scores",
            {},
            {"query": (2, 4, 64), "key": (2, 30, 2, 64)},
            {"query": (5, 4, 64), "key": (5, 3, 2, 64)},
            [{0: batch}, {0: batch, 1: keys}],
        ),
    ):
        small, large = ({k: torch.randn(v, device=device) for k, v in each.items()} for each in (small, large))
        module = exported(op, **constants)
        shapes = dict(zip(small, shapes, strict=True))
        program = torch.export.export(module, (small,), dynamic_shapes=(shapes,)).module()
        assert_equal(program(large), module(large))
