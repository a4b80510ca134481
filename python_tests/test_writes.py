"""Mutated arguments follow torch's rules for in-place ops, for all ops that mutate one."""

import pytest
import torch
from op_inputs import OPS, sized, written

import sts_kernels

WRITING = [op for op in OPS if written(op)]
pytestmark = pytest.mark.parametrize("raw", [False, True], ids=["public", "raw"])


def call(op, raw, arguments):
    return getattr(torch.ops.sts_kernels if raw else sts_kernels, op)(**arguments)


@pytest.mark.parametrize("op", WRITING)
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_the_version_counter_rises(device, op, mode, raw):
    arguments = sized(op, 0, device)
    target = arguments[written(op)]
    with mode():
        for calls in (1, 2):
            call(op, raw, arguments)
            assert target._version >= calls


@pytest.mark.parametrize("op", WRITING)
def test_backward_through_what_was_overwritten_is_an_error(device, op, raw):
    arguments = sized(op, 0, device)
    x = torch.ones_like(arguments[written(op)], requires_grad=True)
    product = x * arguments[written(op)]  # saved for backward
    with torch.no_grad():
        call(op, raw, arguments)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()


@pytest.mark.parametrize("op", WRITING)
def test_what_requires_grad_is_refused(device, op, raw):
    arguments = sized(op, 0, device)
    name = written(op)
    before = arguments[name].clone()
    for target in (before.clone().requires_grad_(), before.clone().requires_grad_() * 1):
        with pytest.raises(ValueError, match=f"{op}: {name} must not require grad"):
            call(op, raw, {**arguments, name: target})
        assert torch.equal(target, before)
    with torch.no_grad():
        target = torch.nn.Parameter(before.clone())
        call(op, raw, {**arguments, name: target})
    assert not torch.equal(target, before)


@pytest.mark.parametrize("op", WRITING)
def test_views_that_negate_are_refused(device, op, raw):
    """Such as z.conj().imag. An argument that is only read may be one."""
    name = written(op)
    arguments = sized(op, 0, device)
    memory = arguments[name].clone()
    before = memory.clone()
    with pytest.raises(ValueError, match=rf"{op}: {name} must not have torch's neg bit set.*{name}\.resolve_neg\(\)"):
        call(op, raw, {**arguments, name: torch._neg_view(memory)})
    assert torch.equal(memory, before)
    negated = {n: torch._neg_view(-v) if n == "features" else v for n, v in arguments.items()}
    got = call(op, raw, {**negated, name: before.clone()})
    assert torch.equal(got, call(op, raw, {**arguments, name: before.clone()}))


@pytest.mark.parametrize("op", WRITING)
def test_inference_tensors(device, op, raw):
    name = written(op)
    with torch.inference_mode():
        arguments = sized(op, 0, device)
        call(op, raw, arguments)
    with pytest.raises(RuntimeError, match=f"{op}: {name} is an inference tensor"):
        call(op, raw, {**sized(op, 0, device), name: arguments[name]})


def overlapping(value):
    """Views of the shape of `value` whose elements share memory, all of them holding 0."""
    batch, tokens = value.shape
    zeros = torch.zeros(batch * tokens, device=value.device)
    return {
        "one for all": zeros[:1].expand(batch, tokens),
        "one row": zeros[:tokens].expand(batch, tokens),
        "one column": zeros[:batch, None].expand(batch, tokens),
        "rows a token apart": zeros.as_strided((batch, tokens), (1, 1)),
        "rows run into each other": zeros.as_strided((batch, tokens), (tokens - 1, 1)),
        "columns run into each other": zeros.as_strided((batch, tokens), (1, batch - 1)),
    }


@pytest.mark.parametrize("layout", overlapping(torch.zeros(2, 2)))
def test_overlapping_memory_is_refused(device, layout, raw):
    arguments = sized("repulsion_step_", 0, device)
    arguments["potential"] = overlapping(arguments["potential"])[layout]
    with pytest.raises((ValueError, RuntimeError), match="repulsion_step_: potential must have memory of its own") as e:
        call("repulsion_step_", raw, arguments)
    assert raw or e.type is ValueError
    assert (arguments["potential"] == 0).all()


def test_strides_that_interleave_are_fine(device, raw):
    arguments = sized("repulsion_step_", 0, device)
    arguments["features"] = arguments["features"][:, :3].contiguous()
    arguments["picked"] %= 3
    plain = torch.zeros(2, 3, device=device)
    woven = torch.zeros(20, device=device).as_strided((2, 3), (3, 2))  # at 0, 2, 4 and 3, 5, 7
    want = call("repulsion_step_", raw, {**arguments, "potential": plain})
    assert torch.equal(call("repulsion_step_", raw, {**arguments, "potential": woven}), want)
    assert torch.equal(woven, plain)


def test_the_default_device_does_not_matter(device, raw):
    arguments = sized("repulsion_step_", 0, device)
    buffer = torch.zeros(*arguments["features"].shape[:2], 6, device=device)
    with torch.device("meta"):
        call("repulsion_step_", raw, {**arguments, "features": buffer[..., :5], "potential": buffer[..., 5]})
    assert buffer[..., 5].isinf().sum() == len(buffer)


def test_memory_shared_with_what_is_read(device, raw):
    """An error only if an element of potential is also an element of an input."""
    if raw:
        pytest.skip("the public function looks at it")
    step, buffer = sts_kernels.repulsion_step_, torch.zeros(2, 6, 5, device=device)
    before, picked = buffer.clone(), torch.tensor([0, 1], device=device)
    with pytest.raises(ValueError, match="potential must not share memory with features"):
        step(buffer[..., 3], buffer[..., :4], picked)
    shared = torch.zeros(8, dtype=torch.int64, device=device)
    with pytest.raises(ValueError, match="potential must not share memory with picked"):
        step(shared.view(torch.float32)[:12].view(2, 6), buffer, shared[1:3])
    assert torch.equal(buffer, before)
    assert (shared == 0).all()
    want = torch.zeros(2, 6, device=device)
    step(want, buffer[..., :4].clone(), picked)
    step(buffer[..., 4], buffer[..., :4], picked)
    assert torch.equal(buffer[..., 4], want)
