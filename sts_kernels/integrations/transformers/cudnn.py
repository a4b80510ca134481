"""Turns cuDNN's attention off while a pruned prompt is inside the LLM.

On Hopper, torch dispatches scaled_dot_product_attention to cuDNN (torch 2.11 with cuDNN newer than 9.15). cuDNN builds
an execution plan for every new key length, which takes tens of milliseconds of host time. A prompt pruned inside the
LLM has one key length per segment, so a decode step would pay at least twice what the plain model pays. FlashAttention
and the memory-efficient kernel need no plan. The switch is torch's and holds for the whole process.
"""

import threading
import weakref

import torch

_lock = threading.RLock()
_holders: weakref.WeakSet[object] = weakref.WeakSet()  # sessions with a forward under way
_switched = False  # cuDNN's attention was on, and is off because of holders


def concerns(x: torch.Tensor) -> bool:
    return x.is_cuda


def turn_off(holder: object) -> None:
    """Turns cuDNN's attention off until `turn_on` was called for every holder. Where a user has turned it off, it stays
    off."""
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
