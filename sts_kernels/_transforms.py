"""Kernels and rules for autograd, forward-mode AD, torch.func and vmap.

Ops use `Derivative`, `fold` and `stack_offsets`; `autograd` and `vmap` are for _registry.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch._C import _functorch
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction
from torch.autograd.graph import increment_version
from torch.library import fallthrough_kernel

KEYS = ("Autograd", "ADInplaceOrView")  # keys whose kernels redispatch, so they take the keyset


class Derivative(NamedTuple):
    """Derivative of the floating-point outputs; integer outputs are indices and have none. Arguments have their
    defaults filled in. vjp and jvp are differentiable themselves and unaffected by autocast."""

    # (*grads of floating outputs, *integer outputs, *arguments) -> a gradient or None per argument
    vjp: Callable[..., Any]
    # (*tangents or None, *integer outputs, *arguments) -> the tangent of each floating output
    jvp: Callable[..., Any]


def autograd(overload: Any, discrete: bool, derivative: Derivative | None) -> dict[str, Any]:
    """The op's kernels for KEYS, which run before its backend."""
    if derivative is not None:
        return {"Autograd": _differentiable(overload, derivative)}
    written = _written(overload)
    if written is not None:  # inference mode skips the Autograd key only
        return {"Autograd": fallthrough_kernel, "ADInplaceOrView": _in_place(overload, written)}
    return {"Autograd": fallthrough_kernel if discrete else _not_differentiable(overload)}


def _written(overload: Any) -> int | None:
    """Position of the argument that the op writes to, or None."""
    return next((i for i, a in enumerate(overload._schema.arguments) if a.alias_info and a.alias_info.is_write), None)


def _below_autograd(overload: Any, keyset: Any, arguments: Any) -> Any:
    with torch._C._AutoDispatchBelowAutograd():
        return overload.redispatch(keyset & torch._C._after_autograd_keyset, *arguments)


def _transformed() -> bool:
    """Whether forward-mode AD or torch.func is active: a cheap test that is mostly False."""
    return forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()


def _unpack_dual(value: torch.Tensor) -> Any:
    """forward_ad.unpack_dual at level 0: the public function misses a level that a compiled graph has entered."""
    return torch._VF._unpack_dual(value, level=0)


def _has_tangent(value: torch.Tensor) -> bool:
    return _unpack_dual(value).tangent is not None


def _refuse_lost_derivatives(overload: Any, arguments: Any) -> None:
    """Raises where a derivative would be lost silently. Plain reverse mode shows requires_grad=False instead."""
    for argument, value in zip(overload._schema.arguments, arguments, strict=False):
        if not isinstance(value, torch.Tensor):
            continue
        if _has_tangent(value) or (_functorch.is_gradtrackingtensor(value) and value.requires_grad):
            raise NotImplementedError(
                f"{overload._opname}: {argument.name} is being differentiated, and the op has no derivative; "
                f"give {argument.name}.detach()"
            )


def _not_differentiable(overload: Any) -> Any:
    def kernel(keyset: Any, *arguments: Any) -> Any:
        if _transformed():
            _refuse_lost_derivatives(overload, arguments)
        return _below_autograd(overload, keyset, arguments)

    return kernel


def _in_place(overload: Any, written: int) -> Any:
    name = overload._schema.arguments[written].name

    def kernel(keyset: Any, *arguments: Any) -> Any:
        if _transformed():
            _refuse_lost_derivatives(overload, arguments)
        target = arguments[written]
        if target.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"{overload._opname}: {name} must not require grad, for it is written to without a derivative; "
                f"give {name}.detach() or call it under torch.no_grad()"
            )
        if target.is_inference() and not torch.is_inference_mode_enabled():  # torch's rule for its own ops
            raise RuntimeError(
                f"{overload._opname}: {name} is an inference tensor, which is not to be written to outside inference "
                f"mode; give {name}.clone()"
            )
        if target.is_neg() or target.is_conj():  # torch would write to a copy, and fail an internal assertion
            bit = "neg" if target.is_neg() else "conj"
            raise ValueError(
                f"{overload._opname}: {name} must not have torch's {bit} bit set, for it is written to; "
                f"give {name}.resolve_{bit}()"
            )
        increment_version(target)
        return overload.redispatch(keyset & torch._C._after_ADInplaceOrView_keyset, *arguments)

    return kernel


