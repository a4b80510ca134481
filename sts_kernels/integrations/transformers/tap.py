"""The one way to see attention inputs: a module's query and key are shown to a sink before its own kernel runs.

While a tap is on, the module's `config` is a stand-in that names a wrapper as the attention implementation. The wrapper
hands the rotated query and key on and calls the implementation that the module was set to. So eager, SDPA and
FlashAttention layers stay as they are, and `output_attentions` is not needed. Nothing changes during a forward: several
threads may run one, and an interrupt leaves nothing behind.
"""

import copy
import sys
from collections.abc import Callable

import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

_PREFIX = "sts_tap_"  # the implementation's name follows, as the library looks for "flash" in it


class _TappedConfig:
    """Stands in for `config`: it differs in the name of the attention implementation."""

    def __init__(self, config, sink: Callable):
        self.__dict__.update(_sts_config=config, _sts_sink=sink)

    @property
    def _attn_implementation(self) -> str:
        name = _PREFIX + (self._sts_config._attn_implementation or "eager")
        if name not in ALL_ATTENTION_FUNCTIONS.valid_keys():  # set_attn_implementation may come while the tap is on
            AttentionInterface.register(name, _wrapper(name.removeprefix(_PREFIX)))
        return name

    def __getattr__(self, name: str):
        return getattr(self.__dict__["_sts_config"], name)

    def __setattr__(self, name: str, value) -> None:
        setattr(self._sts_config, name, value)

    def __deepcopy__(self, memo):
        return copy.deepcopy(self._sts_config, memo)  # a copy of the model has no tap

    def __reduce__(self):
        return _same, (self._sts_config,)


def _same(config):
    return config


def _wrapper(implementation: str) -> Callable:
    def tapped(module, query, key, *args, **kwargs):
        config = module.config
        if isinstance(config, _TappedConfig):
            config._sts_sink(module, query, key, kwargs)
            if "flash" in implementation:  # reads the implementation from module.config again
                module = copy.copy(module)
                module.config = config._sts_config
        if implementation == "eager":
            run = sys.modules[type(module).__module__].eager_attention_forward
        else:
            run = ALL_ATTENTION_FUNCTIONS[implementation]
        return run(module, query, key, *args, **kwargs)

    return tapped


def attach(module: torch.nn.Module, sink: Callable) -> None:
    """Until `detach`, calls `sink(module, query, key, kwargs)` whenever this module's forward attends to something."""
    module.config = _TappedConfig(module.config, torch.compiler.disable(sink))


def detach(module: torch.nn.Module) -> None:
    """Safe to call twice."""
    if isinstance(module.config, _TappedConfig):
        module.config = module.config._sts_config
