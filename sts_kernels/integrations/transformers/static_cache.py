"""Static caches of pruned prompts: layers as long as their segment, and decode steps without hooks.

generate() makes a static cache for the full prompt, and compiles its decode steps. Three things make that work:

1. Layers. Before anything is allocated, the cache gets layers of the segments' lengths (`StaticSlots`).
2. Masks. They are made outside the compiled step, one for each segment. A keyword (`MASKS`), which every module passes
   on, brings them to the layers.
3. Hooks. A step with this keyword needs no hook state: each layer takes its segment's mask, and that is traced.
"""

import bisect
import threading
import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from transformers.cache_utils import StaticLayer

from .cache import PrunedCache, attach_state, detach_state
from .segments import PrunedPrompt

if TYPE_CHECKING:
    from transformers import Cache

ROUNDING = 64  # slots are a multiple, so prompts of similar length share a graph
SPARE = 4  # max unused sets of layers kept for later prompts


def is_static(cache: "Cache | None") -> "TypeGuard[Cache]":
    return bool(getattr(cache, "is_compileable", False))


class SegmentLayer(StaticLayer):
    """Key and value slots of one layer, for a pruned prompt and the tokens after it.

    The layer counts its own tokens: before transformers 5, the caller passes slots as columns of the full prompt. The
    buffers keep their addresses, as CUDA graphs require, and no autograd history.
    """

    keys: torch.Tensor  # None before the first prompt
    values: torch.Tensor

    def __init__(self, slots: int):
        super().__init__(slots)
        self.empty = True  # on the host: no sync
        self.filled = torch.zeros((), dtype=torch.long, device="cpu")

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Stores new states -> keys and values to attend to.

        A prompt on empty slots attends to itself alone: it gets its own states back, and needs no mask of slots.
        """
        if self.empty:
            torch.compiler.disable(self._begin)(key_states, value_states)
            return key_states, value_states
        new = key_states.shape[2]
        slots = torch.arange(new, device=key_states.device) + self.filled
        self.keys.index_copy_(2, slots, key_states.detach())
        self.values.index_copy_(2, slots, value_states.detach())
        self.filled.add_(new)
        return self.keys, self.values

    def _begin(self, *states: torch.Tensor) -> None:
        with torch.inference_mode(False):  # inference tensors could not be written outside inference mode
            if self.keys is None or any(map(_differ, (self.keys, self.values), states)):
                self.keys, self.values = (x.new_zeros(*x.shape[:2], self.max_cache_len, x.shape[3]) for x in states)
                self.filled = torch.zeros((), dtype=torch.long, device=self.keys.device)
                for buffer in (self.keys, self.values, self.filled):
                    torch._dynamo.mark_static_address(buffer)
        self.device, self.dtype = self.keys.device, self.keys.dtype
        self.batch_size = self.max_batch_size = len(self.keys)
        self.is_initialized, self.empty = True, False
        new = states[0].shape[2]
        for buffer, given in zip((self.keys, self.values), states, strict=True):
            buffer[:, :, :new] = given.detach()
            buffer[:, :, new:] = 0  # 0 * NaN is NaN: a mask does not hide it
        self.filled.fill_(new)

    def get_seq_length(self, *args: Any) -> torch.Tensor:
        return self.filled

    def crop(self, tokens: int) -> None:
        """Takes the number of tokens to remove, negative."""
        self.filled.add_(tokens)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        for buffer in (self.keys, self.values):
            buffer.copy_(buffer.index_select(0, beam_idx.to(buffer.device)))

    def reset(self) -> None:
        self.empty = True


def _differ(buffer: torch.Tensor, states: torch.Tensor) -> bool:
    shapes = [(*x.shape[:2], *x.shape[3:]) for x in (buffer, states)]
    return shapes[0] != shapes[1] or buffer.dtype != states.dtype or buffer.device != states.device


class PrunedStaticCache(PrunedCache):
    """Counts its lengths on the host, so reading them needs no sync."""

    def get_seq_length(self, *args: Any, **kwargs: Any) -> int:
        return self._sts_prompt.length + self._sts_prompt.later

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return 0 if self.layers[layer_idx].empty else self.get_seq_length() - self._sts_prompt.hidden

    def _shorten(self, remove: int, length: int) -> None:
        if remove == -length:
            return self.reset()
        super()._shorten(remove, length)
        self._sts_prompt.later += remove

    def reset(self) -> None:
        """Turns the cache back into a plain static cache of its original length."""
        prompt = self._sts_prompt
        detach_state(self)
        self.layers = prompt.plain_layers


@dataclass(eq=False)
class _Held:
    kind: tuple[int, ...]  # batch size, starts of the segments
    slots: tuple[int, ...]  # of each segment
    layers: list[SegmentLayer]
    owner: "weakref.ref[Cache]"  # the cache that has the layers

    @property
    def free(self) -> bool:
        cache = self.owner()
        return cache is None or cache.layers is not self.layers


class StaticSlots:
    """The layers that one handle gives to static caches. Layers that no cache uses any more serve the next prompt.

    So a compiled step finds its buffers at the same addresses. For each batch size and set of segments the slots only
    grow, so a shorter prompt needs no new graph.
    """

    def __init__(self) -> None:
        self.active = True
        self._held: list[_Held] = []
        self._most: dict[tuple[int, ...], tuple[int, ...]] = {}
        self._lock = threading.Lock()

    def __deepcopy__(self, memo: dict[int, Any]) -> "StaticSlots":
        return self  # a copy of a cache has its own layers

    def give(self, cache: "Cache", prompt: PrunedPrompt, batch: int, ends: dict[int, int], room: int) -> None:
        """Puts layers into an empty cache. ends: tokens of each segment, by its first layer. room: slots for later
        tokens."""
        kind = (batch, *ends)
        slots = tuple(-(-(tokens + room) // ROUNDING) * ROUNDING for tokens in ends.values())
        with self._lock:
            slots = self._most[kind] = tuple(map(max, slots, self._most.get(kind, slots)))
            free = [held for held in self._held if held.free]
            mine = next((held for held in free if (held.kind, held.slots) == (kind, slots)), None)
            if mine is None:
                starts = list(ends)
                layers = [SegmentLayer(slots[bisect.bisect_right(starts, i) - 1]) for i in range(len(cache.layers))]
                mine = _Held(kind, slots, layers, weakref.ref(cache))
            else:
                mine.owner = weakref.ref(cache)
            spare = [held for held in free if held.kind != kind][-SPARE:]  # one set for each of the last kinds
            self._held = [held for held in self._held if held not in free or held in spare] + [mine]
        for layer in mine.layers:
            layer.reset()
        prompt.slots, prompt.plain_layers, cache.layers = self, cache.layers, mine.layers
        attach_state(cache, prompt, PrunedStaticCache)

    def close(self) -> None:
        """Forgets the layers. Caches that still exist cannot be continued."""
        self.active = False
        self._held.clear()
