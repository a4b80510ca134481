"""Hooks and shadowed methods on a model, taken off again whatever happened in between.

Every place is noted before it is changed, and taking off looks at the places, so that an interrupt at any point leaves
nothing that `remove` misses. A deep copy of the model gets its own plain methods, and hooks that do not keep the
original alive.
"""

import copy
import functools
import weakref
from collections.abc import Callable
from typing import Any, NoReturn

import torch

from .untyped import Args, Kwargs, Model

MASKS = "sts_masks"  # keyword of a step that needs no state of a hook: a mask for each layer, or none at all
_AFTER = "sts_kernels"  # key of the hook after a forward. Compiled code guards on it, and is to serve the next handle.
PICKLING = (
    "sts_kernels: a model that is pruned cannot be pickled; call remove() on its handle first, or use save_pretrained()"
)


class Hooks:
    def __init__(self) -> None:
        self._modules: list[torch.nn.Module] = []
        self._shadowed: list[tuple[Model, str, _Shadow, Any]] = []  # target, name, the shadow, and what was there

    def __bool__(self) -> bool:
        return bool(self._modules or self._shadowed)

    def before(
        self, module: torch.nn.Module, method: Callable[..., Any], *first: object, layer: int | None = None
    ) -> None:
        """Calls the bound `method(*first, module, args, kwargs)` before the module's forward.

        Not in a step with `MASKS`, where the hook of a decoder layer takes its own."""
        self._modules.append(module)
        module.register_forward_pre_hook(_Hook(self, method, 3, first, layer), with_kwargs=True)

    def after(self, module: Model, method: Callable[..., Any]) -> None:
        """Calls the bound `method(module, args, kwargs, output)` after it; `output` is None where an error ended it."""
        self._modules.append(module)
        module._forward_hooks[_AFTER] = _Hook(self, method, 4)  # first: by it `remove` finds the rest
        module._forward_hooks_with_kwargs[_AFTER] = module._forward_hooks_always_called[_AFTER] = True

    def shadow(
        self, target: Model, name: str, replacement: Callable[..., Any], default: Callable[..., Any] | None = None
    ) -> None:
        """Shadows a method on this instance; `replacement` gets the original as its first argument, or the default."""
        original = getattr(target, name) if default is None else getattr(target, name, default)
        method = _Shadow(original, replacement)
        self._shadowed.append((target, name, method, target.__dict__.get(name)))
        target.__dict__[name] = method

    def remove(self) -> None:
        """Safe to call twice, and to call again after an interrupt."""
        for module in self._modules:
            for table in (module._forward_pre_hooks, module._forward_hooks):
                for key in [key for key, hook in table.items() if getattr(hook, "owner", None) is self]:
                    for options in (
                        module._forward_pre_hooks_with_kwargs,
                        module._forward_hooks_with_kwargs,
                        module._forward_hooks_always_called,
                        table,
                    ):
                        options.pop(key, None)
        for target, name, method, before in reversed(self._shadowed):
            if target.__dict__.get(name) is method:
                if before is None:
                    del target.__dict__[name]
                else:
                    target.__dict__[name] = before
        self._modules.clear()
        self._shadowed.clear()


class _Hook:
    def __init__(
        self,
        owner: Hooks | None,
        method: Callable[..., Any],
        count: int,
        first: tuple[object, ...] = (),
        layer: int | None = None,
    ):
        self.owner, self.method, self.count, self.first, self.layer = owner, method, count, first, layer
        self.run = torch.compiler.disable(functools.partial(method, *first) if first else method)

    def __call__(self, *args: Any) -> Any:
        if len(args) < self.count:  # another thread is taking it off: without kwargs, as for a hook that wants none
            return None
        if MASKS in args[2]:  # traced where the step is compiled
            return self._own_mask(*args)
        return self.run(*args)

    def _own_mask(
        self, module: torch.nn.Module, args: Args, kwargs: Kwargs, *output: object
    ) -> tuple[Args, Kwargs] | None:
        masks = kwargs[MASKS]
        if self.layer is None or not masks:
            return None
        mask = masks[self.layer]
        hidden = args[0] if args else kwargs["hidden_states"]
        return args, {**kwargs, "attention_mask": mask if mask.device == hidden.device else mask.to(hidden.device)}

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Hook":
        """A part of the model that an adapter copies is still pruned; a copy of the model is no part of it."""
        weak = self.method if isinstance(self.method, _Weak) else _Weak(self.method)
        return _Hook(None, weak, self.count, self.first, self.layer)

    def __reduce__(self) -> NoReturn:
        raise TypeError(PICKLING)


class _Weak:
    """A bound method that does not keep its object alive, and does nothing once that is gone."""

    def __init__(self, method: Callable[..., Any]):
        self.method = weakref.WeakMethod(method)

    def __call__(self, *args: Any) -> Any:
        method = self.method()
        return None if method is None else method(*args)


class _Shadow:
    def __init__(self, original: Callable[..., Any], replacement: Callable[..., Any]):
        self.original, self.replacement = original, replacement
        functools.update_wrapper(self, original)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.replacement(self.original, *args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., Any]:
        return copy.deepcopy(self.original, memo)  # bound to the copy

    def __reduce__(self) -> NoReturn:
        raise TypeError(PICKLING)
