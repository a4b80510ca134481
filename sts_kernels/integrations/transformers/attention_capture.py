"""The one way to see attention inputs: a module's query and key are shown to a callback before its own kernel runs.

While it is attached, the module's `config` is a stand-in that names a wrapper as the attention implementation. The
wrapper hands the rotated query and key on and calls the implementation that the module was set to. So eager, SDPA and
FlashAttention layers stay as they are, and `output_attentions` is not needed. Nothing changes during a forward: several
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

Callback: TypeAlias = Callable[[Model, torch.Tensor, torch.Tensor, Kwargs], None]  # module, query, key, further ones
Attention: TypeAlias = Callable[..., tuple[torch.Tensor, Any]]  # module, query, key, value, ... -> output, weights

_state = threading.local()
_PREFIX = "sts_capture_"  # the implementation's name follows, as the library looks for "flash" in it


class _CapturingConfig:
    """Stands in for `config`: it differs in the name of the attention implementation."""

    def __init__(self, config: Config, callback: Callback):
        self.__dict__.update(_sts_config=config, _sts_callback=callback)

    @property
    def _attn_implementation(self) -> str:
        name = _PREFIX + (self._sts_config._attn_implementation or "eager")
        if name not in ALL_ATTENTION_FUNCTIONS.valid_keys():  # set_attn_implementation may come while it is attached
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
            if "flash" in implementation:  # reads the implementation from module.config again
                module = copy.copy(module)
                module.config = config._sts_config
        return function_of(implementation, module)(module, query, key, *args, **kwargs)

    return capturing


def function_of(implementation: str, module: torch.nn.Module) -> Attention:
    """What the attention module calls under this name; each model has an eager one of its own."""
    if implementation == "eager":
        return sys.modules[type(module).__module__].eager_attention_forward
    return ALL_ATTENTION_FUNCTIONS[implementation]


class _Stop(Exception):
    pass


@contextlib.contextmanager
def stopped() -> Iterator[None]:
    """Ends an attention module's forward once its query and key were shown."""
    _state.stopped = True
    try:
        yield
    except _Stop:
        pass
    finally:
        _state.stopped = False


def attach(module: Model, callback: Callback) -> None:
    """Until `detach`, calls `callback(module, query, key, kwargs)` whenever this module attends to something."""
    module.config = _CapturingConfig(module.config, torch.compiler.disable(callback))


def detach(module: Model) -> None:
    """Safe to call twice."""
    if isinstance(module.config, _CapturingConfig):
        module.config = module.config._sts_config
