"""What an op gives to autograd, forward-mode AD, torch.func and vmap. Only _registry calls it."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch._C import _functorch
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction
from torch.autograd.graph import increment_version
from torch.library import fallthrough_kernel

KEYS = ("Autograd", "ADInplaceOrView")  # dispatch keys whose kernels pass the call on, and so take the keyset


class Derivative(NamedTuple):
    """Of the floating-point outputs; integer outputs are indices and have none. Arguments come with their defaults
    filled in. Both functions are differentiable themselves, and see no autocast."""

    # (*grads of floating outputs, *integer outputs, *arguments) -> a gradient or None per argument
    vjp: Callable[..., Any]
    # (*tangents or None, *integer outputs, *arguments) -> the tangent of each floating output
    jvp: Callable[..., Any]


def autograd(overload: Any, discrete: bool, derivative: Derivative | None) -> dict[str, Any]:
    """The op's kernels above its backends, by dispatch key."""
    if derivative is not None:
        return {"Autograd": _differentiable(overload, derivative)}
    written = _written(overload)
    if written is not None:  # also in inference mode, which leaves out the Autograd key
        return {"Autograd": fallthrough_kernel, "ADInplaceOrView": _in_place(overload, written)}
    return {"Autograd": fallthrough_kernel if discrete else _not_differentiable(overload)}


def _written(overload: Any) -> int | None:
    """Position of the argument that the op writes to."""
    return next((i for i, a in enumerate(overload._schema.arguments) if a.alias_info and a.alias_info.is_write), None)


def _below_autograd(overload: Any, keyset: Any, arguments: Any) -> Any:
    with torch._C._AutoDispatchBelowAutograd():
        return overload.redispatch(keyset & torch._C._after_autograd_keyset, *arguments)


def _transformed() -> bool:
    """Whether forward-mode AD or torch.func is at work: cheap to ask, and mostly not."""
    return forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()


def _unpack_dual(value: torch.Tensor) -> Any:
    """As forward_ad.unpack_dual, which does not know of a level that a compiled graph has entered."""
    return torch._VF._unpack_dual(value, level=0)


def _has_tangent(value: torch.Tensor) -> bool:
    return _unpack_dual(value).tangent is not None


def _refuse_lost_derivatives(overload: Any, arguments: Any) -> None:
    """Reverse mode outside torch.func needs none of it: there the output says requires_grad=False."""
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
        increment_version(target)
        return overload.redispatch(keyset & torch._C._after_ADInplaceOrView_keyset, *arguments)

    return kernel


def _differentiable(overload: Any, derivative: Derivative) -> Any:
    defaults = [a.default_value if a.has_default_value() else None for a in overload._schema.arguments]

    class Function(_SingleLevelFunction):  # torch.func calls the Autograd key at each of its levels
        @staticmethod
        def forward(ctx: Any, keyset: Any, *arguments: Any) -> Any:
            # An autograd.Function switches both modes off; torch.func's outer levels need them.
            with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True):
                out = _below_autograd(overload, keyset, arguments)
            outputs = out if isinstance(out, tuple) else (out,)
            indices = [value for value in outputs if not value.is_floating_point()]
            ctx.mark_non_differentiable(*indices)
            ctx.floating = [value.is_floating_point() for value in outputs]
            ctx.constants = [None if isinstance(a, torch.Tensor) else a for a in (*indices, *arguments)]
            # Not the floating outputs, which may be written to before backward.
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
    """`rule` as torch.library.register_vmap wants it: the mapped axis comes first, in every tensor."""
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
    """The vmap rule of an op whose tensors all begin with the batch: the mapped axis makes a larger batch."""

    def rule(*arguments: Any) -> Any:
        lanes, batch = arguments[0].shape[:2]
        out = call(*(a.flatten(0, 1) if isinstance(a, torch.Tensor) else a for a in arguments))

        def apart(value: torch.Tensor) -> Any:
            return value.unflatten(0, (lanes, batch))

        return tuple(map(apart, out)) if isinstance(out, tuple) else apart(out)

    return rule


def stack_offsets(offsets: torch.Tensor, length: int) -> torch.Tensor:
    """Prefix sums (lanes, B+1) of packed tensors of `length` rows, as those of the tensors one after another.

    Between two lanes this leaves an item, empty where each lane's offsets end at `length`.
    """
    shift = torch.arange(offsets.shape[0], device=offsets.device) * length
    return (offsets + shift[:, None]).flatten()
