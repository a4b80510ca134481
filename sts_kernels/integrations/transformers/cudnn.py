"""cuDNN's attention, off while a pruned prompt is inside the LLM.

torch sends scaled_dot_product_attention on Hopper to cuDNN (torch 2.11 with cuDNN newer than 9.15), and cuDNN builds an
execution plan for every new length of the keys, tens of milliseconds of host time each. A prompt pruned inside the LLM
has a length for each segment of layers, so a step would pay twice what the plain model pays, or more. FlashAttention
and the memory-efficient kernel need no plan. The switch is torch's, for the whole process.
"""

import threading
import weakref

import torch

_lock = threading.RLock()
_holders: weakref.WeakSet[object] = weakref.WeakSet()  # forwards under way
_switched = False  # whether it was on, and is off because of them


def concerns(x: torch.Tensor) -> bool:
    return x.is_cuda


def turn_off(holder: object) -> None:
    """Until `turn_on` for every holder. Where a user has turned it off already, it stays so."""
    global _switched
    with _lock:
        if _switched or torch.backends.cuda.cudnn_sdp_enabled():
            _switched = True
            _holders.add(holder)
            torch.backends.cuda.enable_cudnn_sdp(False)


def turn_on(holder: object) -> None:
    """Safe to call twice, and without `turn_off`."""
    global _switched
    with _lock:
        _holders.discard(holder)
        if _switched and not _holders:
            torch.backends.cuda.enable_cudnn_sdp(True)
            _switched = False
