"""Hooks and shadowed methods on a model, which can be removed after any interrupt.

Invariant: each place is recorded before it is changed, and `remove` inspects the recorded places. So an interrupt at
any point leaves nothing that `remove` misses. A deep copy of the model gets its own plain methods, and hooks that do
not keep the original alive.
"""

import copy
import functools
import weakref
from collections.abc import Callable
from typing import Any, NoReturn

import torch

from .untyped import Args, Kwargs, Model

MASKS = "sts_masks"  # keyword of a decode step without hook state: one mask per layer, or ()
_AFTER = "sts_kernels"  # fixed key of the forward hook: compiled code guards on it and serves the next handle too
PICKLING = (
    "sts_kernels: a model that is pruned cannot be pickled; call remove() on its handle first, or use save_pretrained()"
)


class Hooks:
    def __init__(self) -> None:
        self._modules: list[torch.nn.Module] = []
        self._shadowed: list[tuple[Model, str, _Shadow, Any]] = []  # target, name, shadow, previous attribute

    def __bool__(self) -> bool:
        return bool(self._modules or self._shadowed)

    def before(
        self, module: torch.nn.Module, method: Callable[..., Any], *first: object, layer: int | None = None
    ) -> None:
        """Calls the bound `method(*first, module, args, kwargs)` before the module's forward.

        A step with `MASKS` does not call it; there, the hook of a decoder layer passes the layer its mask.
        """
        self._modules.append(module)
        module.register_forward_pre_hook(Hook(self, method, 3, first, layer), with_kwargs=True)

    def after(self, module: Model, method: Callable[..., Any]) -> None:
        """Calls the bound `method(module, args, kwargs, output)` after the module's forward. After an error, `output`
        is None."""
        self._modules.append(module)
        module._forward_hooks[_AFTER] = Hook(self, method, 4)  # set first: `remove` finds the rest by it
        module._forward_hooks_with_kwargs[_AFTER] = module._forward_hooks_always_called[_AFTER] = True

    def shadow(
        self, target: Model, name: str, replacement: Callable[..., Any], default: Callable[..., Any] | None = None
    ) -> None:
        """Replaces a method on this instance. `replacement` gets the original, or else `default`, as its first
        argument."""
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


class Hook:
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
        if len(args) < self.count:  # another thread is removing the hook, and torch calls it without kwargs
            return None
        if MASKS in args[2]:  # traced in a compiled step
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

    def __deepcopy__(self, memo: dict[int, Any]) -> "Hook":
        """A copy inside the model, as PEFT makes, still prunes. A copy of the model does not keep the original
        alive."""
        weak = self.method if isinstance(self.method, _Weak) else _Weak(self.method)
        return Hook(None, weak, self.count, self.first, self.layer)

    def __reduce__(self) -> tuple[type["_Nothing"], tuple[()]]:
        if self.owner is not None:
            raise TypeError(PICKLING)
        return _Nothing, ()  # a copy's: it does nothing


class _Nothing:
    """A hook that does nothing."""

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        return None


class _Weak:
    """A bound method that does not keep its object alive. Returns None once the object is gone."""

    def __init__(self, method: Callable[..., Any]):
        self.method = weakref.WeakMethod(method)

    def __call__(self, *args: Any) -> Any:
        method = self.method()
        return None if method is None else method(*args)


class _Shadow:
    def __init__(self, original: Callable[..., Any], replacement: Callable[..., Any]):
        functools.update_wrapper(self, original)  # copies the attributes of a shadow: set this one's after it
        self.original, self.replacement = original, replacement

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.replacement(self.original, *args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., Any]:
        return copy.deepcopy(self.original, memo)  # bound to the copy

    def __reduce__(self) -> NoReturn:
        raise TypeError(PICKLING)
