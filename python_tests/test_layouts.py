"""Tensors that are not plain strided memory (sparse, nested, quantized ...), for every tensor argument of every op."""

import warnings

import pytest
import torch
from op_inputs import OPS, assert_equal, outputs, results, sized, tensors, written

import sts_kernels

LAYOUTS = {
    "COO": torch.Tensor.to_sparse,
    "CSR": torch.Tensor.to_sparse_csr,
    "CSC": torch.Tensor.to_sparse_csc,
    "BSR": lambda x: x.to_sparse_bsr((1, 1)),
    "mkldnn": torch.Tensor.to_mkldnn,
    "nested": lambda x: torch.nested.nested_tensor([*x]),
    "jagged": lambda x: torch.nested.nested_tensor([*x], layout=torch.jagged),
    "quantized": lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8),
}
REMEDY = {"nested": "to_padded_tensor", "jagged": "to_padded_tensor", "quantized": r"\.dequantize\(\)"}


def in_layout(layout, value):
    """`value` in `layout`; None if torch has no such tensor (1-d CSR, quantized bool)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return LAYOUTS[layout](value)
        except (RuntimeError, ValueError, IndexError, NotImplementedError):
            return None


CASES = [
    pytest.param(op, name, layout, id=f"{op}-{name}-{layout}")
    for op in OPS
    for name, value in tensors(sized(op, 0)).items()
    for layout in LAYOUTS
    if in_layout(layout, value) is not None
]


@pytest.mark.parametrize(("op", "name", "layout"), CASES)
def test_a_layout_is_refused_by_name(op, name, layout):
    arguments = sized(op, 0)
    arguments[name] = in_layout(layout, arguments[name])
    with pytest.raises(
        TypeError, match=f"^{op}: {name} must be a dense tensor, got .*{REMEDY.get(layout, 'to_dense')}"
    ):
        getattr(sts_kernels, op)(**arguments)
    with pytest.raises((TypeError, ValueError, RuntimeError, NotImplementedError)):
        getattr(torch.ops.sts_kernels, op)(**arguments)


class Subclass(torch.Tensor):
    pass


@pytest.mark.parametrize("op", OPS)
def test_subclasses_and_parameters_are_tensors(device, op):
    arguments = sized(op, 0, device)
    call = getattr(sts_kernels, op)
    want = results(op, call, arguments)
    as_subclass = {n: v.as_subclass(Subclass) if isinstance(v, torch.Tensor) else v for n, v in arguments.items()}
    assert_equal(results(op, call, as_subclass), want)
    parameters = {
        name: torch.nn.Parameter(value, value.is_floating_point() and name != written(op))
        for name, value in tensors(arguments).items()
    }
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = outputs(call(**{**arguments, **parameters}))
    assert_equal(got, want[: len(got)])


@pytest.mark.parametrize("op", OPS)
def test_wrapper_subclasses(op):
    """Ops run on wrapper subclasses, whose values and memory are those of the inner tensors."""
    two_tensor = pytest.importorskip("torch.testing._internal.two_tensor").TwoTensor
    arguments = sized(op, 0)
    want = results(op, getattr(sts_kernels, op), arguments)
    twice = {n: two_tensor(v, v.clone()) if isinstance(v, torch.Tensor) else v for n, v in arguments.items()}
    got = outputs(getattr(sts_kernels, op)(**twice))
    got += [twice[written(op)]] if written(op) else []
    assert_equal([each.a for each in got], want)
    assert_equal([each.b for each in got], want)


@pytest.mark.parametrize("op", OPS)
def test_fake_tensors(op):
    arguments = sized(op, 0)
    want = outputs(getattr(sts_kernels, op)(**arguments))
    with torch._subclasses.FakeTensorMode() as mode:
        fake = {n: mode.from_tensor(v) if isinstance(v, torch.Tensor) else v for n, v in arguments.items()}
        got = outputs(getattr(sts_kernels, op)(**fake))
    assert [(g.shape, g.dtype, g.device) for g in got] == [(w.shape, w.dtype, w.device) for w in want]
