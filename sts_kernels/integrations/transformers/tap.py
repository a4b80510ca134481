"""The one way to see attention inputs: borrow a module's query and key, then let its own kernel run.

Before its forward the module's `config` becomes a shallow copy whose attention implementation names a wrapper. The
wrapper restores the config, hands the rotated query and key on, and calls the implementation the module asked for. So
eager, SDPA and FlashAttention layers stay as they are, and `output_attentions` is not needed.
"""

import copy
import sys
from collections.abc import Callable

import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

_PREFIX = "sts_tap_"  # the implementation's name follows, as the library looks for "flash" in it


def _wrapper(implementation: str) -> Callable:
    def tapped(module, query, key, *args, **kwargs):
        module.config, sink = module._sts_tap  # FlashAttention reads module.config again
        sink(module, query, key, kwargs)
        if implementation == "eager":
            run = sys.modules[type(module).__module__].eager_attention_forward
        else:
            run = ALL_ATTENTION_FUNCTIONS[implementation]
        return run(module, query, key, *args, **kwargs)

    return tapped


def arm(module: torch.nn.Module, sink: Callable) -> None:
    """Until `disarm`, calls `sink(module, query, key, kwargs)` whenever this module's forward attends to something."""
    disarm(module)
    implementation = module.config._attn_implementation or "eager"
    name = _PREFIX + implementation
    if name not in ALL_ATTENTION_FUNCTIONS.valid_keys():
        AttentionInterface.register(name, _wrapper(implementation))
    module._sts_tap = (module.config, sink)
    config = copy.copy(module.config)
    config._attn_implementation_internal = name
    module.config = config


def disarm(module: torch.nn.Module) -> None:
    """Ends it, and restores the config of a module whose forward never came to attend (an error on the way)."""
    if "_sts_tap" in module.__dict__:
        module.config, _ = module.__dict__.pop("_sts_tap")
