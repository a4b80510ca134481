"""Passes the query and key of an attention module to a callback, before the attention kernel runs.

While attached, the module's `config` is a proxy that names a wrapper as the attention implementation. The wrapper
passes the rotated query and key to the callback, then calls the module's own implementation. So eager, SDPA and
FlashAttention layers work unchanged, without `output_attentions`. A forward changes no state of the module: several
threads may run one, and an interrupt leaves nothing behind.
"""

import contextlib
import copy
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from .hooks import MASKS
from .untyped import Config, Kwargs, Model

Callback: TypeAlias = Callable[[Model, torch.Tensor, torch.Tensor, Kwargs], None]  # module, query, key, keywords
Attention: TypeAlias = Callable[..., tuple[torch.Tensor, Any]]  # module, query, key, value, ... -> output, weights

_state = threading.local()
_PREFIX = "sts_capture_"  # prefix of an implementation's name: the library looks for "flash" in the name


class _CapturingConfig:
    """Proxy of `config` that differs only in the name of the attention implementation."""

    def __init__(self, config: Config, callback: Callback):
        self.__dict__.update(_sts_config=config, _sts_callback=callback)

    @property
    def _attn_implementation(self) -> str:
        name = _PREFIX + (self._sts_config._attn_implementation or "eager")
        if name not in ALL_ATTENTION_FUNCTIONS.valid_keys():  # set_attn_implementation may be called while attached
            AttentionInterface.register(name, _wrapper(name.removeprefix(_PREFIX)))
        return name

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_sts_config"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._sts_config, name, value)

    def __deepcopy__(self, memo: dict[int, Any]) -> Config:
        return copy.deepcopy(self._sts_config, memo)  # a copy of the model captures nothing

    def __reduce__(self) -> tuple[Callable[[Config], Config], tuple[Config]]:
        return _same, (self._sts_config,)


def _same(config: Config) -> Config:
    return config


def _wrapper(implementation: str) -> Attention:
    def capturing(
        module: Model, query: torch.Tensor, key: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, Any]:
        config = module.config
        if MASKS not in kwargs and isinstance(config, _CapturingConfig):
            config._sts_callback(module, query, key, kwargs)
            if getattr(_state, "stopped", False):
                raise _Stop
            if "flash" in implementation:  # FlashAttention reads the implementation from module.config again
                module = copy.copy(module)
                module.config = config._sts_config
        return function_of(implementation, module)(module, query, key, *args, **kwargs)

    return capturing


def function_of(implementation: str, module: torch.nn.Module) -> Attention:
    """The attention function of this name. Each model file of transformers has its own eager function."""
    if implementation == "eager":
        return sys.modules[type(module).__module__].eager_attention_forward
    return ALL_ATTENTION_FUNCTIONS[implementation]


class _Stop(Exception):
    pass


@contextlib.contextmanager
def stopped() -> Iterator[None]:
    """Inside it, an attention module's forward ends after the callback: its kernel does not run."""
    _state.stopped = True
    try:
        yield
    except _Stop:
        pass
    finally:
        _state.stopped = False


def attach(module: Model, callback: Callback) -> None:
    """Until `detach`, calls `callback(module, query, key, kwargs)` before each attention of this module."""
    module.config = _CapturingConfig(module.config, torch.compiler.disable(callback))


def detach(module: Model) -> None:
    """Safe to call twice."""
    if isinstance(module.config, _CapturingConfig):
        module.config = module.config._sts_config