def _differentiable(overload: Any, derivative: Derivative) -> Any:
    defaults = [a.default_value if a.has_default_value() else None for a in overload._schema.arguments]

    class Function(_SingleLevelFunction):  # torch.func runs the Autograd key once per level
        @staticmethod
        def forward(ctx: Any, keyset: Any, *arguments: Any) -> Any:
            # autograd.Function disables both modes; outer levels of torch.func need them.
            with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True):
                out = _below_autograd(overload, keyset, arguments)
            outputs = out if isinstance(out, tuple) else (out,)
            indices = [value for value in outputs if not value.is_floating_point()]
            ctx.mark_non_differentiable(*indices)
            ctx.floating = [value.is_floating_point() for value in outputs]
            ctx.constants = [None if isinstance(a, torch.Tensor) else a for a in (*indices, *arguments)]
            # Floating-point outputs are not saved: the user may write to them before backward.
            saved = [a if isinstance(a, torch.Tensor) else None for a in (*indices, *arguments)]
            ctx.save_for_backward(*saved)
            ctx.save_for_forward(*saved)
            return out

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            grads = tuple(grad for grad, floating in zip(grads, ctx.floating, strict=True) if floating)
            values = (c if a is None else a for a, c in zip(ctx.saved_tensors, ctx.constants, strict=True))
            return None, *derivative.vjp(*grads, *values)

        @staticmethod
        def jvp(ctx: Any, keyset: Any, *tangents: Any) -> Any:
            with forward_ad._set_fwd_grad_enabled(True):
                values = (
                    c if a is None else _unpack_dual(a).primal if a.is_floating_point() else a
                    for a, c in zip(ctx.saved_for_forward, ctx.constants, strict=True)
                )
                out = derivative.jvp(*tangents, *values)
            if ctx.floating == [True]:
                return out
            out = iter(out if isinstance(out, tuple) else (out,))
            return tuple(next(out) if floating else None for floating in ctx.floating)

    def kernel(keyset: Any, *arguments: Any) -> Any:
        tensors = [a for a in arguments if isinstance(a, torch.Tensor)]
        backward = torch.is_grad_enabled() and torch._C._any_requires_grad(*tensors)
        if backward or (_transformed() and any(map(_has_tangent, tensors))):
            with enable_single_level_autograd_function():
                return Function.apply(keyset, *arguments, *defaults[len(arguments) :])  # type: ignore[attr-defined]
        return _below_autograd(overload, keyset, arguments)

    return kernel


def vmap(overload: Any, rule: Callable[..., Any]) -> Any:
    """Adapts `rule` to torch.library.register_vmap: the mapped axis comes first in every tensor."""
    written = _written(overload)

    def kernel(info: Any, in_dims: Any, *arguments: Any) -> Any:
        if written is not None and in_dims[written] is None:
            name = overload._schema.arguments[written].name
            raise ValueError(f"{overload._opname}: {name} is written to, so vmap must map it where it maps any tensor")
        out = rule(*(_in_front(info.batch_size, *pair) for pair in zip(arguments, in_dims, strict=True)))
        return out, (0,) * len(out) if isinstance(out, tuple) else 0

    return kernel


def _in_front(lanes: int, value: Any, dim: int | None) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    return value.expand(lanes, *value.shape) if dim is None else value.movedim(dim, 0)


def fold(call: Callable[..., Any]) -> Callable[..., Any]:
    """vmap rule of an op whose tensors all begin with the batch axis: folds the mapped axis into the batch."""

    def rule(*arguments: Any) -> Any:
        lanes, batch = arguments[0].shape[:2]
        out = call(*(a.flatten(0, 1) if isinstance(a, torch.Tensor) else a for a in arguments))

        def apart(value: torch.Tensor) -> Any:
            return value.unflatten(0, (lanes, batch))

        return tuple(map(apart, out)) if isinstance(out, tuple) else apart(out)

    return rule


def stack_offsets(offsets: torch.Tensor, length: int) -> torch.Tensor:
    """Prefix sums (lanes, B+1) of packed tensors of `length` rows -> (lanes * (B+1),) of their concatenation.

    One extra item lies between two lanes. It is empty if each lane's offsets end at `length`.
    """
    shift = torch.arange(offsets.shape[0], device=offsets.device) * length
    return (offsets + shift[:, None]).flatten()
